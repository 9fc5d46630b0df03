"""Writes a report as one HTML file that stands alone: it has its picture within, and asks for
nothing from anywhere.

Knows: the template `page.html`. Computes no results: the tables are those of report.
"""

from importlib.resources import files
from pathlib import Path

import msgspec
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from loadgen.errors import ConfigError
from loadgen.report import (
    RUN_COLUMNS,
    ComparisonReport,
    Report,
    comparison_columns,
    comparison_remarks,
    comparison_rows,
    describe,
    requests_text,
    run_remarks,
    run_rows,
)


def write_page(report: Report | ComparisonReport, picture: str, path: Path) -> None:
    """Write the page of `report` to `path`. Raises ConfigError.

    picture: an SVG element.
    """
    if isinstance(report, ComparisonReport):
        config = report.sides[0].config
        parts = {
            "lead": report.verdict,
            "notes": [*map(describe, report.sides), requests_text(config)],
            "columns": comparison_columns(report),
            "rows": comparison_rows(report),
            "remarks": comparison_remarks(report),
        }
    else:
        config = report.config
        parts = {
            "lead": "",
            "notes": [requests_text(config)],
            "columns": RUN_COLUMNS,
            "rows": run_rows(report, " / "),
            "remarks": run_remarks(report),
        }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("loadgen") / "page.html").read_text())
    text = template.render(
        title=report.title,
        complete=report.complete,
        environment=msgspec.to_builtins(report.environment),
        config=msgspec.json.format(msgspec.json.encode(config), indent=1).decode(),
        formulas=report.formulas,
        picture=Markup(picture),
        **parts,
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}") from None

"""The documentation says what the server does, in lines that fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import field_tables

ROOT = Path(__file__).parents[1]
PAGES = [
    *("docs/api.md", "docs/architecture.md", "docs/graphs.md", "docs/load-testing.md"),
    "docs/security.md",
]


def test_the_tables_of_fields_are_those_of_the_server() -> None:
    page = field_tables.PAGE.read_text()
    assert page == field_tables.with_tables(page), (
        "docs/api.md lists other fields than the server accepts: run `python docs/field_tables.py`"
    )


@pytest.mark.parametrize("page", ["README.md", *PAGES, "benchmarks/README.md"])
def test_lines_fit(page: str) -> None:
    """Those of tables, code and pictures may be longer."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in prose.splitlines() if len(line) > 100]
    assert not [line for line in long if not line.startswith(("|", "!["))]


def test_a_promise_names_the_test_that_keeps_it() -> None:
    page = (ROOT / "docs/security.md").read_text()
    named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\S+?\.py)\)", page)
    assert not [
        f"{path}::{test}" for test, path in named if f"def {test}(" not in (ROOT / path).read_text()
    ]
    promises = re.findall(r"^\| (?!promise)[^-].*$", page, re.MULTILINE)
    assert promises
    assert not [line for line in promises if "](../tests/" not in line]

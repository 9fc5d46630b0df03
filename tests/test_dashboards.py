"""The dashboard and the alerting rules are whole, and their expressions parse. A test in
tests/e2e/test_monitoring.py checks that the series they read exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import dashboard
from tests.promql import PromQLError, parse

ROOT = Path(__file__).parents[1]
ALERTS = ROOT / "docs/dashboards/alerts.yml"
SEVERITIES = {"critical", "warning", "info"}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def dashboard_expressions() -> list[str]:
    """The expressions of all panels, with a range in place of Grafana's variable."""
    found: dict[str, Any] = json.loads(dashboard.FILE.read_text())
    targets = [target for panel in found["panels"] for target in panel.get("targets", ())]
    return [target["expr"].replace("$__rate_interval", "5m") for target in targets]


def test_the_dashboard_and_its_table_are_those_of_the_program() -> None:
    message = "run `python docs/dashboard.py`"
    assert dashboard.FILE.read_text() == dashboard.text(), message
    page = dashboard.PAGE.read_text()
    assert page == dashboard.with_table(page), message


def test_panels_lie_beside_each_other_and_tell_what_they_show() -> None:
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["targets"], panel["title"]


def test_each_legend_names_labels_that_its_series_have() -> None:
    """A label in a legend is one by which the expression groups, or the expression groups by none
    and each series keeps its own."""
    for row in dashboard.ROWS.values():
        for panel in row:
            for query, legend in panel.queries:
                expression = dashboard.expression(query).replace("$__rate_interval", "5m")
                named = set(re.findall(r"\{\{(\w+)\}\}", legend))
                if "sum" in expression:
                    assert named <= parse(expression).grouped, panel.title


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_a_panel_s_expression_parses_and_reads_the_chosen_servers(expression: str) -> None:
    for name, labels in parse(expression).selectors:
        assert name.startswith("minisrv:")
        assert "instance" in labels


def test_alerts_say_for_how_long_how_bad_and_what_to_do() -> None:
    page = dashboard.PAGE.read_text()
    told = dict(re.findall(r"^\| `(Minisrv\w+)` \| (\w+) \|", page, flags=re.MULTILINE))
    assert told == {alert["alert"]: alert["labels"]["severity"] for alert in alerts()}
    for alert in alerts():
        assert alert.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", alert["for"])
        assert alert["labels"]["severity"] in SEVERITIES
        assert "{{ $labels.instance }}" in alert["annotations"]["summary"]
        assert alert["annotations"]["runbook"] == "docs/monitoring.md#alerts"
        read = parse(alert["expr"])
        # The summary names the server, so the result must have kept that label.
        assert "instance" in read.grouped or "sum" not in alert["expr"], alert["alert"]


def test_promtool_takes_the_rules() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    subprocess.run([promtool, "check", "rules", ALERTS], check=True, capture_output=True)


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(a[5m])",
        "rate(a)",
        "sum(a[5m])",
        "a[5m]",
        "a b",
        "nothing(a)",
        "topk(a)",
        "a{b=1}",
        "a > > b",
        "sum by () (a) /",
        'a{b=="c"}',
        "§",
    ],
)
def test_the_parser_refuses(wrong: str) -> None:
    with pytest.raises(PromQLError):
        parse(wrong)


def test_the_parser_tells_what_is_read() -> None:
    read = parse('topk(3, sum by (x, le) (rate(a{b=~"c|d", e!="f"}[5m]))) > 0.5 and on (x) g')
    assert read.selectors == [("a", frozenset({"b", "e"})), ("g", frozenset())]
    assert read.grouped == {"x", "le"}

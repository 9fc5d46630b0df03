"""Writes the Grafana dashboard, docs/dashboards/minisrv.json, and the table of its panels in
docs/monitoring.md.

    python docs/dashboard.py

A test (tests/test_dashboards.py) fails if they are not up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("dashboards") / "minisrv.json"
PAGE = Path(__file__).with_name("monitoring.md")
BEGIN, END = "<!-- panels: python docs/dashboard.py -->", "<!-- /panels -->"

QUANTILES = ("0.5", "0.9", "0.99")
SCHEMA_VERSION = 42
"""The last version of the classic schema, which Grafana 12 writes and Grafana 13 imports."""
_CHOSEN = 'instance=~"$instance"'
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """A panel.

    about: what it shows, in a line, for its tooltip and for docs/monitoring.md.
    queries: pairs of an expression and the legend of its series. In an expression NAME{} stands for
        the metric minisrv:NAME of the chosen servers; more labels may stand between the braces.
    """

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False


def _rate(metric: str, by: str = "") -> str:
    """Return the growth per second of a counter, over all servers or by a label."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[$__rate_interval]))"


def _share(part: str, *whole: str) -> str:
    """Return the share of one counter in the sum of some."""
    return f"{_rate(part)} / ({' + '.join(map(_rate, whole))})"


def _percentiles(histogram: str) -> tuple[tuple[str, str], ...]:
    buckets = _rate(f"{histogram}_bucket{{}}", "le")
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{q[2:]:0<2}") for q in QUANTILES)


def _average(histogram: str) -> str:
    return f"{_rate(f'{histogram}_sum{{}}')} / {_rate(f'{histogram}_count{{}}')}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel(
            "State",
            "The state of each engine: loading, ready, asleep, draining or dead.",
            (("engine_state{} == 1", "{{instance}} {{state}}"),),
            kind="stat",
        ),
        Panel(
            "Settings",
            "The model, and the settings that each engine serves it with.",
            (
                (
                    "model_config_info{}",
                    "{{model_name}}, {{dtype}} on {{device}}, {{cudagraph_mode}}, "
                    "compilation {{compilation_mode}}, minisrv {{version}}",
                ),
            ),
            kind="stat",
        ),
        Panel(
            "Requests running and waiting",
            "Requests in the batch, and in the queue before it.",
            (
                ("sum (num_requests_running{})", "running"),
                ("sum (num_requests_waiting{})", "waiting"),
            ),
        ),
        Panel(
            "Tokens per second",
            "Throughput: tokens generated, prompt tokens of accepted requests, and those of the "
            "latter that the prefix cache had.",
            (
                (_rate("generation_tokens_total{}"), "generated"),
                (_rate("prompt_tokens_total{}"), "prompt"),
                (_rate("prefix_cache_hits_total{}"), "prompt, cached"),
            ),
            unit="cps",
        ),
        Panel(
            "Requests that ended",
            "Choices that ended per second, by finish reason.",
            ((_rate("request_success_total{}", "finished_reason"), "{{finished_reason}}"),),
            unit="reqps",
        ),
        Panel(
            "Errors",
            "Requests per second that ended with an error, by HTTP status; 499: the client went "
            "away.",
            ((_rate("request_failure_total{}", "status"), "{{status}}"),),
            unit="reqps",
        ),
        Panel(
            "HTTP requests by API worker",
            "Whether connections are spread over the API workers.",
            ((_rate("http_requests_total{}", "instance, worker"), "{{instance}} {{worker}}"),),
            unit="reqps",
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token",
            "Percentiles of the time from a request's arrival to its first output.",
            _percentiles("time_to_first_token_seconds"),
            unit="s",
        ),
        Panel(
            "Inter-token latency",
            "Percentiles of the time between two outputs, and the ITL target of the engine.",
            (
                *_percentiles("inter_token_latency_seconds"),
                ("max (itl_target_seconds{})", "target"),
            ),
            unit="s",
        ),
        Panel(
            "Request latency",
            "Percentiles of the time from a request's arrival to its end.",
            _percentiles("e2e_request_latency_seconds"),
            unit="s",
        ),
        Panel(
            "Where the time goes",
            "Average seconds of a choice in the queue, in prefill and in decode.",
            tuple(
                (_average(f"request_{phase}_time_seconds"), phase)
                for phase in ("queue", "prefill", "decode")
            ),
            unit="s",
            stacked=True,
        ),
        Panel(
            "Time in the queue",
            "Percentiles of the time from a choice's arrival at the engine to its first step.",
            _percentiles("request_queue_time_seconds"),
            unit="s",
        ),
        Panel(
            "Lengths",
            "Average numbers of prompt tokens, of those that were computed, and of generated "
            "tokens of a choice.",
            (
                (_average("request_prompt_tokens"), "prompt"),
                (_average("request_prefill_kv_computed_tokens"), "prompt, computed"),
                (_average("request_generation_tokens"), "generated"),
            ),
        ),
        Panel(
            "What is asked for",
            "Average of max_tokens, of the tokens of the longest choice, and of n.",
            (
                (_average("request_params_max_tokens"), "max_tokens"),
                (_average("request_max_num_generation_tokens"), "longest choice"),
                (_average("request_params_n"), "n"),
            ),
        ),
    ),
    "Graphs": (
        Panel(
            "Steps by mode and reason",
            "Steps per second, by the mode they ran in and why.",
            ((_rate("graph_steps_total{}", "mode, reason"), "{{mode}} {{reason}}"),),
            unit="ops",
            stacked=True,
        ),
        Panel(
            "Share of steps in graphs",
            "Shares of the steps that replay a FULL graph, and that replay any graph.",
            (
                (_share('graph_steps_total{mode="FULL"}', "graph_steps_total{}"), "FULL"),
                (_share('graph_steps_total{mode!="NONE"}', "graph_steps_total{}"), "any"),
            ),
            unit="percentunit",
        ),
        Panel(
            "Padding",
            "Share of padding in all tokens that are computed, by mode.",
            (
                (
                    f"{_rate('padded_tokens_total{}', 'mode')} / "
                    f"({_rate('padded_tokens_total{}', 'mode')} + "
                    f"{_rate('step_tokens_total{}', 'mode')})",
                    "{{mode}}",
                ),
            ),
            unit="percentunit",
        ),
        Panel(
            "Padding by size",
            "Padding tokens per second of the ten captured sizes that have most: where another "
            "size would help.",
            (
                (
                    f"topk(10, {_rate('graph_size_padded_tokens_total{}', 'kind, size')})",
                    "{{kind}} {{size}}",
                ),
            ),
            unit="cps",
        ),
        Panel(
            "Steps by size",
            "Steps per second of the ten captured sizes that are replayed most.",
            (
                (
                    f"topk(10, {_rate('graph_size_steps_total{}', 'kind, size')})",
                    "{{kind}} {{size}}",
                ),
            ),
            unit="ops",
        ),
        Panel(
            "Filling of the ladder",
            "Graphs that serve, that are still to be captured, that were refused, and that were "
            "wrong in service.",
            (("sum by (state) (graphs{})", "{{state}}"),),
        ),
        Panel(
            "Captured sizes",
            "Number of captured sizes by kind.",
            (("sum by (instance, kind) (graph_capture_size{})", "{{instance}} {{kind}}"),),
        ),
        Panel(
            "Longest turn between steps",
            "Longest time for which capturing and certifying between two steps has made requests "
            "wait.",
            (("longest_turn_seconds{}", "{{instance}}"),),
            unit="s",
        ),
    ),
    "Scheduling": (
        Panel(
            "Tokens of a step",
            "Percentiles of the number of real tokens of a step.",
            _percentiles("iteration_tokens_total"),
        ),
        Panel(
            "Prefill budget",
            "Steps per second for which prompt tokens waited, by the reason for their number.",
            ((_rate("prefill_budget_steps_total{}", "reason"), "{{reason}}"),),
            unit="ops",
            stacked=True,
        ),
        Panel(
            "Prompt tokens of a step",
            "Average number of prompt tokens of these steps, by the same reason.",
            (
                (
                    f"{_rate('prefill_budget_tokens_total{}', 'reason')} / "
                    f"{_rate('prefill_budget_steps_total{}', 'reason')}",
                    "{{reason}}",
                ),
            ),
        ),
        Panel(
            "Error of predicted step times",
            "Percentiles of the difference between predicted and measured time of a step, as a "
            "share of the measured one.",
            _percentiles("step_time_error_ratio"),
            unit="percentunit",
        ),
        Panel(
            "Waiting by reason",
            "Requests that wait for room (capacity), and for their grammar (deferred).",
            (("sum by (reason) (num_requests_waiting_by_reason{})", "{{reason}}"),),
        ),
    ),
    "KV cache": (
        Panel(
            "KV cache usage",
            "Used share of the blocks of each server.",
            (("kv_cache_usage_perc{}", "{{instance}}"),),
            unit="percentunit",
        ),
        Panel(
            "KV cache size",
            "Tokens that the cache holds, and the number and the size of its blocks.",
            (
                (
                    "cache_config_info{}",
                    "{{kv_cache_size_tokens}} tokens, {{num_gpu_blocks}} blocks of {{block_size}}, "
                    "{{cache_dtype}}",
                ),
            ),
            kind="stat",
        ),
        Panel(
            "Preemptions",
            "Requests per second that lost their blocks to others and are computed again.",
            ((_rate("num_preemptions_total{}"), "preemptions"),),
            unit="ops",
        ),
        Panel(
            "Prefix hit rate",
            "Share of the looked-up prompt tokens that the prefix cache had.",
            ((_share("prefix_cache_hits_total{}", "prefix_cache_queries_total{}"), "hits"),),
            unit="percentunit",
        ),
    ),
    "Engine": (
        Panel(
            "GPU busy and idle",
            "Shares of the time in which the GPU ran steps, and in which it waited for the host "
            "although there was work.",
            (
                ("rate(gpu_busy_seconds_total{}[$__rate_interval])", "{{instance}} busy"),
                ("rate(gpu_idle_seconds_total{}[$__rate_interval])", "{{instance}} idle"),
            ),
            unit="percentunit",
        ),
        Panel(
            "Compiled code",
            "Share of the steps that run by compiled code, and the generation that serves.",
            (
                (_share("compiled_steps_total{}", "graph_steps_total{}"), "share"),
                ("generation{}", "{{instance}} generation"),
            ),
        ),
        Panel(
            "Swaps and refusals",
            "Generations that took the place of another one, and compiled code that was refused, "
            "by reason.",
            (
                ("sum (generation_swaps_total{})", "swaps"),
                ("sum by (reason) (generation_refusals_total{})", "refused: {{reason}}"),
            ),
        ),
        Panel(
            "Compilation",
            "Seconds that each part of the way of compiled code into service took.",
            (("compilation_seconds{}", "{{instance}} {{phase}}"),),
            unit="s",
        ),
        Panel(
            "Sleep",
            "Whether each engine is awake, or what of its memory sleep has released.",
            (("engine_sleep_state{} == 1", "{{instance}} {{sleep_state}}"),),
            kind="stat",
        ),
        Panel(
            "Time to sleep and to wake up",
            "Seconds that the last sleep and the last waking up took.",
            (
                ("last_sleep_seconds{}", "{{instance}} sleep"),
                ("last_wake_up_seconds{}", "{{instance}} wake up"),
            ),
            unit="s",
        ),
        Panel(
            "Simulated launches",
            "Microseconds added to every launch; if it is not 0, all times here are simulated.",
            (("simulated_launch_us{}", "{{instance}}"),),
            unit="µs",
        ),
    ),
}


def expression(query: str) -> str:
    """Return a query with the whole names and labels of its metrics."""

    def whole(match: re.Match[str]) -> str:
        labels = ", ".join(filter(None, (_CHOSEN, match[2])))
        return f"minisrv:{match[1]}{{{labels}}}"

    return re.sub(r"([a-z0-9_]+)\{(.*?)\}", whole, query)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "datasource": _DATASOURCE,
            "editorMode": "code",
            "expr": expression(query),
            "legendFormat": legend,
            "instant": panel.kind == "stat",
            "range": panel.kind != "stat",
            "refId": chr(ord("A") + index),
        }
        for index, (query, legend) in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}}
    if panel.kind == "stat":
        options: dict[str, Any] = {
            "textMode": "name",
            "colorMode": "none",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        }
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        defaults["min"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": place,
        "options": options,
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    """Return the variables: the data source, and the servers that are shown."""
    query = "label_values(minisrv:engine_state, instance)"
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "regex": "",
            "refresh": 1,
            "hide": 0,
            "includeAll": False,
            "multi": False,
            "options": [],
            "current": {},
        },
        {
            "name": "instance",
            "label": "Server",
            "type": "query",
            "datasource": _DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": "instance"},
            "regex": "",
            "refresh": 2,
            "sort": 1,
            "hide": 0,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "options": [],
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it: rows of panels, three beside each other."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        y += 1
        for index, panel in enumerate(row):
            place = {"h": 8, "w": 8, "x": index % 3 * 8, "y": y + index // 3 * 8}
            panels.append(_panel(panel, len(panels) + 1, place))
        y += -(-len(row) // 3) * 8
    return {
        "uid": "minisrv",
        "title": "minisrv",
        "description": "The requests, graphs, steps, cache and device of minisrv servers.",
        "tags": ["minisrv", "llm"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": panels,
    }


def text() -> str:
    """Return the file of the dashboard."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def with_table(page: str) -> str:
    """Return the page with the table of panels that the dashboard has."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = ["| panel | what it shows |", "|---|---|"]
    for title, row in ROWS.items():
        lines += [f"| {title}: {panel.title} | {panel.about} |" for panel in row]
    return "\n".join((before + BEGIN, *lines, END + after))


if __name__ == "__main__":
    FILE.write_text(text())
    PAGE.write_text(with_table(PAGE.read_text()))

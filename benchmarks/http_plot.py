"""Plots several runs of `loadgen run --json`: tokens/s, ITL and TTFT by concurrency.

    python benchmarks/http_plot.py --plot F LABEL=A.json[,B.json] LABEL=C.json ...

The files of one label hold concurrencies of the same server. The name of a label says so if the
times of its runs are simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs


def levels(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the summaries of all levels in some reports, sorted by concurrency."""
    found = [level["summary"] for report in reports for level in report["levels"]]
    return sorted(found, key=lambda summary: summary["concurrency"])


def labelled(run: str) -> tuple[str, list[dict[str, Any]]]:
    """Read LABEL=FILES, and return the label's name in the plot, and the summaries."""
    label, _, paths = run.partition("=")
    reports = [json.loads(Path(path).read_text()) for path in paths.split(",")]
    # Old reports do not have the field "simulated".
    notes = dict.fromkeys(report.get("simulated", "") for report in reports)
    return ", ".join(filter(None, (label, *notes))), levels(reports)


def save_plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a panel for each metric, with a color for each label, and both axes logarithmic."""
    with needs("pip install matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for index, (label, summaries) in enumerate(runs.items()):
        x = [summary["concurrency"] for summary in summaries]
        style: dict[str, Any] = {"ms": 3, "color": f"C{index}"}
        panels[0].plot(x, [s["output_tokens_per_s"] for s in summaries], "o-", label=label, **style)
        for panel, name in zip(panels[1:], ("itl_ms", "ttft_ms"), strict=True):
            for share, line in (("p50", "o-"), ("p99", "o--")):
                values = [s[name][share] for s in summaries]
                panel.plot(x, values, line, label=f"{label} {share}", **style)
    for panel, name in zip(panels, ("tokens/s", "ITL, ms", "TTFT, ms"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="streams", ylabel=name)
        ticks = sorted({s["concurrency"] for summaries in runs.values() for s in summaries})
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the reports, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="LABEL=FILES")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()
    save_plot(dict(map(labelled, options.runs)), options.plot)


if __name__ == "__main__":
    main()

"""Compares a `minisrv bench` on an H100 with vLLM's step times there: a markdown table, a plot.

    python benchmarks/beside_vllm.py BENCH.json --model qwen3-0.6b [--plot FILE.svg]

The times of vLLM's steps are in vllm_0.26_h100.json, which also says how they were measured. They
come from another run, so the ratio of wall times includes the difference between two hosts; GPU
times do not include it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs

VLLM: dict[str, Any] = json.loads(Path(__file__).with_name("vllm_0.26_h100.json").read_text())

HEADINGS = (
    *("batch", "minisrv FULL GPU ms", "minisrv FULL wall ms", "vLLM ms", "vLLM / minisrv wall"),
    *("PIECEWISE wall ms", "eager wall ms", "launches eager", "of floor"),
)
LINES = {"NONE": "minisrv eager", "PIECEWISE": "minisrv PIECEWISE", "FULL": "minisrv FULL"}
"""The names, in the plot, of the modes of the bench, in the order of the colors in the bench's own
plot."""


def vllm_steps(model: str) -> dict[int, float]:
    """Return the milliseconds of vLLM's steps with graphs, by batch size."""
    steps = VLLM["models"][model]["FULL_AND_PIECEWISE"]
    return {int(batch): ms for batch, ms in steps.items()}


def rows(report: dict[str, Any], theirs: dict[int, float]) -> list[list[str]]:
    """Return a row for each batch size of the bench, in the order of HEADINGS; "-" stands for a
    value that was not measured."""
    found = []
    for size in report["decode"]:
        modes, batch = size["modes"], size["size"]
        full, vllm = modes.get("FULL", {}), theirs.get(batch)
        ms, gpu_ms, floor_ms = full.get("ms"), full.get("gpu_ms"), size.get("floor_ms")
        found.append(
            [
                str(batch),
                number(gpu_ms),
                number(ms),
                number(vllm),
                number(vllm / ms if vllm and ms else None),
                number(modes.get("PIECEWISE", {}).get("ms")),
                number(modes["NONE"]["ms"]),
                str(modes["NONE"]["launches"]),
                f"{floor_ms / gpu_ms:.0%}" if floor_ms and gpu_ms else "-",
            ]
        )
    return found


def number(value: float | None) -> str:
    """Format a number with two decimals, or "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def markdown(report: dict[str, Any], model: str) -> str:
    """Return a markdown text: what was measured, the table, and notes on it."""
    lines = [HEADINGS, ["---:"] * len(HEADINGS), *rows(report, vllm_steps(model))]
    return "\n".join(
        [
            f"minisrv: {subject(report)}.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            f"vLLM, {model}: {VLLM['source']}",
            "Of floor: the time to read weights and KV cache once, over FULL's GPU time.",
        ]
    )


def subject(report: dict[str, Any]) -> str:
    """Return a line that describes the bench, and says so if its times are simulated."""
    where, contexts = report["environment"], [size["context"] for size in report["decode"]]
    first, last = min(begin for begin, _ in contexts), max(end for _, end in contexts)
    text = (
        f"{report['config']['model'] or 'default model'}, {report['engine']['dtype']}, "
        f"{where.get('gpu') or where['cpu']}, {where['date'][:10]}, "
        f"{first:.0f} to {last:.0f} tokens of context"
    )
    if report["simulated_launch_us"]:
        text += f"; SIMULATED: every launch takes {report['simulated_launch_us']:g} us longer"
    return text


def save_plot(report: dict[str, Any], model: str, path: Path) -> None:
    """Plot the time of a decode step by batch size, with both axes logarithmic."""
    with needs("pip install matplotlib"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (mode, name) in enumerate(LINES.items()):
        points = {s["size"]: s["modes"][mode]["ms"] for s in report["decode"] if mode in s["modes"]}
        if points:
            axes.plot(
                list(points), list(points.values()), "o-", ms=3, color=f"C{index}", label=name
            )
    theirs = vllm_steps(model)
    name = f"vLLM {VLLM['version']} FULL"
    axes.plot(list(theirs), list(theirs.values()), "s--", ms=3, color="black", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="requests in the batch", ylabel="ms per engine step")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.suptitle(fill(f"Decode: {subject(report)}", 90), fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table, and draw the plot if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bench", type=Path, metavar="BENCH.json", help="of `minisrv bench --json`")
    parser.add_argument("--model", required=True, choices=VLLM["models"], help="of vLLM's figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()
    report = json.loads(options.bench.read_text())
    print(markdown(report, options.model))
    if options.plot is not None:
        save_plot(report, options.model, options.plot)


if __name__ == "__main__":
    main()

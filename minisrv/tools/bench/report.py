"""Prints and saves the results of a bench: tables, JSON and a plot.

Knows: rich, and matplotlib if a plot is asked for. Measures nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from minisrv.graph.observer import StepPart
from minisrv.tools.bench.measure import COMPILED, Ratio, Report, SizeResult

NAMES = {"NONE": "eager", f"{COMPILED} NONE": f"{COMPILED} eager"}
"""Names of modes in tables and plots, where they differ from the names of `CUDAGraphMode`."""


def subject(report: Report) -> str:
    """Return a line that says what was measured, and whether its times are simulated."""
    info, where = report.engine, report.environment
    threads = f"{where.threads} thread" + "s" * (where.threads > 1)
    text = f"{report.config.model or 'default model'}, {info.dtype}, {info.device}, {threads}"
    if report.simulated_launch_us:
        text += f"; SIMULATED: every launch takes {report.simulated_launch_us:g} us longer"
    return text


def print_report(report: Report) -> None:
    """Print the tables of decode, prefill and host time, and the meaning of their columns."""
    # Without a terminal rich assumes a small width, at which a table would lose columns.
    width = None if sys.stdout.isatty() else 200
    console = Console(highlight=False, soft_wrap=True, width=width)
    where = report.environment
    console.print(subject(report), style="bold")
    if report.bandwidth_gb_s is not None:
        console.print(f"{where.gpu}, {report.bandwidth_gb_s:.0f} GB/s by a large copy")
    console.print(
        f"{where.cpu} ({where.capability}), {where.cpus} cores, load {where.load:g}, "
        f"torch {where.versions['torch']}, Python {where.python}"
    )
    for title, unit, sizes in (
        (f"Decode at {_context(report.decode)} tokens of context", "batch", report.decode),
        ("Prefill", "tokens", report.prefill),
    ):
        console.print(f"\n{title}, ms per step. Launches of a step: {_launches(sizes)}")
        console.print(_table(sizes, unit))
        for line in _padded(sizes):
            console.print(line)
    mode = _modes(report.decode)[-1]
    console.print(f"\nHost microseconds of a {mode} decode step, by part")
    console.print(_parts(report.decode, mode))
    console.print()
    for formula in report.formulas:
        console.print(formula, style="dim", markup=False)


def save_json(report: msgspec.Struct, path: Path) -> None:
    """Write a whole report as JSON, the medians of all blocks included."""
    text = json.dumps(_rounded(msgspec.to_builtins(report, enc_hook=str)), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def save_plot(report: Report, path: Path) -> None:
    """Plot the time of a decode step, and the ratio of eager time to graph time, by batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for index, mode in enumerate(_modes(report.decode)):
        style: dict[str, Any] = {"fmt": "o-", "ms": 3, "color": f"C{index}"}
        sizes = [size for size in report.decode if mode in size.modes]
        batches = [size.size for size in sizes]
        name = NAMES.get(mode, mode)
        times.errorbar(batches, [size.modes[mode].ms for size in sizes], label=name, **style)
        paired = [size.eager_over[mode] for size in sizes if mode in size.eager_over]
        if paired:
            middle = [ratio.median for ratio in paired]
            below = [ratio.median - ratio.least for ratio in paired]
            above = [ratio.greatest - ratio.median for ratio in paired]
            ratios.errorbar(batches, middle, [below, above], capsize=2, label=name, **style)
    ratios.axhline(1, color="gray", lw=0.8)
    times.set(xlabel="requests in the batch", ylabel="ms per engine step", ylim=(0, None))
    ratios.set(xlabel="requests in the batch", ylabel="eager time / graph time")
    for axes in (times, ratios):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(f"Decode: {subject(report)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _table(sizes: list[SizeResult], unit: str) -> Table:
    modes = _modes(sizes)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = [NAMES.get(mode, mode) for mode in modes]
    headings += [f"eager/{mode}" for mode in modes[1:]]
    on_gpu = [mode for mode in modes if any(_gpu_ms(size, mode) is not None for size in sizes)]
    headings += [f"{NAMES.get(mode, mode)} GPU" for mode in on_gpu]
    headings += [f"{NAMES.get(mode, mode)} host us" for mode in on_gpu]
    headings += ["idle"] * bool(on_gpu)
    has_floor = any(size.floor_ms is not None for size in sizes)
    headings += ["floor", "of floor"] * has_floor
    for heading in (unit, *headings, "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for size in sizes:
        found = [size.modes.get(mode) for mode in modes]
        table.add_row(
            str(size.size),
            *("-" if result is None else f"{result.ms:.2f}" for result in found),
            *(_ratio(size.eager_over.get(mode)) for mode in modes[1:]),
            *(_number(_gpu_ms(size, mode), "{:.3f}") for mode in on_gpu),
            *(_number(_host_us(size, mode), "{:.0f}") for mode in on_gpu),
            *([_number(_idle_ms(size, modes[-1]), "{:.3f}")] * bool(on_gpu)),
            *([_number(size.floor_ms, "{:.3f}"), _share(size, modes[-1])] * has_floor),
            "-" if found[-1] is None else f"{found[-1].tokens_per_s:.0f}",
        )
    return table


def _parts(sizes: list[SizeResult], mode: str) -> Table:
    """Return the table of the host's microseconds by part of a step in `mode`."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("batch", *StepPart):
        table.add_column(heading, justify="right", no_wrap=True)
    for size in sizes:
        if mode in size.modes:
            host_us = size.modes[mode].host_us
            table.add_row(str(size.size), *(f"{host_us[part]:.0f}" for part in StepPart))
    return table


def _gpu_ms(size: SizeResult, mode: str) -> float | None:
    return size.modes[mode].gpu_ms if mode in size.modes else None


def _idle_ms(size: SizeResult, mode: str) -> float | None:
    return size.modes[mode].gpu_idle_ms if mode in size.modes else None


def _host_us(size: SizeResult, mode: str) -> float | None:
    """Return the host's microseconds in a step of `mode`, without the time that it waits for
    tokens; None if the mode was not measured."""
    if mode not in size.modes:
        return None
    host_us = size.modes[mode].host_us
    return sum(host_us.values()) - host_us["wait"]


def _share(size: SizeResult, mode: str) -> str:
    """Return the floor as a percentage of the mode's GPU time."""
    gpu_ms = _gpu_ms(size, mode)
    return "-" if gpu_ms is None or size.floor_ms is None else f"{size.floor_ms / gpu_ms:.0%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f} {ratio.least:.2f}-{ratio.greatest:.2f}"


def _launches(sizes: list[SizeResult]) -> str:
    parts = []
    for mode in _modes(sizes):
        counts = [size.modes[mode].launches for size in sizes if mode in size.modes]
        least, most = min(counts), max(counts)
        text = str(least) if least == most else f"{least}-{most}"
        parts.append(f"{NAMES.get(mode, mode)} {text}")
    return ", ".join(parts)


def _modes(sizes: list[SizeResult]) -> list[str]:
    """Return the modes that were measured at any of the sizes, eager first."""
    return list(dict.fromkeys(mode for size in sizes for mode in size.modes))


def _context(sizes: list[SizeResult]) -> str:
    first, last = min(s.context[0] for s in sizes), max(s.context[1] for s in sizes)
    return f"{first:.0f} to {last:.0f}"


def _padded(sizes: list[SizeResult]) -> list[str]:
    """Return a line for each mode in which steps of some size are padded, because no graph was
    captured for exactly that size."""
    lines = []
    for mode in _modes(sizes):
        padded = [
            f"{size.size} as {size.modes[mode].runs_as}"
            for size in sizes
            if mode in size.modes and size.modes[mode].runs_as != size.size
        ]
        if padded:
            lines.append(f"{mode} runs {', '.join(padded)}: its ladder counts tokens.")
    return lines


def _rounded(value: Any) -> Any:
    """Return a JSON value with its floats rounded to five digits behind the point. For milliseconds
    that is 10 ns; more digits would be noise that takes space."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value

"""`minisrv launch-cost`: what launches cost on this machine, and where eager steps meet graphs.

A step's kernels take their time however they are launched. Eagerly the host launches each of them;
a FULL graph has one launch. So how much a graph saves follows from three numbers: the launches of a
step, what the host needs for one, and the time of the kernels, which a step by a graph shows.

- A GPU runs kernels while the host launches the next ones. An eager step takes as long as the
  slower of the two, and meets the graph where the kernels of a step take longer than its launches.
- On a CPU the host computes the kernels itself, so an eager step takes the sum. It never meets the
  graph, but what launches cost becomes a small share of a step that computes much.

The cost of a launch is taken from the smallest decode batch, and all other eager times are
predicted from it, beside which they are measured.

Knows: steps of an engine that `tools.bench` has measured. Knows nothing of how they are measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from minisrv.config import BenchConfig, EngineConfig
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode
from minisrv.progress import StartupProgress
from minisrv.tools.bench.measure import ModeResult, Report, SizeResult, run_bench
from minisrv.tools.bench.report import check_output, save_json, subject

EAGER = CUDAGraphMode.NONE.name

MEETS = 1.1
"""The ratio of eager to graph time from which on an eager step is said to meet the graph."""

LAUNCHES = 500
"""Number of launches that are timed together: fewer than a GPU's queue has room for, so that the
host never waits for the GPU."""


class LaunchPoint(msgspec.Struct, frozen=True):
    """The steps of one size.

    size: number of requests that decode, or of tokens of a prompt.
    launches: number of launches of the eager step.
    graph: the mode of its graph: FULL, or PIECEWISE where the engine has no FULL one.
    graph_ms: milliseconds of a step by this graph.
    eager_ms: milliseconds of an eager step.
    predicted_ms: the same as it follows from launches, their cost and `graph_ms`.
    """

    size: int
    launches: int
    graph: str
    graph_ms: float
    eager_ms: float
    predicted_ms: float


class LaunchReport(msgspec.Struct, frozen=True):
    """What launches cost in one engine.

    bare_launch_us: microseconds in which the host launches the smallest operation of torch, with
        nothing else to do.
    launch_us: microseconds that a launch costs in a decode step of the smallest measured batch,
        with all that the model's code does between two launches.
    overlaps: whether the device runs kernels while the host launches others.
    decode, prefill: the points by size, ascending.
    bench: the measurements that all of it follows from.
    """

    bare_launch_us: float
    launch_us: float
    overlaps: bool
    decode: list[LaunchPoint]
    prefill: list[LaunchPoint]
    bench: Report


def launch_cost(engine: EngineConfig, settings: BenchConfig) -> None:
    """Measure, print, and write the files that were asked for.

    Raises the errors of `tools.bench.bench`, and ConfigError for settings with a compilation mode.
    """
    check_output(settings)
    if engine.compilation_mode:
        raise ConfigError(
            "launch-cost explains the launches of the model's own code; leave out "
            "--compilation-mode. `minisrv bench` measures compiled code."
        )
    progress = StartupProgress()
    try:
        report = explain(run_bench(engine, settings, progress))
    finally:
        progress.close()
    print_report(report)
    if settings.json is not None:
        save_json(report, settings.json)
    if settings.plot is not None:
        save_plot(report, settings.plot)


def explain(bench: Report) -> LaunchReport:
    """Return the cost of launches in the measured steps, and the eager times that follow."""
    device = torch.device(bench.engine.device)
    overlaps = device.type == "cuda"
    cost_ms = launch_ms(bench.decode[0], overlaps=overlaps)
    return LaunchReport(
        bare_launch_us=bare_launch_us(device),
        launch_us=1000 * cost_ms,
        overlaps=overlaps,
        decode=launch_points(bench.decode, cost_ms, overlaps=overlaps),
        prefill=launch_points(bench.prefill, cost_ms, overlaps=overlaps),
        bench=bench,
    )


def launch_ms(size: SizeResult, *, overlaps: bool) -> float:
    """Return the milliseconds that a launch costs in steps of a size at which launches decide.

    overlaps: see `LaunchReport`.
    """
    _, eager, graph = _eager_and_graph(size)
    if overlaps:
        return eager.ms / eager.launches
    return max(0.0, eager.ms - graph.ms) / (eager.launches - graph.launches)


def launch_points(
    sizes: Iterable[SizeResult], cost_ms: float, *, overlaps: bool
) -> list[LaunchPoint]:
    """Return the points of the sizes that have a graph.

    cost_ms: the milliseconds that a launch costs.
    overlaps: see `LaunchReport`.
    """
    points = []
    for size in sizes:
        if len(size.modes) > 1:
            name, eager, graph = _eager_and_graph(size)
            if overlaps:
                predicted_ms = max(eager.launches * cost_ms, graph.ms)
            else:
                predicted_ms = graph.ms + (eager.launches - graph.launches) * cost_ms
            points.append(
                LaunchPoint(size.size, eager.launches, name, graph.ms, eager.ms, predicted_ms)
            )
    return points


def _eager_and_graph(size: SizeResult) -> tuple[str, ModeResult, ModeResult]:
    """Return the name of the mode with the fewest launches, and the results of an eager step and of
    one in that mode."""
    name = list(size.modes)[-1]
    return name, size.modes[EAGER], size.modes[name]


def bare_launch_us(device: torch.device) -> float:
    """Return the microseconds of the host for the launch of an addition to one number, the median
    of five rounds."""
    number = torch.zeros(1, device=device)
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            number.add_(1)
        times.append(1e6 * (time.perf_counter() - began) / LAUNCHES)
    return median(times[1:])  # the first round loads the kernel


def meeting(points: Sequence[LaunchPoint], *, predicted: bool) -> str:
    """Return in words from which size on eager steps meet the graph.

    predicted: whether the predicted times decide, and not the measured ones.
    """

    def meets(point: LaunchPoint) -> bool:
        ms = point.predicted_ms if predicted else point.eager_ms
        return ms <= MEETS * point.graph_ms

    found = [index for index, point in enumerate(points) if not meets(point)]
    if not found:
        return f"at {points[0].size} or fewer"
    last = found[-1]
    if last + 1 == len(points):
        return f"above {points[-1].size}"
    return f"between {points[last].size} and {points[last + 1].size}"


def sentences(report: LaunchReport) -> list[str]:
    """Return what was found, in words."""
    first = report.decode[0]
    share = 1 - first.graph_ms / first.eager_ms
    lines = [
        f"A launch alone takes {report.bare_launch_us:.1f} us, and {report.launch_us:.1f} us in a "
        f"step of this model: {first.launches} launches of a decode step with {first.size} "
        f"request{'s' * (first.size > 1)}. By a graph, with one launch, {share:.0%} of the step's "
        "time is saved."
    ]
    for points, unit in ((report.decode, "requests that decode"), (report.prefill, "tokens")):
        if points:
            lines.append(
                f"Eager steps come within {MEETS - 1:.0%} of the graph's time "
                f"{meeting(points, predicted=True)} {unit} by prediction, and "
                f"{meeting(points, predicted=False)} by measurement."
            )
    return lines


def print_report(report: LaunchReport) -> None:
    """Print the tables, and what follows from them."""
    # Without a terminal rich assumes a small width, in which headings are cut.
    width = None if sys.stdout.isatty() else 200
    console = Console(highlight=False, soft_wrap=True, width=width)
    console.print(subject(report.bench), style="bold", markup=False)
    for title, points in (("decoding", report.decode), ("prompt tokens", report.prefill)):
        table = Table(
            title, "launches", "graph", "graph ms", "eager ms", "predicted", "error", "saved"
        )
        for column in table.columns:
            column.justify = "right"
        for point in points:
            table.add_row(
                str(point.size),
                str(point.launches),
                point.graph,
                f"{point.graph_ms:.3f}",
                f"{point.eager_ms:.3f}",
                f"{point.predicted_ms:.3f}",
                f"{point.predicted_ms / point.eager_ms - 1:+.0%}",
                f"{1 - point.graph_ms / point.eager_ms:.0%}",
            )
        console.print(table)
    for line in sentences(report):
        console.print(line, markup=False)


def save_plot(report: LaunchReport, path: Path) -> None:
    """Plot measured times of eager steps and of graphs, and predicted ones, by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        ((report.decode, "requests that decode"), (report.prefill, "tokens of a prompt")),
        strict=True,
    )
    for axes, (points, unit) in panels:
        sizes = [point.size for point in points]
        axes.plot(sizes, [point.graph_ms for point in points], "o-", ms=4, label="by its graph")
        axes.plot(sizes, [point.eager_ms for point in points], "o-", ms=4, label="eager")
        predicted = [point.predicted_ms for point in points]
        axes.plot(sizes, predicted, "k--", lw=1, label="eager, predicted")
        launches_ms = [point.launches * report.launch_us / 1000 for point in points]
        axes.plot(sizes, launches_ms, ":", color="gray", label="its launches")
        axes.set(xlabel=unit, ylabel="ms per step", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(subject(report.bench), fontsize=10)
    figure.savefig(path, dpi=150)

"""`minisrv launch-cost`: what launches cost on this machine, and where eager steps meet graphs.

A step's kernels take their time however they are launched. Eagerly the host launches each of them;
a FULL graph has one launch. So how much a graph saves follows from two times: what the host needs
for the launches of a step, which hardly depends on its size, and the time of the kernels, which
does, and which a step by a graph shows.

- A GPU runs kernels while the host launches the next ones. An eager step takes as long as the
  slower of the two, and meets the graph where the kernels of a step take longer than its launches.
- On a CPU the host computes the kernels itself, so an eager step takes the sum. It never meets the
  graph, but what launches cost becomes a small share of a step that computes much.

The host's time is taken from the smallest decode batch, and from the shortest prompt for steps with
prefill. All other eager times are predicted from it, and measured beside that.

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
from minisrv.tools.bench.report import save_json, subject
from minisrv.tools.output_files import check_output

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
    predicted_ms: the same as it follows from the host's time and `graph_ms`.
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
    decode_host_ms, prefill_host_ms: milliseconds that the host needs for the launches of a step
        beyond those of a graph; on a GPU for all that the host does in a step.
    overlaps: whether the device runs kernels while the host launches others.
    decode, prefill: the points by size, ascending.
    bench: the measurements that all of it follows from.
    """

    bare_launch_us: float
    launch_us: float
    decode_host_ms: float
    prefill_host_ms: float
    overlaps: bool
    decode: list[LaunchPoint]
    prefill: list[LaunchPoint]
    bench: Report


def launch_cost(engine: EngineConfig, settings: BenchConfig) -> None:
    """Measure, print, and write the files that were asked for.

    Raises the errors of `tools.bench.bench`, and ConfigError for settings with a compilation mode.
    """
    check_output(settings.json, settings.plot)
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
    decode, decode_host_ms = launch_points(bench.decode, overlaps=overlaps)
    prefill, prefill_host_ms = launch_points(bench.prefill, overlaps=overlaps)
    return LaunchReport(
        bare_launch_us=bare_launch_us(device),
        launch_us=1000 * decode_host_ms / decode[0].launches,
        decode_host_ms=decode_host_ms,
        prefill_host_ms=prefill_host_ms,
        overlaps=overlaps,
        decode=decode,
        prefill=prefill,
        bench=bench,
    )


def launch_points(
    sizes: Iterable[SizeResult], *, overlaps: bool
) -> tuple[list[LaunchPoint], float]:
    """Return the points of the sizes that have a graph, and the host's milliseconds of a step, as
    the smallest of them shows; 0 if there are none.

    overlaps: see `LaunchReport`.
    """
    points: list[LaunchPoint] = []
    host_ms = 0.0
    for size in sizes:
        if len(size.modes) > 1:
            name, eager, graph = _eager_and_graph(size)
            if not points:
                host_ms = eager.ms if overlaps else max(0.0, eager.ms - graph.ms)
            predicted_ms = max(host_ms, graph.ms) if overlaps else host_ms + graph.ms
            points.append(
                LaunchPoint(size.size, eager.launches, name, graph.ms, eager.ms, predicted_ms)
            )
    return points, host_ms


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
        (
            (report.decode, report.decode_host_ms, "requests that decode"),
            (report.prefill, report.prefill_host_ms, "tokens of a prompt"),
        ),
        strict=True,
    )
    for axes, (points, host_ms, unit) in panels:
        sizes = [point.size for point in points]
        axes.plot(sizes, [point.graph_ms for point in points], "o-", ms=4, label="by its graph")
        axes.plot(sizes, [point.eager_ms for point in points], "o-", ms=4, label="eager")
        predicted = [point.predicted_ms for point in points]
        axes.plot(sizes, predicted, "k--", lw=1, label="eager, predicted")
        axes.axhline(host_ms, ls=":", color="gray", label="the host's time")
        axes.set(xlabel=unit, ylabel="ms per step", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(subject(report.bench), fontsize=10)
    figure.savefig(path, dpi=150)

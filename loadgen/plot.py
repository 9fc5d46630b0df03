"""The pictures of a run and of a comparison. They need matplotlib, so this module is imported only
for a picture.

Knows: matplotlib. Computes no results beyond medians of what stats has computed.
"""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loadgen.errors import ConfigError
from loadgen.report import ComparisonReport, Report
from loadgen.samples import BatchITL, Distribution
from loadgen.stats import LevelSummary

_LEAST_SHARE = 0.02
"""Share of the tokens below which the ITL of a batch is not drawn: few tokens show little, and most
of them come while the batch changes and prompts are computed beside it."""


def draw(report: Report | ComparisonReport, capture_sizes: Sequence[int]) -> Figure:
    """Return the picture of a report.

    capture_sizes: the batch sizes to mark as rungs of the ladder of captured graphs.
    """
    if isinstance(report, ComparisonReport):
        return _draw_comparison(report, capture_sizes)
    return _draw_run(report, capture_sizes)


def save(figure: Figure, path: Path) -> None:
    """Write a picture to `path` in the format of its suffix. Raises ConfigError."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}") from None


def svg(figure: Figure) -> str:
    """Return a picture as an SVG element, which refers to nothing outside of it."""
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "loadgen"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw_run(report: Report, capture_sizes: Sequence[int]) -> Figure:
    levels = [level.summary for level in report.levels]
    figure = _figure(report.title, 2, 2)
    (ttft, itl), (rate, batch) = figure.subplots(2, 2)
    _by_load(ttft, levels, "TTFT in ms", [level.ttft_ms for level in levels])
    _by_load(itl, levels, "ITL in ms", [level.itl_ms for level in levels])
    places = list(range(len(levels)))
    rate.bar(places, [level.requests_per_s for level in levels], label="throughput", alpha=0.5)
    if any(level.goodput for level in levels):
        goodput = [level.goodput.requests_per_s if level.goodput else 0.0 for level in levels]
        rate.bar(places, goodput, label="goodput", width=0.5)
    _finish(rate, levels, "requests per second")
    _by_batch(batch, {"": levels}, capture_sizes)
    return figure


def _draw_comparison(report: ComparisonReport, capture_sizes: Sequence[int]) -> Figure:
    figure = _figure(report.title, 1, 2)
    by_load, by_batch = figure.subplots(1, 2)
    metric = "ITL p50 ms"
    levels = [level for level in report.levels if metric in level.metrics]
    places = list(range(len(levels)))
    for at, side in enumerate(report.sides):
        spreads = [level.metrics[metric].spreads[at] for level in levels]
        medians = [spread.median for spread in spreads]
        below = [spread.median - spread.min for spread in spreads]
        above = [spread.max - spread.median for spread in spreads]
        by_load.errorbar(places, medians, [below, above], label=side.label, marker="o", capsize=4)
    runs = {
        side.label: [repeat.runs[at] for level in report.levels for repeat in level.repeats]
        for at, side in enumerate(report.sides)
    }
    _finish(
        by_load,
        [level.repeats[0].runs[0] for level in levels],
        "ITL p50 in ms: median and range of the runs",
    )
    _by_batch(by_batch, runs, capture_sizes)
    return figure


def _figure(title: str, rows: int, columns: int) -> Figure:
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    figure.suptitle(title, wrap=True, parse_math=False)
    return figure


def _by_load(
    axes: Axes, levels: Sequence[LevelSummary], name: str, found: Sequence[Distribution | None]
) -> None:
    known = [(at, values) for at, values in enumerate(found) if values is not None]
    for label, values in (
        ("p50", [values.p50 for _, values in known]),
        ("p90", [values.p90 for _, values in known]),
        ("p99", [values.p99 for _, values in known]),
    ):
        axes.plot([at for at, _ in known], values, label=label, marker="o")
    _finish(axes, levels, name)


def _finish(axes: Axes, levels: Sequence[LevelSummary], name: str) -> None:
    closed = all(level.concurrency is not None for level in levels)
    axes.set_xticks(list(range(len(levels))), [level.load.short for level in levels])
    axes.set_xlabel("requests in flight" if closed else "load")
    axes.set_ylabel(name)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def _by_batch(
    axes: Axes, runs: dict[str, list[LevelSummary]], capture_sizes: Sequence[int]
) -> None:
    """Draw the ITL by the number of requests that decoded at the same time, in all runs of each
    server together."""
    largest = 1
    for label, summaries in runs.items():
        found = _merged([summary.by_batch for summary in summaries])
        least = _LEAST_SHARE * sum(itl.tokens for itl in found.values())
        batches = [batch for batch, itl in found.items() if itl.tokens >= least]
        largest = max([largest, *batches])
        values = [found[batch].p50_ms for batch in batches]
        axes.plot(batches, values, label=label, marker=".", linestyle="-")
    above = min((size for size in capture_sizes if size >= largest), default=largest)
    rungs = [size for size in capture_sizes if size <= above]
    for number, size in enumerate(rungs):
        name = "captured batch sizes" if number == 0 else None
        axes.axvline(size, color="gray", linewidth=0.8, linestyle=":", label=name, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("requests decoding at the same time")
    axes.set_ylabel("ITL p50 in ms")
    axes.set_ylim(bottom=0)
    if rungs or len(runs) > 1:
        axes.legend()


def _merged(found: Sequence[dict[int, BatchITL]]) -> dict[int, BatchITL]:
    """Return the ITL by batch of several runs: the mean of their medians, weighted by tokens."""
    merged: dict[int, BatchITL] = {}
    for batch in sorted({batch for by_batch in found for batch in by_batch}):
        parts = [by_batch[batch] for by_batch in found if batch in by_batch]
        tokens = sum(part.tokens for part in parts)
        mean_ms = sum(part.p50_ms * part.tokens for part in parts) / tokens
        merged[batch] = BatchITL(tokens, mean_ms)
    return merged

"""The plot of a comparison. It needs matplotlib, so this module is imported only for a plot."""

from pathlib import Path

from matplotlib.figure import Figure

from loadgen.errors import ConfigError
from loadgen.report import ComparisonReport


def draw(report: ComparisonReport, path: Path) -> None:
    """Plot the ITL of both sides by concurrency, each value with its spread, and write the plot to
    `path` in the format of its suffix."""
    metric = "ITL p50 ms"
    known = {x.concurrency: x.metrics[metric] for x in report.levels if metric in x.metrics}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, spreads in (
        (report.a.label, [found.a for found in known.values()]),
        (report.b.label, [found.b for found in known.values()]),
    ):
        medians = [spread.median for spread in spreads]
        below = [spread.median - spread.min for spread in spreads]
        above = [spread.max - spread.median for spread in spreads]
        axes.errorbar(list(known), medians, [below, above], label=label, marker="o", capsize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(known), [str(concurrency) for concurrency in known], minor=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("ITL p50 in ms: median and range of the runs")
    axes.set_title(report.title, wrap=True, parse_math=False)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}") from None

"""`minisrv ladder`: which capture sizes fit the batches of a server best, and what that trades.

Knows: the batches (`batch_sources`), what a step, a graph and its capture cost where that has been
measured, and how tables and charts are drawn. What is best is computed in `core.ladder_fit`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.checkpoint import context_length, open_checkpoint
from minisrv.config import EngineConfig, LadderConfig
from minisrv.core.attention_work import NO_WORK
from minisrv.core.cost_model import CostModel
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.ladder import Ladders, decode_descriptor, ladders_of
from minisrv.core.ladder_fit import (
    Price,
    RungUse,
    Weigh,
    computed_tokens,
    cost_of,
    fit_sizes,
    graphs_of,
    padded_share,
    use_of,
    with_sizes,
)
from minisrv.device_kind import expected_kind
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode, GraphKey, StageOutput
from minisrv.progress import StartupProgress
from minisrv.tools.batch_answers import Batch
from minisrv.tools.batch_sources import Source, assumed
from minisrv.tools.environment import environment
from minisrv.tools.output_files import check_output
from minisrv.tools.plan import print_answers

if TYPE_CHECKING:
    from minisrv.core.graph_times import StepTime

PIECE = 1 << 20
"""Number of bytes in which a budget of memory is counted."""

CHART_LINES = 16
"""Maximum number of lines of the chart in the terminal."""

CHART_WIDTH = 40
"""Number of characters of its longest bar."""

SHAPES = (
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "cudagraph_mode"),
    *("cudagraph_capture_sizes", "enforce_eager"),
)
"""The settings that decide about ladders. Where one is given, ladders are those of the settings and
not those of the server whose batches are read."""


@dataclass(frozen=True)
class Measured:
    """What was measured of the graphs of an engine.

    times: the durations of steps by each.
    nbytes: the number of bytes that each took.
    seconds: the number of seconds for which the start-up captured and certified each.
    """

    times: Mapping[GraphKey, StepTime]
    nbytes: Mapping[GraphKey, int]
    seconds: Mapping[GraphKey, float]


@dataclass(frozen=True)
class Option:
    """Capture sizes with what they cost.

    sizes: ascending; None for ladders that one list of sizes does not describe.
    graphs: the number of graphs.
    padding: the share of padding in the tokens of steps by graphs.
    cost: the cost of these steps: milliseconds, or computed tokens.
    """

    sizes: tuple[int, ...] | None
    graphs: int
    padding: float
    cost: float


@dataclass(frozen=True)
class LadderReport:
    """What `minisrv ladder` has found.

    source: where the batches come from.
    unit: what costs are: "ms", or "tokens" where no times are known.
    now, fitted: the ladders as they are, and the best ones for the budget.
    use_now, use_fitted: the steps of each of their sizes.
    front: the best ladders for each number of graphs, or other weight, around the budget.
    measured: what was measured of the graphs that there are; None if nothing was.
    """

    source: str
    unit: str
    now: Option
    fitted: Option
    use_now: list[RungUse]
    use_fitted: list[RungUse]
    front: list[Option]
    ladders: Ladders
    measured: Measured | None = field(default=None)


def run_ladder(
    config: EngineConfig, ladder: LadderConfig, source: Source | None, batches: list[Batch]
) -> None:
    """Print what fits, or only the answers for single batches if there are any, and write the files
    that are asked for.

    source: the batches that were recorded or counted; None to assume some.
    Raises the errors of the settings and of the start-up, and ConfigError for a budget with which
    no ladder holds every batch.
    """
    check_output(ladder.json, ladder.plot)
    measured = _measure(config) if ladder.measure else None
    ladders = _present(config, source)
    if batches:
        print_answers(batches, Dispatcher(ladders), measured.times if measured else None)
        return
    report = fit(ladders, source or assumed(ladder.assume, ladders), ladder, measured)
    print_report(report)
    if ladder.json is not None:
        ladder.json.write_text(json.dumps(as_json(report), indent=1) + "\n")
    if ladder.plot is not None:
        save_plot(report, ladder.plot)


def _present(config: EngineConfig, source: Source | None) -> Ladders:
    """Return the ladders as they are: those of the server whose batches are read, or if the flags
    give any others, or there is no such server, those of the settings."""
    defaults = EngineConfig()
    read = source.settings if source is not None else {}
    given = [
        name
        for name in SHAPES
        if getattr(config, name) not in (getattr(defaults, name), read.get(name))
    ]
    if source is not None and source.ladders is not None and not given:
        return source.ladders
    resolved = expected_kind(config).resolve(config)
    model = open_checkpoint(config, weights=False).model
    return ladders_of(resolved, context_length(config, model))


def fit(
    ladders: Ladders, source: Source, settings: LadderConfig, measured: Measured | None
) -> LadderReport:
    """Return which capture sizes fit batches best. Raises ConfigError."""
    if not ladders.keys():
        raise ConfigError("no graphs are captured with these settings, so there is no ladder.")
    price, unit = _price(ladders, source, measured)
    batches = source.batches
    weigh, budget, what = _budget(ladders, settings, measured)
    fits = fit_sizes(ladders, batches, price, weigh, 2 * budget)
    within = [each for each in fits if each.weight <= budget]
    if not within:
        least = f"at least {fits[0].weight}" if fits else f"more than {2 * budget}"
        raise ConfigError(
            f"no ladder of {budget} {what} holds every batch with at most fourfold padding; allow "
            f"{least}."
        )

    def option(each: Ladders, sizes: tuple[int, ...] | None) -> Option:
        uses = use_of(each, batches, price)
        return Option(sizes, len(each.keys()), padded_share(uses), cost_of(uses))

    best = within[-1].sizes
    fitted = with_sizes(ladders, best)
    return LadderReport(
        source.text,
        unit,
        option(ladders, None),
        option(fitted, best),
        use_of(ladders, batches, price),
        use_of(fitted, batches, price),
        [option(with_sizes(ladders, each.sizes), each.sizes) for each in fits],
        ladders,
        measured,
    )


def _price(ladders: Ladders, source: Source, measured: Measured | None) -> tuple[Price, str]:
    """Return what a step costs by the size of its graph, and the unit: the time as it was measured
    here or recorded, or else the number of tokens that it computes."""
    if measured is not None:
        from minisrv.certification.timing import cost_samples

        samples = tuple(cost_samples(measured.times))
    else:
        samples = source.samples
    if not samples:
        return computed_tokens, "tokens"
    model = CostModel(samples)

    def price(decode: bool, size: int) -> float:
        full = (CUDAGraphMode.FULL, decode_descriptor(size, StageOutput.TOKENS))
        return model.predict(full if decode else ladders.mixed_key(size), NO_WORK)

    return price, "ms"


def _budget(
    ladders: Ladders, settings: LadderConfig, measured: Measured | None
) -> tuple[Weigh, int, str]:
    """Return what a size takes of the budget, the budget, and its unit in words."""
    if settings.num_sizes is not None:
        return (lambda size: 1), settings.num_sizes, "sizes"
    if settings.graph_memory is not None:
        assert measured is not None, "the settings say so"
        nbytes = measured.nbytes

        def weigh(size: int) -> int:
            from minisrv.engine.generations import graph_bytes

            return -(-sum(graph_bytes(key, nbytes) for key in keys_of(ladders, size)) // PIECE)

        return weigh, settings.graph_memory // PIECE, "MiB"
    return graphs_of(ladders), settings.num_graphs or len(ladders.keys()), "graphs"


def keys_of(ladders: Ladders, size: int) -> list[GraphKey]:
    """Return the keys of the graphs for which a capture size stands."""
    ends = {ladders.max_num_seqs, ladders.max_num_batched_tokens}
    every = with_sizes(ladders, (size, *ends)).keys()
    return [key for key in every if key[1].num_tokens == size]


def _measure(config: EngineConfig) -> Measured:
    """Start the engine with all graphs, and return what they cost. Raises the errors of a
    start-up."""
    from minisrv.certification.timing import time_graphs
    from minisrv.engine.builder import build_engine

    progress, moments = StartupProgress(), list[float]()

    def tell(phase: str, done: int, total: int) -> None:
        if phase == "capturing graphs":
            moments.append(time.perf_counter())
        progress(phase, done, total)

    try:
        engine = build_engine(replace(config, cudagraph_capture="whole"), tell)
        times = engine.times or time_graphs(engine.runner, engine.scheduler.block_pool)
    finally:
        progress.close()
    keys = engine.dispatcher.ladders.keys()
    graphs = engine.runner.graphs
    took = [after - before for before, after in pairwise(moments)]
    return Measured(
        times,
        {key: graphs[key].nbytes for key in keys},
        dict(zip(keys, took, strict=False)),
    )


# ---- what is shown -------------------------------------------------------------------------------


def print_report(report: LadderReport) -> None:
    """Print the tables, the chart, and the flag."""
    # Without a terminal rich assumes a small width, in which headings are cut.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(f"Batches {report.source}.", soft_wrap=True, markup=False)
    for name, uses in (("The ladders now", report.use_now), ("Fitted", report.use_fitted)):
        console.print(f"\n{name}:")
        console.print(_use_table(report, uses))
    now, fitted = report.now, report.fitted
    saved = 1 - fitted.cost / now.cost if now.cost else 0.0
    what = "time of these steps" if report.unit == "ms" else "computed tokens"
    console.print(
        f"\n{now.graphs} graphs now: padding is {now.padding:.1%} of the computed tokens. "
        f"{fitted.graphs} fitted graphs: {fitted.padding:.1%}, which saves {saved:.1%} of the "
        f"{what}.",
        soft_wrap=True,
    )
    console.print("\nThe best ladders by the number of their graphs:")
    console.print("\n".join(chart(report)), markup=False, soft_wrap=True)
    sizes = " ".join(map(str, fitted.sizes or ()))
    console.print(f"\n--cudagraph-capture-sizes {sizes}", soft_wrap=True, markup=False)


def _use_table(report: LadderReport, uses: list[RungUse]) -> Table:
    """Return a table of the steps of each size, with what is known of the cost of its graphs."""
    columns = ["batch", "runs as", "steps", "tokens", "padding", "share"]
    timed, measured = report.unit == "ms", report.measured
    columns += ["ms", "all s"] * timed + ["MiB", "start s"] * (measured is not None)
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for use in uses:
        computed = use.tokens + use.padding
        row = [
            "decode" if use.decode else "mixed",
            "eager" if use.size is None else str(use.size),
            f"{use.steps:,.0f}",
            f"{use.tokens:,.0f}",
            f"{use.padding:,.0f}",
            f"{use.padding / computed:.1%}",
        ]
        if timed:
            costs = [f"{use.cost / use.steps:.3f}", f"{use.cost / 1000:.2f}"]
            row += costs if use.size is not None else ["", ""]
        if measured is not None:
            keys = [key for key in measured.nbytes if _belongs(key, use)]
            row += [
                f"{sum(measured.nbytes[key] for key in keys) / 2**20:.1f}" if keys else "",
                f"{sum(measured.seconds.get(key, 0.0) for key in keys):.2f}" if keys else "",
            ]
        table.add_row(*row)
    return table


def _belongs(key: GraphKey, use: RungUse) -> bool:
    """Whether a graph of the model is one of those that run the steps of a size."""
    descriptor = key[1]
    kind = (descriptor.uniform_decode, descriptor.num_tokens)
    return kind == (use.decode, use.size) and descriptor.output is not StageOutput.LOGITS


def chart(report: LadderReport) -> list[str]:
    """Return the lines of a chart of the padding by the number of graphs."""
    front = report.front
    apart = max(1, -(-len(front) // CHART_LINES))
    chosen = [
        each for index, each in enumerate(front) if index % apart == 0 or index + 1 == len(front)
    ]
    if report.fitted not in chosen:
        chosen = sorted([*chosen, report.fitted], key=lambda each: each.graphs)
    longest = max((each.padding for each in (*chosen, report.now)), default=0.0) or 1.0
    lines = ["graphs  sizes  padding"]
    rows = [(each, "") for each in chosen] + [(report.now, "  now")]
    for each, note in sorted(rows, key=lambda row: (row[0].graphs, row[1])):
        if each == report.fitted and not note:
            note = "  fitted"
        bar = "█" * round(CHART_WIDTH * each.padding / longest)
        count = "" if each.sizes is None else str(len(each.sizes))
        lines.append(f"{each.graphs:6}  {count:>5}  {each.padding:7.1%}  {bar}{note}")
    return lines


def as_json(report: LadderReport) -> dict[str, Any]:
    """Return the report as a JSON value."""
    return {
        "environment": msgspec.to_builtins(environment()),
        "source": report.source,
        "unit": report.unit,
        "now": asdict(report.now),
        "fitted": asdict(report.fitted),
        "use_now": [asdict(use) for use in report.use_now],
        "use_fitted": [asdict(use) for use in report.use_fitted],
        "front": [asdict(each) for each in report.front],
    }


def save_plot(report: LadderReport, path: Path) -> None:
    """Plot padding and cost by the number of graphs, and the steps by the size at which they
    run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    graphs = [each.graphs for each in report.front]
    left.step(graphs, [100 * each.padding for each in report.front], where="post", label="best")
    left.plot(report.now.graphs, 100 * report.now.padding, "k^", label="now")
    left.plot(report.fitted.graphs, 100 * report.fitted.padding, "o", color="C3", label="fitted")
    left.set(xlabel="graphs", ylabel="padding, % of the computed tokens")
    for uses, label in ((report.use_now, "now"), (report.use_fitted, "fitted")):
        by_graph = [use for use in uses if use.size is not None]
        names = [f"{'d' if use.decode else 'm'}{use.size}" for use in by_graph]
        right.bar(names, [use.padding for use in by_graph], width=0.8, alpha=0.6, label=label)
    right.set(xlabel="size (d: decode, m: mixed)", ylabel="padding tokens")
    right.tick_params(axis="x", rotation=90, labelsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(report.source, fontsize=9)
    figure.savefig(path, dpi=150)

"""`minisrv plan`: prints a table of the graph by which each batch runs.

Without `--measure` it needs no torch, and only the small files of a model.

Knows: the coverage of the dispatcher, which modes are served together, the measured time and memory
of each graph where an engine has captured them, the kernels by which a GPU multiplies, and how
tables are printed. What steps cost is in `costs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from minisrv.checkpoint import context_length, open_checkpoint
from minisrv.compile.modes import CompilationMode
from minisrv.config import EngineConfig
from minisrv.core.budget import ITL_TARGET_STEPS
from minisrv.core.coverage import coverage
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.graph_times import StepTime
from minisrv.core.ladder import Ladders, ladders_of
from minisrv.device_kind import KINDS, ResolvedConfig, choose_compilation, expected_kind
from minisrv.machine import missing_to_compile
from minisrv.model_config import ModelConfig
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Reason, Stage, StageOutput
from minisrv.progress import StartupProgress
from minisrv.tools.batch_answers import REASONS, Batch, answer
from minisrv.tools.costs import COST_WORDS, budget_table, budget_words, cost_table, fit_summary

if TYPE_CHECKING:
    from minisrv.engine.builder import EngineParts

_WORDS = {
    "decode": "a batch whose requests have all read their prompts: one token of each",
    "mixed": "a batch in which some request still reads its prompt (prefill)",
    "FULL": "one graph runs the batch through the model, attention included",
    "PIECEWISE": "graphs run the model but for attention, which the host launches between them",
    "NONE": "no graph: the host launches each operation (eager), and nothing is padded",
    "runs as": "the size of the graph, which the batch is padded to",
}
"""Explanations of the words in the table of batches, in the order in which they are printed."""

_EPILOGUE = (
    "what follows the model in a step: the output projection (lm_head) and sampling. It is in the "
    "graph of a decode batch, and a graph of its own behind a mixed batch, and where tokens are "
    "chosen in another way (log-probabilities, penalties, grammars). Decode has two graphs of each "
    "size: with it and without"
)

_ENDS = {
    StageOutput.TOKENS: "tokens",
    StageOutput.LOGITS: "logits",
    StageOutput.HIDDEN: "hidden states",
}
"""Names, in the table, of the outputs at which a graph ends."""

_MEASURED_WORDS = {
    "ends at": "tokens: they are sampled, and the next step's inputs are in place. logits: those "
    "of each request, which are sampled outside of the graph. hidden states: an epilogue follows",
    "ms": "of a step by this graph, with its epilogue; of an epilogue alone",
}

_KERNELS = {
    "gemv": "multiplies one row, without tensor cores",
    "sliced": "multiplies rows by tensor cores, and the warps of a program share the columns",
    "tall": "multiplies up to 32 rows by tensor cores",
    "cuBLAS": "NVIDIA's library does",
    "8x256": "a program makes 8 outputs, and reads 256 columns of the weight at a time",
    "ahead": "how many such parts of the weight are on their way",
    "splits": "how many programs share an output",
}
"""Explanations of the words in the descriptions of `minisrv.kernels.tiles.describe`."""


def print_plan(config: EngineConfig, batches: Sequence[Batch] = ()) -> None:
    """Print which batches of `config` run by which graphs, and, if it names a model, the model's
    size and context. Raises the errors that `serve` would raise for the settings and for the small
    files of the checkpoint.

    batches: those of which alone it is told, if there are any.
    """
    resolved = expected_kind(config).resolve(config)
    model = open_checkpoint(config, weights=False).model
    context = context_length(config, model)
    dispatcher = Dispatcher(ladders_of(resolved, context))
    if batches:
        print_answers(batches, dispatcher)
        return
    if config.model is not None:
        total = f"{model.num_parameters / 1e6:,.1f} million parameters"
        if model.unused_parameters:
            used = model.num_parameters - model.unused_parameters
            total += f" ({used / 1e6:,.1f} used by a token)"
        Console().print(
            f"{config.model}: {model.architecture}, {total} in {model.dtype}, context {context}",
            soft_wrap=True,
            highlight=False,
        )
    mode_is_open = config.device == "auto" and config.cudagraph_mode is None
    default = mode_is_open and not config.enforce_eager
    _print_coverage(
        resolved,
        dispatcher,
        ", the default on a CPU (that of a GPU: --device cuda)" if default else "",
    )
    missing = missing_to_compile(resolved.device)
    mode, why = choose_compilation(resolved, model.implementation, missing=missing)
    print_modes(mode, why)


def print_answers(
    batches: Sequence[Batch],
    dispatcher: Dispatcher,
    times: Mapping[GraphKey, StepTime] | None = None,
) -> None:
    """Print by which graph each of the batches runs. Raises ConfigError for one that cannot be."""
    lines = [answer(batch, dispatcher, times) for batch in batches]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True, markup=False)


def print_measured_plan(config: EngineConfig, batches: Sequence[Batch] = ()) -> None:
    """Start the engine, and print the coverage with which it serves and the time and memory of each
    graph. Raises the errors of start-up (ConfigError, ModelError, GraphError).

    batches: see `print_plan`.
    """
    from minisrv.certification.timing import time_graphs
    from minisrv.compile.program import Program
    from minisrv.engine.builder import build_engine
    from minisrv.engine.memory import mebibytes

    progress = StartupProgress()
    try:
        engine = build_engine(replace(config, cudagraph_capture="whole"), progress)
        times = engine.times or time_graphs(engine.runner, engine.scheduler.block_pool)
    finally:
        progress.close()
    if batches:
        print_answers(batches, engine.dispatcher, times)
        return
    _print_coverage(engine.config, engine.dispatcher)
    print_modes(CompilationMode[engine.info.compilation_mode], engine.info.compilation_reason)
    if isinstance(compiled := engine.runner.model.compiled, Program):
        Console(highlight=False).print(f"Served by {compiled.summary}.", soft_wrap=True)
    table = Table("batch", "size", "mode", "ends at", "ms", "MiB")
    for column in table.columns[4:]:
        column.justify = "right"
    graphs = engine.runner.graphs
    for mode, key in engine.dispatcher.ladders.keys():  # noqa: SIM118  (no mapping)
        kind = _kind(key)
        size = _size(key.num_tokens, key.num_tokens, _UNITS[kind])
        milliseconds, mib = (
            f"{times[mode, key].median_ms:.3f}",
            f"{graphs[mode, key].nbytes / 2**20:.1f}",
        )
        table.add_row(kind, size, mode.name, _ENDS[key.output], milliseconds, mib)
    console = Console()
    console.print(table)
    console.print(_legend(_MEASURED_WORDS))
    if engine.samples:
        _print_costs(console, engine)
    runner = engine.runner
    model = runner.model
    # transformers' code has other projections, which are not merged.
    if engine.config.kind.chooses_tiles and model.config.implementation == "minisrv":
        console.print(projections(model.config, model.dtype.itemsize))
        console.print(_legend(_KERNELS))
    predicted, actual = engine.memory.graph_bytes, sum(graph.nbytes for graph in graphs.values())
    prediction = "" if predicted is None else f", {mebibytes(predicted)} by the probe before"
    info = engine.info
    console.print(
        f"{len(graphs)} graphs take {mebibytes(actual)}{prediction}; the KV cache holds "
        f"{(info.num_kv_blocks - 1) * info.block_size} tokens",
        soft_wrap=True,
    )


def _print_costs(console: Console, engine: EngineParts) -> None:
    """Print what steps cost by the model, and how many prompt tokens they take because of it."""
    console.print(cost_table(engine.cost_model, engine.samples))
    console.print(_legend(COST_WORDS))
    console.print(fit_summary(engine.cost_model, engine.samples), soft_wrap=True)
    budget, info = engine.scheduler.budget, engine.info
    console.print(
        f"\nPrompt tokens of a step while prompts wait, within {budget.itl_target_ms:.2f} ms "
        "(--itl-target-ms):",
        soft_wrap=True,
    )
    console.print(budget_table(budget, info.max_num_seqs, info.max_model_len))
    console.print(_legend(budget_words()))


def print_modes(mode: CompilationMode, why: str) -> None:
    """Print the compilation mode with its reason, and with which modes of graphs each kind of
    device serves each compilation mode."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("device", "compilation", "cudagraph modes")
    for kind in KINDS.values():
        for compilation in CompilationMode:
            served = [
                graphs.value for graphs in CUDAGraphMode if not kind.why_not(compilation, graphs)
            ]
            name = f"{compilation.value} {compilation.name}"
            table.add_row(kind.name, name, ", ".join(served) or "not served")
    console = Console(highlight=False)
    console.print(f"\nCompilation {mode.value} {mode.name}: {why}. What is served together:")
    console.print(table)


class Product(NamedTuple):
    """A projection: the shape [n, k] of its weight, and whether its result is gated, or added to
    what its output holds (see `skinny_gemm_op` in `kernels.linear`)."""

    name: str
    n: int
    k: int
    gated: bool
    add: bool


def products(model: ModelConfig) -> list[Product]:
    """Return the projections of a layer, and the output projection."""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    return [
        Product("qkv", model.qkv_size, hidden, False, False),
        Product("o", hidden, model.q_size, False, True),
        Product("gate_up", 2 * intermediate, hidden, True, False),
        Product("down", hidden, intermediate, False, True),
        Product("lm_head", model.vocab_size, hidden, False, False),
    ]


def projections(model: ModelConfig, itemsize: int) -> Table:
    """Return a table of the kernels that multiply by each weight of a model on a GPU, by the number
    of rows.

    itemsize: bytes of an element of the weights.
    """
    from minisrv.kernels.tiles import ROW_BUCKETS, describe, tile

    table = Table("projection", "weight", "rows", "kernel")
    for name, n, k, gated, add in products(model):
        weight, first = f"{n}x{k}", 1
        tiles = [tile(bucket, n, k, itemsize, gated=gated, add=add) for bucket in ROW_BUCKETS]
        kernels = [*map(describe, tiles), describe(None)]
        for index, kernel in enumerate(kernels):
            last = ROW_BUCKETS[index] if index < len(ROW_BUCKETS) else None
            if kernel in kernels[index + 1 : index + 2]:
                continue  # the next row of the table covers these rows as well
            rows = f"{first} and more" if last is None else _range(first, last)
            table.add_row(name, weight, rows, kernel)
            name, weight, first = "", "", (last or 0) + 1
    return table


def _print_coverage(config: ResolvedConfig, dispatcher: Dispatcher, about_mode: str = "") -> None:
    """Print the table of batches.

    about_mode: text that follows the mode.
    """
    ladders = dispatcher.ladders
    kinds = [_kind(key) for _, key in ladders.keys()]  # noqa: SIM118  (no mapping)
    modes = {"decode": "FULL", "mixed": ladders.mode.mixed_mode.name, "epilogue": "FULL"}
    counts = [f"{kind} {kinds.count(kind)} {modes[kind]}" for kind in modes if kind in kinds]
    console = Console(highlight=False)
    console.print(f"Mode {config.cudagraph_mode.value}{about_mode}.")
    console.print(f"{len(kinds)} graphs{': ' if counts else ''}{', '.join(counts)}.")
    if kinds:
        console.print(_capture(config, ladders), soft_wrap=True)
    console.print(f"A step has at most {ladders.max_num_batched_tokens} tokens; {_target(config)}.")
    table = Table("batch", "size", "mode", "runs as", "padding at most", "reason")
    rows = coverage(dispatcher)
    for row in rows:
        size = _size(row.first, row.last, _UNITS[row.kind])
        padding = "0" if row.padded_size is None else str(row.padded_size - row.first)
        runs_as = "as it is" if row.padded_size is None else str(row.padded_size)
        table.add_row(row.kind, size, row.mode.name, runs_as, padding, row.reason.value)
    console.print(table)
    shown = {"runs as"}.union(*((row.kind, row.mode.name) for row in rows))
    words = {word: meaning for word, meaning in _WORDS.items() if word in shown}
    reasons = {row.reason for row in rows}
    words |= {reason.value: REASONS[reason] for reason in Reason if reason in reasons}
    if "epilogue" in kinds:
        words["epilogue"] = _EPILOGUE
    console.print(_legend(words))


def _capture(config: ResolvedConfig, ladders: Ladders) -> str:
    """Return which graphs a server captures before it is ready, in words."""
    if config.cudagraph_capture == "whole":
        return "A server is ready when all are captured."
    few = ladders.covering()
    sizes = {"decode": few.decode, "mixed": few.mixed, "epilogue": few.epilogues}
    listed = [f"{kind} {' '.join(map(str, some))}" for kind, some in sizes.items() if some]
    return (
        f"A server is ready when {len(few.keys())} of them are captured, which hold every batch:\n"
        f"{', '.join(listed)}. The others follow while it serves."
    )


def _target(config: ResolvedConfig) -> str:
    """Return the target for the time between two tokens, in words."""
    if config.itl_target_ms is None:
        return f"ITL target {ITL_TARGET_STEPS} decode steps, as measured at start-up"
    return f"ITL target {config.itl_target_ms:.1f} ms" if config.itl_target_ms else "no ITL target"


_UNITS = {"decode": "request", "mixed": "token", "epilogue": "request"}
"""The unit of the sizes of each kind of graph."""


def _kind(key: BatchDescriptor) -> str:
    if key.stage is Stage.EPILOGUE:
        return "epilogue"
    return "decode" if key.uniform_decode else "mixed"


def _size(first: int, last: int, unit: str) -> str:
    return f"{_range(first, last)} {unit}{'s' * (last > 1)}"


def _range(first: int, last: int) -> str:
    return str(last) if first == last else f"{first}-{last}"


def _legend(words: Mapping[str, str]) -> Table:
    """Return a table of words and their meanings, at most 100 columns wide."""
    legend = Table.grid(padding=(0, 2, 0, 0))
    legend.add_column(no_wrap=True)
    legend.add_column(max_width=84)
    for word, meaning in words.items():
        legend.add_row(word, f"{meaning}.")
    return legend

"""`minisrv plan`: which batch runs by which graph, as a table.

Knows: the dispatcher's coverage, what graphs have cost where an engine has captured them, by which
kernels a GPU multiplies, and how tables are printed. Without `--measure` it needs no torch, and
of a model the small files only.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from minisrv.checkpoint import context_length, open_checkpoint
from minisrv.config import EngineConfig
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.ladder import ladders_of
from minisrv.model_config import ModelConfig
from minisrv.modes import CUDAGraphMode
from minisrv.progress import StartupProgress


def print_plan(config: EngineConfig) -> None:
    """Print the coverage of `config`, and of a model that it names the context. Raises what `serve`
    would for what the settings and the checkpoint's small files say."""
    dispatcher = Dispatcher(ladders_of(config))
    model = open_checkpoint(config, weights=False).model
    if config.model is not None:
        Console().print(
            f"{config.model}: {model.architecture}, {model.num_parameters / 1e6:,.1f} million "
            f"parameters in {model.dtype}, context {context_length(config, model)}",
            soft_wrap=True,
            highlight=False,
        )
    _print_coverage(config, dispatcher)


def print_measured_plan(config: EngineConfig) -> None:
    """Start the engine, print the coverage that it serves with and what each graph costs. Raises
    the start-up branches of `minisrv.errors`."""
    from minisrv.engine.core import EngineCore
    from minisrv.engine.memory import mebibytes

    progress = StartupProgress()
    try:
        engine = EngineCore(config, progress)
        times = engine.times or engine.runner.time_graphs()
    finally:
        progress.close()
    _print_coverage(config, engine.dispatcher)
    table = Table("graph", "size", "epilogue", "ms a step", "MiB")
    for column in table.columns[3:]:
        column.justify = "right"
    graph_bytes = engine.runner.graph_bytes
    for (mode, key), nbytes in graph_bytes.items():
        kind = "decode" if key.uniform_decode else "mixed"
        size = _size(key.num_tokens, key.num_tokens, kind if key.forward else "epilogue")
        milliseconds, mib = f"{times[mode, key].median:.3f}", f"{nbytes / 2**20:.1f}"
        table.add_row(mode.name, size, key.epilogue.name, milliseconds, mib)
    console = Console()
    console.print(table)
    runner = engine.runner
    if runner.buffers.device.type == "cuda":
        console.print(projections(runner.model.config, runner.model.dtype.itemsize))
    predicted, actual = engine.memory.graphs, sum(graph_bytes.values())
    said = "" if predicted is None else f", {mebibytes(predicted)} by the probe before"
    info = engine.info
    console.print(
        f"{len(graph_bytes)} graphs take {mebibytes(actual)}{said}; the KV cache holds "
        f"{(info.num_kv_blocks - 1) * info.block_size} tokens",
        soft_wrap=True,
    )


class Product(NamedTuple):
    """A projection's weight [n, k], and what becomes of the product: see `kernels.linear`."""

    name: str
    n: int
    k: int
    gated: bool
    add: bool


def products(model: ModelConfig) -> list[Product]:
    """A layer's, and the output projection's."""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    return [
        Product("qkv", model.qkv_size, hidden, False, False),
        Product("o", hidden, model.q_size, False, True),
        Product("gate_up", 2 * intermediate, hidden, True, False),
        Product("down", hidden, intermediate, False, True),
        Product("lm_head", model.vocab_size, hidden, False, False),
    ]


def projections(model: ModelConfig, itemsize: int) -> Table:
    """Which kernel multiplies so many rows by each of a model's weights on a GPU."""
    from minisrv.kernels.tiles import RUNGS, describe, tile

    firsts = (1, *(rung + 1 for rung in RUNGS[:-1]))
    rows = (_size(first, last, "epilogue") for first, last in zip(firsts, RUNGS, strict=True))
    table = Table("projection", "weight", *rows, f"{RUNGS[-1] + 1} rows and more")
    for name, n, k, gated, add in products(model):
        tiles = (tile(rung, n, k, itemsize, gated=gated, add=add) for rung in RUNGS)
        table.add_row(name, f"{n}x{k}", *map(describe, tiles), describe(None))
    return table


def _print_coverage(config: EngineConfig, dispatcher: Dispatcher) -> None:
    ladders = dispatcher.ladders
    keys = ladders.keys()
    epilogues = sum(not key.forward for _, key in keys)
    decode = sum(key.uniform_decode and key.forward for _, key in keys)
    mixed = "FULL (mixed)" if ladders.mode is CUDAGraphMode.FULL else "PIECEWISE"
    console = Console()
    console.print(
        f"configured mode {config.graph_mode.value}: {len(keys)} graphs, {decode} FULL "
        f"(decode, to the TOKENS and to the HIDDEN states), {epilogues} FULL (epilogues) and "
        f"{len(keys) - decode - epilogues} {mixed}"
    )
    if config.cudagraph_mode is None and config.device == "auto" and not config.enforce_eager:
        console.print("(the default on a CPU; on a GPU it is full, which --device cuda shows)")
    table = Table("batch", "size", "mode", "runs as", "padding at most", "reason")
    for row in dispatcher.coverage():
        size = _size(row.first, row.last, row.kind)
        padding = "0" if row.rung is None else str(row.rung - row.first)
        runs_as = "as it is" if row.rung is None else str(row.rung)
        table.add_row(row.kind, size, row.mode.name, runs_as, padding, row.reason.value)
    console.print(table)


def _size(first: int, last: int, kind: str) -> str:
    unit = {"decode": "request", "mixed": "token", "epilogue": "row"}[kind] + "s" * (last > 1)
    return f"{last} {unit}" if first == last else f"{first}-{last} {unit}"

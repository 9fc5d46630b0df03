"""`minisrv plan`: which batch runs by which graph, as a table, before a model is loaded.

Knows: the dispatcher's coverage, and how a table is printed. Needs neither torch nor a model.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from minisrv.config import EngineConfig
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.ladder import ladders_of
from minisrv.modes import CUDAGraphMode


def print_plan(config: EngineConfig) -> None:
    """Print the coverage of `config`. Raises CoverageError where `serve` would."""
    ladders = ladders_of(config)
    keys = ladders.keys()
    full = sum(mode is CUDAGraphMode.FULL for mode, _ in keys)
    console = Console()
    console.print(
        f"configured mode {config.graph_mode.value}: {len(keys)} graphs, {full} FULL "
        f"(decode, each with a TOKENS and a LOGITS epilogue) and {len(keys) - full} PIECEWISE"
    )
    table = Table("batch", "size", "mode", "runs as", "padding at most", "reason")
    units = {"decode": "request", "mixed": "token"}
    for row in Dispatcher(ladders).coverage():
        size = str(row.first) if row.first == row.last else f"{row.first}-{row.last}"
        unit = units[row.kind] + ("s" if row.last > 1 else "")
        padding = "0" if row.rung is None else str(row.rung - row.first)
        runs_as = "as it is" if row.rung is None else str(row.rung)
        table.add_row(row.kind, f"{size} {unit}", row.mode.name, runs_as, padding, row.reason.value)
    console.print(table)

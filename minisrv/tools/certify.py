"""`minisrv certify`: compares every captured graph with eager runs, on every kind of batch.

Knows: how to start the engine that would serve, and how the outcome of the sweep is printed and
saved. Knows nothing of trials (see `minisrv.certification`).
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from minisrv import __version__
from minisrv.certification.faults import Fault, break_graph
from minisrv.certification.sweep import GraphReport, sweep
from minisrv.config import EngineConfig
from minisrv.core.ladder import Ladders, ladders_of
from minisrv.engine.builder import build_engine
from minisrv.engine.platforms import platform_of
from minisrv.errors import ConfigError
from minisrv.modes import BatchDescriptor, Stage, StageOutput
from minisrv.progress import StartupProgress
from minisrv.runner.model_runner import ModelRunner


@dataclass(frozen=True)
class Report:
    """The content of the JSON file. A difference that is not a number (NaN) is null there.

    broken: the fault of a graph that was broken on purpose; None if none was.
    """

    minisrv: str
    torch: str
    platform: str
    config: EngineConfig
    broken: Fault | None
    seconds: float
    passed: bool
    graphs: list[GraphReport]


def run_certify(
    config: EngineConfig, json_path: Path | None = None, fault: Fault | None = None
) -> int:
    """Start the engine, certify all its graphs, and print the report. Returns the exit status: 1 if
    a graph failed, or else 0.

    json_path: a file to which the report is written too, or None.
    fault: how one graph is broken on purpose before that: the largest of pure decode, or else of
        mixed batches. None for no fault.
    Raises the errors of start-up (ConfigError, ModelError, GraphError), and ConfigError if there
    are no graphs or the file cannot be written.
    """
    if not ladders_of(platform_of(config).kind.resolve(config)).keys():
        raise ConfigError(
            "the configuration captures no graphs, so there is nothing to certify; leave out "
            "--enforce-eager and --cudagraph-mode none."
        )
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise ConfigError(f"--json {json_path}: not a file in an existing directory.")
    progress = StartupProgress()
    try:
        # Steps that nobody will serve need not be timed.
        untimed = replace(config, itl_target_ms=0.0, cudagraph_capture="whole")
        engine = build_engine(untimed, progress, check_addresses=True)
        broken = None if fault is None else _break(engine.runner, fault)
        start = time.perf_counter()
        graphs = sweep(
            engine.runner,
            engine.scheduler.block_pool,
            lambda done, total: progress("certifying graphs", done, total),
        )
        seconds = time.perf_counter() - start
    finally:
        progress.close()
    passed = not any(graph.failures for graph in graphs)
    _print(graphs, seconds, passed, broken)
    if json_path is not None:
        report = Report(
            minisrv=__version__,
            torch=str(torch.__version__),
            platform=platform.platform(),
            config=config,
            broken=fault,
            seconds=round(seconds, 1),
            passed=passed,
            graphs=graphs,
        )
        try:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        except OSError as error:
            raise ConfigError(f"--json {json_path}: {error.strerror}.") from None
    return 0 if passed else 1


def _break(runner: ModelRunner, fault: Fault) -> str:
    """Break one graph that has passed its certification at start-up, and return what was done. It
    is one that pads some batch, as most faults are in the padding. Raises ConfigError if there is
    none."""
    ladders = runner.ladders
    keys = [key for key in ladders.keys() if key[1].stage is Stage.MODEL]  # noqa: SIM118
    padded = [key for key in keys if _pads(ladders, key[1])]
    if not padded:
        raise ConfigError(
            "with these capture sizes every batch fills its graph, so there is no padding that "
            "could be broken; let there be more requests: --max-num-seqs 4."
        )
    mode, key = next((key for key in padded if key[1].output is StageOutput.TOKENS), padded[0])
    break_graph(runner, (mode, key), fault)
    return f"BROKEN ON PURPOSE ({fault.value}): {mode.name} {key.num_tokens} {key.output.name}"


def _pads(ladders: Ladders, key: BatchDescriptor) -> bool:
    """Return whether the graph runs a batch that is smaller than it."""
    return key.num_tokens - 1 not in (0, *ladders.capture_sizes_of(key))


def _print(graphs: list[GraphReport], seconds: float, passed: bool, broken: str | None) -> None:
    console = Console()
    if broken is not None:
        console.print(broken, style="bold", markup=False, highlight=False)
    table = Table("graph", "trials", "largest difference", "verdict")
    for graph in graphs:
        verdict = f"{len(graph.failures)} FAILED" if graph.failures else "passed"
        table.add_row(graph.graph, str(graph.trials), f"{graph.largest_difference:.3g}", verdict)
    console.print(table)
    for graph in graphs:
        for failure in graph.failures:
            console.print(f"{graph.graph} on {failure.batch}:", style="bold", markup=False)
            console.print(f"  {failure.problem}", markup=False, highlight=False)
    trials = sum(graph.trials for graph in graphs)
    failed = sum(bool(graph.failures) for graph in graphs)
    verdict = "all passed" if passed else f"{failed} FAILED"
    console.print(f"{len(graphs)} graphs, {trials} trials in {seconds:.1f} s: {verdict}")

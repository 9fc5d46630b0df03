"""`minisrv certify`: compares every captured graph with eager runs, on every kind of batch.

The trials are those of the certification at start-up (`graph.certify`, `runner.trial`), on more
batches; a failure is noted here, and the sweep goes on.

Knows: how to start the engine that would serve, which trials each graph gets, and how the outcome
is printed and saved.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from minisrv import __version__
from minisrv.config import EngineConfig
from minisrv.core.ladder import ladders_of
from minisrv.engine.builder import build_engine
from minisrv.errors import CertificationError, ConfigError
from minisrv.graph.certify import certify
from minisrv.modes import BatchDescriptor
from minisrv.progress import StartupProgress
from minisrv.runner.batches import Batch, describe, full_batch, sweep_batches
from minisrv.runner.model_runner import ModelRunner
from minisrv.runner.trial import StepTrial


@dataclass(frozen=True)
class Failure:
    """A batch on which a graph gave wrong results.

    batch: a description of the batch.
    difference: see `CertificationError`.
    problem: the message of the error.
    """

    batch: str
    difference: float
    problem: str


@dataclass
class GraphReport:
    """The outcome of all trials of one graph."""

    graph: str
    trials: int = 0
    largest_difference: float = 0.0
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The content of the JSON file. A difference that is not a number (NaN) is null there."""

    minisrv: str
    torch: str
    platform: str
    config: EngineConfig
    seconds: float
    passed: bool
    graphs: list[GraphReport]


def run_certify(config: EngineConfig, json_path: Path | None = None) -> int:
    """Start the engine, certify all its graphs, and print the report. Returns the exit status: 1 if
    a graph failed, or else 0.

    json_path: a file to which the report is written too, or None.
    Raises the errors of start-up (ConfigError, ModelError, GraphError), and ConfigError if there
    are no graphs or the file cannot be written.
    """
    if not ladders_of(config).keys():
        raise ConfigError(
            "the configuration captures no graphs, so there is nothing to certify; leave out "
            "--enforce-eager and --cudagraph-mode none."
        )
    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise ConfigError(f"--json {json_path}: not a file in an existing directory.")
    progress = StartupProgress()
    try:
        runner = build_engine(config, progress, check_addresses=True).runner
        start = time.perf_counter()
        graphs = sweep(runner, lambda done, total: progress("certifying graphs", done, total))
        seconds = time.perf_counter() - start
    finally:
        progress.close()
    passed = not any(graph.failures for graph in graphs)
    _print(graphs, seconds, passed)
    if json_path is not None:
        report = Report(
            minisrv=__version__,
            torch=str(torch.__version__),
            platform=platform.platform(),
            config=config,
            seconds=round(seconds, 1),
            passed=passed,
            graphs=graphs,
        )
        try:
            json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        except OSError as error:
            raise ConfigError(f"--json {json_path}: {error.strerror}.") from None
    return 0 if passed else 1


def sweep(runner: ModelRunner, progress: Callable[[int, int], None]) -> list[GraphReport]:
    """Certify every graph on the batches of `sweep_batches`. The KV cache must be empty.

    progress: called with the number of trials done so far and the number of all trials.
    """
    keys = runner.ladders.keys()
    plan = [(mode, key, _batches(runner, key)) for mode, key in keys]
    total = sum(len(batches) for _, _, batches in plan)
    done = 0
    reports: list[GraphReport] = []
    for mode, key, batches in plan:
        before = StepTrial(runner, mode, key, full_batch(key, runner.limits))
        report = GraphReport(before.name)
        reports.append(report)
        for batch in batches:
            progress(done, total)
            _try(StepTrial(runner, mode, key, batch, before), batch, report)
            done += 1
        before.clear()
    progress(done, total)
    return reports


def _batches(runner: ModelRunner, key: BatchDescriptor) -> list[Batch]:
    rungs = runner.ladders.rungs_of(key)
    below = max((rung for rung in rungs if rung < key.num_tokens), default=0)
    return sweep_batches(key, below, runner.limits)


def _try(trial: StepTrial, batch: Batch, report: GraphReport) -> None:
    try:
        difference = certify(trial)
    except CertificationError as error:
        difference = error.difference
        report.failures.append(Failure(describe(batch), difference, error.message))
    report.trials += 1
    report.largest_difference = max(report.largest_difference, difference)


def _print(graphs: list[GraphReport], seconds: float, passed: bool) -> None:
    console = Console()
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

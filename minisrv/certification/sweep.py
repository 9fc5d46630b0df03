"""The certification of installed graphs on every kind of batch.

The trials are those of a start-up, on more batches; a failure is noted, and the sweep goes on.

Knows: which trials each graph gets, and the outcome of each. Knows nothing of how the outcome is
shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from minisrv.certification.batches import (
    Batch,
    BatchLimits,
    describe,
    full_batch,
    sweep_batches,
)
from minisrv.certification.compare import certify
from minisrv.certification.trial import StepTrial, reserved_space
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.errors import CertificationError
from minisrv.graph.captured import CapturedGraph
from minisrv.modes import BatchDescriptor
from minisrv.runner.model_runner import ModelRunner


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


def sweep(
    runner: ModelRunner, pool: BlockPool, progress: Callable[[int, int], None]
) -> list[GraphReport]:
    """Certify every installed graph on the batches of `sweep_batches`.

    pool: the blocks of the runner's cache, of which the free ones are used meanwhile.
    progress: called with the number of trials done so far and the number of all trials.
    """
    graphs = runner.graphs
    reports: list[GraphReport] = []
    with reserved_space(runner, pool) as space:
        limits = space.limits(runner)
        plan = [(key, _batches(runner.ladders, key[1], limits)) for key in runner.ladders.keys()]  # noqa: SIM118
        total = sum(len(batches) for _, batches in plan)
        done = 0
        for key, batches in plan:
            full_batch_trial = StepTrial(runner, space, key, full_batch(key[1], limits))
            report = GraphReport(full_batch_trial.name)
            reports.append(report)
            for batch in batches:
                progress(done, total)
                trial = StepTrial(runner, space, key, batch, full_batch_trial)
                _try(trial, graphs[key], batch, report)
                done += 1
            full_batch_trial.clear()
        progress(done, total)
    return reports


def _batches(ladders: Ladders, key: BatchDescriptor, limits: BatchLimits) -> list[Batch]:
    sizes = ladders.capture_sizes_of(key)
    below = max((size for size in sizes if size < key.num_tokens), default=0)
    return sweep_batches(key, below, limits)


def _try(trial: StepTrial, graph: CapturedGraph, batch: Batch, report: GraphReport) -> None:
    report.trials += 1
    try:
        certify(trial, lambda: graph)
    except CertificationError as error:
        report.failures.append(Failure(describe(batch), error.difference, error.message))
        report.largest_difference = max(report.largest_difference, error.difference)

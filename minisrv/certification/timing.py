"""The times of steps, measured at start-up on batches made by hand.

Knows: which steps are timed so that the dispatcher can compare graphs, and which so that a cost
model can be fitted. Knows nothing of what follows from the times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from minisrv.certification.batches import Batch, long_batches, short_batch
from minisrv.certification.trial import GREEDY, StepTrial, TrialSpace, reserved_space
from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.core.cost_model import StepSample
from minisrv.core.dispatcher import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage
from minisrv.runner.model_runner import ModelRunner

TIMED_REPLAYS = 5
"""Number of times that a step is timed, unless it takes long."""

ENOUGH_MS = 10.0
"""Number of milliseconds after which a step is not timed again, if it has been timed twice: long
steps vary less, and a start should not take longer than it must."""

SPARSE = 8
"""Ratio of the sizes at which the model of costs knows the time of a step, where graphs are not
timed one by one. Between them it takes the time for linear."""


def time_graphs(runner: ModelRunner, pool: BlockPool) -> dict[GraphKey, StepTime]:
    """Return the duration of a step by every graph, including its epilogue, and of epilogues alone,
    on a greedy batch that leaves little padding."""
    with reserved_space(runner, pool) as space:
        limits = space.limits(runner)
        return {
            key: _time(runner, space, key, short_batch(key[1], limits))
            for key in runner.ladders.keys()  # noqa: SIM118  (not a mapping)
        }


def sample_costs(
    runner: ModelRunner, pool: BlockPool, times: Mapping[GraphKey, StepTime]
) -> list[StepSample]:
    """Return timed steps to which a cost model can be fitted: for each way in which steps run,
    short batches of several sizes, and long ones of one size. The shortest of several measurements
    counts, as a disturbance makes a measurement longer.

    times: the times of all graphs, if they have been measured; their short batches are not timed
        again.
    """
    samples = [
        StepSample(key, time.work, time.min_ms)
        for key, time in times.items()
        if key[1].stage is Stage.MODEL
    ]
    with reserved_space(runner, pool) as space:
        limits = space.limits(runner)
        for keys in _kinds(runner):
            sparse = _sparse(keys)
            batches = [(key, short_batch(key[1], limits)) for key in sparse if key not in times]
            # The largest decode batch is the one whose rows read most; a large prompt takes long.
            long = sparse[0] if sparse[0][1].uniform_decode else sparse[:2][-1]
            batches += [(long, batch) for batch in long_batches(long[1], limits)]
            for key, batch in batches:
                time = _time(runner, space, key, batch)
                samples.append(StepSample(key, time.work, time.min_ms))
    return samples


def _kinds(runner: ModelRunner) -> Iterator[list[GraphKey]]:
    """Yield the keys of steps that run alike, the largest first, for each way in which steps can
    run."""
    ladders = runner.ladders
    by_kind: dict[bool, dict[int, GraphKey]] = {}
    for key in ladders.keys():  # noqa: SIM118  (not a mapping)
        if key[1].stage is Stage.MODEL:
            by_kind.setdefault(key[1].uniform_decode, {})[key[1].num_tokens] = key
    for keys in by_kind.values():
        yield list(keys.values())
    if ladders.eager_sizes:
        yield [(CUDAGraphMode.NONE, BatchDescriptor(size)) for size in ladders.eager_sizes[::-1]]


def _sparse(keys: Sequence[GraphKey]) -> list[GraphKey]:
    """Return the first key, further each that is smaller by `SPARSE` than the one before it, and
    the last."""
    chosen = [keys[0]]
    for key in keys[1:]:
        if key[1].num_tokens * SPARSE <= chosen[-1][1].num_tokens or key is keys[-1]:
            chosen.append(key)
    return chosen


def _time(runner: ModelRunner, space: TrialSpace, key: GraphKey, batch: Batch) -> StepTime:
    """Return the duration of a step with a greedy batch."""
    graph = runner.graphs.get(key)
    trial = StepTrial(runner, space, key, batch, params=[GREEDY])
    found: list[float] = []
    while len(found) < 2 or (len(found) < TIMED_REPLAYS and sum(found) < ENOUGH_MS):
        found.append(trial.time(graph))
    trial.clear()
    return step_time(found, trial.output.work)


def step_time(measured: Sequence[float], work: AttentionWork = NO_WORK) -> StepTime:
    """Return the duration of a step that was measured so often, in milliseconds.

    work: the work of its attention.
    """
    return StepTime(min(measured), median(measured), work)

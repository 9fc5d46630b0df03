"""The times of steps, measured at start-up on batches made by hand.

Knows: which steps are timed so that the dispatcher can compare graphs, and which so that a cost
model can be fitted. Knows nothing of what follows from the times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from minisrv.certification.batches import Batch, long_chunk, long_decodes, plain_batch
from minisrv.certification.trial import GREEDY, StepTrial, TrialSpace, reserved_space
from minisrv.core.attention_work import AttentionWork
from minisrv.core.cost_model import StepSample
from minisrv.core.graph_times import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage
from minisrv.runner.model_runner import ModelRunner

TIMED_REPLAYS = 5
"""Number of times that a step is timed, unless it takes long."""

ENOUGH_MS = 30.0
"""Number of milliseconds after which a step is not timed again, if it has been timed twice: long
steps vary less, and a start should not take longer than it must."""

SPARSE = 8
"""Ratio of the sizes at which the model of costs knows the time of a step, where graphs are not
timed one by one. Between them it takes the time for linear."""

LONG_CHUNK = 2048
"""Maximum number of tokens in a chunk behind a long history. More of them would show the same time
for each, and take longer."""


def time_graphs(runner: ModelRunner, pool: BlockPool) -> dict[GraphKey, StepTime]:
    """Return the duration of a step by every graph that is installed, including its epilogue, and
    of epilogues alone, on a greedy batch that leaves little padding."""
    with reserved_space(runner, pool) as space:
        limits = space.limits(runner)
        return {
            key: _time(runner, space, key, plain_batch(key[1], limits)) for key in runner.graphs
        }


def sample_costs(
    runner: ModelRunner,
    pool: BlockPool,
    keys: Sequence[GraphKey],
    times: Mapping[GraphKey, StepTime],
    long_context: int,
) -> list[StepSample]:
    """Return timed steps to which a cost model can be fitted: steps with short contexts; further
    decode rows with long contexts, and chunks of two sizes behind a long history. The shortest of
    several measurements counts, as a disturbance makes a measurement longer.

    keys: the keys of the steps with short contexts (`cost_keys`), whose graphs are installed.
    times: the times of all graphs, if they have been measured; they are not timed again with short
        contexts.
    long_context: the number of tokens up to the end of the chunks.
    """
    decode = [key for key in keys if key[1].uniform_decode]
    large, small = _long_chunk_keys([key for key in keys if not key[1].uniform_decode])
    with reserved_space(runner, pool) as space:
        limits = space.limits(runner)
        batches = [(key, plain_batch(key[1], limits)) for key in keys if key not in times]
        # Of steps with prefill, contexts take most of the time in small ones.
        batches += [(key, long_decodes(key[1], limits)) for key in (*decode[:1], small)]
        batches += [
            (key, long_chunk(key[1], long_context, limits)) for key in dict.fromkeys((large, small))
        ]
        timed = [(key, _time(runner, space, key, batch)) for key, batch in batches]
    return cost_samples(times) + [StepSample(key, time.work, time.min_ms) for key, time in timed]


def _long_chunk_keys(prefill: Sequence[GraphKey]) -> tuple[GraphKey, GraphKey]:
    """Return two steps with prefill, of which the second is smaller by `SPARSE` or more if there is
    such a step, and the first has at most `LONG_CHUNK` tokens. Attention costs the same in every
    mode, so any modes will do."""
    by_size = sorted(prefill, key=lambda key: key[1].num_tokens, reverse=True)
    large = next((key for key in by_size if key[1].num_tokens <= LONG_CHUNK), by_size[-1])
    most = large[1].num_tokens // SPARSE
    return large, next((key for key in by_size if key[1].num_tokens <= most), by_size[-1])


def cost_samples(times: Mapping[GraphKey, StepTime]) -> list[StepSample]:
    """Return the steps among those that have been timed, without the epilogues."""
    return [
        StepSample(key, time.work, time.min_ms)
        for key, time in times.items()
        if key[1].stage is Stage.MODEL
    ]


def cost_keys(ladders: Ladders) -> list[GraphKey]:
    """Return steps of several sizes for each way in which steps run. Between the sizes a step is
    taken to cost what lies between their costs."""
    return [key for keys in _kinds(ladders) for key in _sparse(keys)]


def _kinds(ladders: Ladders) -> list[list[GraphKey]]:
    """Return the keys of steps that run alike, the largest first: those of pure decode, of which
    there may be none, and then those of each way in which steps with prefill can run."""
    keys = [key for key in ladders.keys() if key[1].stage is Stage.MODEL]  # noqa: SIM118
    # Of each size the last graph is taken, which holds the whole step.
    decode = {key[1].num_tokens: key for key in keys if key[1].uniform_decode}
    mixed = [key for key in keys if not key[1].uniform_decode]
    eager = [(CUDAGraphMode.NONE, BatchDescriptor(size)) for size in ladders.eager_sizes[::-1]]
    if ladders.eager_sizes and ladders.mixed:
        eager.append((CUDAGraphMode.NONE, BatchDescriptor(ladders.mixed[-1] + 1)))
    return [list(decode.values()), *(kind for kind in (mixed, eager) if kind)]


def _sparse(keys: Sequence[GraphKey]) -> list[GraphKey]:
    """Return the first key, further each that is smaller by `SPARSE` than the one before it, and
    the last."""
    chosen: list[GraphKey] = []
    for key in keys:
        if not chosen or key is keys[-1] or key[1].num_tokens * SPARSE <= chosen[-1][1].num_tokens:
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


def step_time(measured: Sequence[float], work: AttentionWork) -> StepTime:
    """Return the duration of a step that was measured so often, in milliseconds.

    work: the work of its attention.
    """
    return StepTime(min(measured), median(measured), work)

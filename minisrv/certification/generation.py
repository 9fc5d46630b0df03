"""The certification of a generation while another one serves, a run at a time.

A generation enters service as a whole, and only if
- its code, run eagerly, gives the log-probabilities of the model's own forward, within a bound;
- each of its graphs reproduces its own eager run bit for bit, as at every start (`compare`);
- its steps take less time, by measurement.
All of this happens in parts of one run each, between which the steps of requests run by the
generation in service. After each part that one is in service again, and the buffers are clean.

Knows: the order of the parts and the bounds. Knows nothing of where a generation's code comes from,
nor of when there is time for a part.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import geometric_mean

import torch
from torch import Tensor

from minisrv.certification.batches import short_batch
from minisrv.certification.compare import InitialState, certify_by_runs
from minisrv.certification.startup import TIMED_REPLAYS
from minisrv.certification.trial import GREEDY, StepTrial, TrialSpace, borrow_space
from minisrv.core.kv_cache import BlockPool
from minisrv.errors import CertificationError
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage
from minisrv.runner.generation import Generation, serving
from minisrv.runner.model_runner import ModelRunner

LARGEST_DIFFERENCE = 1e-4
"""The largest difference allowed between a log-probability of a generation's code and the one of
the model's own forward, in float32."""

TYPICAL_DIFFERENCES = {torch.bfloat16: 0.1, torch.float16: 0.0125}
"""The root mean square allowed for these differences in other dtypes, as a share of the standard
deviation of the log-probabilities. Every operation rounds there, and two codes that round at
different places differ, as the decoder of minisrv and the code of transformers do. float16 has
three bits more."""

COMPARED_ROWS = 16
"""Maximum number of rows of a batch whose log-probabilities are compared; the last row is one."""

LEAST_SPEEDUP = 1.02
"""How many times as fast a new generation must be. A smaller difference is noise of the
measurement."""

Parts = Generator[int, None, None]
"""Work in parts. Before each part it yields the number of tokens of the step that the part runs; 0
means that it waits for blocks of the KV cache."""


def build_generation(
    runner: ModelRunner, pool: BlockPool, new: Generation, compared: Collection[GraphKey]
) -> Parts:
    """Capture every graph of a generation, certify it, and install it in this generation.

    pool: the blocks of the runner's cache, of which free ones that the prefix cache does not find
        are used meanwhile.
    compared: the keys of steps for which the code of the generation is compared with that of the
        generation in service.

    Raises GraphCaptureError, CertificationError, and what the code of the generation raises.
    """
    old = Generation.in_service(runner)
    seen: set[tuple[int, bool]] = set()
    for key in dict.fromkeys([*runner.ladders.keys(), *compared]):
        shape = (key[1].num_tokens, key[1].uniform_decode)
        space = yield from _borrow(runner, pool, key)
        try:
            trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))
            if key in compared and shape not in seen:
                seen.add(shape)
                yield from _compare_code(runner, trial, old, new)
            if key[0] is not CUDAGraphMode.NONE:
                yield from _add_graph(runner, trial, new)
        finally:
            pool.give_back(space.blocks)


def model_keys(runner: ModelRunner) -> list[GraphKey]:
    """Return the keys of every graph that contains the model, the largest of each kind first, and
    of the largest and the smallest step without a graph."""
    sizes = (runner.ladders.max_num_batched_tokens, 1)
    eager = [(CUDAGraphMode.NONE, BatchDescriptor(size)) for size in sizes]
    keys = runner.ladders.keys()
    return [key for key in keys if key[1].stage is Stage.MODEL] + eager


def end_keys(runner: ModelRunner) -> list[GraphKey]:
    """Return the first and the last of each kind of `model_keys`."""
    kinds: dict[tuple[CUDAGraphMode, bool], list[GraphKey]] = {}
    for key in model_keys(runner):
        kinds.setdefault((key[0], key[1].uniform_decode), []).append(key)
    return list(dict.fromkeys(key for keys in kinds.values() for key in (keys[0], keys[-1])))


def _compare_code(runner: ModelRunner, trial: StepTrial, old: Generation, new: Generation) -> Parts:
    """Compare the eager run of the new generation with the one of the old. Raises
    CertificationError."""
    yield trial.key[1].num_tokens
    with _part(runner, trial, old):
        expected = _log_probabilities(trial)
    yield trial.key[1].num_tokens
    with _part(runner, trial, new):
        found = _log_probabilities(trial)
    dtype = runner.buffers.hidden.dtype
    if dtype is torch.float32:
        bound, difference = LARGEST_DIFFERENCE, float((found - expected).abs().max())
    else:
        bound = TYPICAL_DIFFERENCES[dtype]
        difference = float((found - expected).square().mean().sqrt() / expected.std())
    if not difference <= bound:  # not a number is no small difference
        raise CertificationError(
            f"{trial.name}: log-probabilities of the compiled code differ from those of the "
            f"model's own by {difference:.3g}, where {bound:.3g} are allowed.",
            difference=difference,
        )


@torch.no_grad()
def _log_probabilities(trial: StepTrial) -> Tensor:
    """Run the step of a trial eagerly and return the log-probabilities [rows, vocab] behind some of
    its tokens, the last one included."""
    trial.reset(InitialState.CLEAN)
    trial.run(None)
    tokens = trial.output.num_tokens
    rows = range(tokens - 1, -1, -math.ceil(tokens / COMPARED_ROWS))
    logits = trial.runner.model.compute_logits(trial.runner.buffers.hidden[list(rows)])
    return logits.float().log_softmax(dim=-1)


def _add_graph(runner: ModelRunner, trial: StepTrial, new: Generation) -> Parts:
    runs = certify_by_runs(trial, partial(runner.capture, trial.key))
    while True:
        yield trial.key[1].num_tokens
        with _part(runner, trial, new):
            try:
                next(runs)
            except StopIteration as end:
                graph, _ = end.value
                runner.install(trial.key, graph)
                return


def measure_speedup(
    runner: ModelRunner, pool: BlockPool, new: Generation
) -> Generator[int, None, float]:
    """Return how many times as fast the steps of a generation are as those of the generation in
    service: the geometric mean over `end_keys`, of graphs if there are any."""
    old = Generation.in_service(runner)
    keys = end_keys(runner)
    graphs = [key for key in keys if key[0] is not CUDAGraphMode.NONE]
    speedups = []
    for key in graphs or keys:
        space = yield from _borrow(runner, pool, key)
        try:
            batch = short_batch(key[1], space.limits(runner))
            trial = StepTrial(runner, space, key, batch, params=[GREEDY])
            least = {old: math.inf, new: math.inf}
            for _ in range(TIMED_REPLAYS):
                for generation in (old, new):
                    yield key[1].num_tokens
                    with _part(runner, trial, generation):
                        least[generation] = min(
                            least[generation], trial.time(runner.graphs.get(key))
                        )
        finally:
            pool.give_back(space.blocks)
        speedups.append(least[old] / least[new])
    return geometric_mean(speedups)


def _borrow(
    runner: ModelRunner, pool: BlockPool, key: GraphKey
) -> Generator[int, None, TrialSpace]:
    """Borrow blocks for a trial of a graph, and wait until there are any."""
    while (space := borrow_space(runner, pool, key)) is None:
        yield 0
    return space


@contextmanager
def _part(runner: ModelRunner, trial: StepTrial, generation: Generation) -> Iterator[None]:
    """Run one part of a trial by a generation. Those who observe the steps of requests are not told
    of it, and no garbage is collected, which could disturb a capture."""
    observers, collects = list(runner.observers), gc.isenabled()
    runner.observers.clear()
    gc.disable()
    try:
        with serving(runner, generation):
            yield
    finally:
        trial.clear()
        runner.observers[:] = observers
        if collects:
            gc.enable()

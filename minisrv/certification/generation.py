"""The certification of a generation while another one serves, in turns with the steps of requests.

A generation enters service as a whole, and only if
- its code, run eagerly, gives the log-probabilities of the model's own forward, within a bound;
- each of its graphs reproduces its own eager run bit for bit, as at every start (`compare`);
- its steps take less time, by measurement.
All of this makes way for the steps of requests, which run by the generation in service: between two
runs, within a run at each attention op, and at each operation while a tape is recorded or replayed.
A FULL graph that is timed is not interrupted. Meanwhile that generation is in service, and the
buffers are clean; what they held is put back before the run goes on.

Knows: the order of the runs and the bounds. Knows nothing of where a generation's code comes from,
nor of when it is time to make way.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from statistics import geometric_mean
from typing import Protocol

import torch
from torch import Tensor

from minisrv.certification.batches import BatchMaker, plain_batch, short_batch
from minisrv.certification.compare import InitialState, certify
from minisrv.certification.timing import TIMED_REPLAYS, step_time
from minisrv.certification.trial import (
    GREEDY,
    BufferedTrial,
    StepTrial,
    TrialSpace,
    borrow_space,
)
from minisrv.core.graph_times import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.errors import CertificationError
from minisrv.graph.observer import StepObserver
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

LEAST_MS = 1e-3
"""The time below which no step is taken to be, in milliseconds."""

LEAST_SPEEDUP = 1.02
"""How many times as fast a new generation must be. A smaller difference is noise of the
measurement."""


class Turn(Protocol):
    """The time that the work has before the steps of requests go on."""

    @property
    def spare_blocks(self) -> int:
        """The number of free blocks that the work leaves to the requests."""

    @property
    def is_over(self) -> bool:
        """Whether the work has lasted long enough to make way."""

    def begin_part(self, part: str) -> None:
        """Say in words what is done from here on, for those who look for what took long."""

    def make_way(self) -> None:
        """Let steps of requests run, and return when the next turn begins."""

    def wait(self) -> None:
        """Do the same, because there is nothing to do at present."""


class Always:
    """A `Turn` without an end, where no requests run."""

    is_over = False
    spare_blocks = 0

    def begin_part(self, part: str) -> None:
        """See `Turn`."""

    def make_way(self) -> None:
        """See `Turn`."""

    def wait(self) -> None:
        """See `Turn`."""


def build_generation(
    runner: ModelRunner,
    pool: BlockPool,
    new: Generation,
    keys: Collection[GraphKey],
    compared: Collection[GraphKey],
    turn: Turn,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Capture graphs of a generation, certify them, and install them in this generation.

    pool: the blocks of the runner's cache, of which free ones are used meanwhile.
    keys: the keys of the graphs, those of epilogues before those of the steps that they complete.
    compared: the keys of steps for which the code of the generation is compared with that of the
        generation in service.
    on_progress: is called with the number of graphs that have been installed, at each.

    Raises GraphCaptureError, CertificationError, and what the code of the generation raises.
    """
    old = Generation.in_service(runner)
    seen: set[tuple[int, bool]] = set()
    for key in dict.fromkeys([*keys, *compared]):
        shape = (key[1].num_tokens, key[1].uniform_decode)
        with _borrowed_space(runner, pool, key, turn) as space:
            trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))
            if key in compared and shape not in seen:
                seen.add(shape)
                _compare_code(runner, trial, old, new, turn)
            if key in keys:
                _add_graph(runner, trial, new, turn)
                on_progress(sum(map(len, new.graphs)))


def build_graph(runner: ModelRunner, pool: BlockPool, key: GraphKey, turn: Turn) -> None:
    """Capture one graph of the generation in service, certify it, and install it. It serves when
    the dispatcher chooses it.

    Raises GraphCaptureError, CertificationError.
    """
    with _borrowed_space(runner, pool, key, turn) as space:
        trial = StepTrial(runner, space, key, short_batch(key[1], space.limits(runner)))
        _add_graph(runner, trial, Generation.in_service(runner), turn)


def _add_graph(runner: ModelRunner, trial: StepTrial, generation: Generation, turn: Turn) -> None:
    with (
        Visit(runner, trial, generation, turn) as visit,
        nullcontext() if visit.shares_memory else generation.backend.interrupted(visit.make_way),
    ):
        graph = certify(trial, partial(runner.capture, trial.key), between=visit.go_on_with)
        runner.install(trial.key, graph)


def model_keys(ladders: Ladders, keys: Collection[GraphKey]) -> list[GraphKey]:
    """Return those of the keys whose graphs contain the model, and the keys of the largest and the
    smallest step without a graph."""
    sizes = (ladders.max_num_batched_tokens, 1)
    eager = [(CUDAGraphMode.NONE, BatchDescriptor(size)) for size in sizes]
    return [key for key in keys if key[1].stage is Stage.MODEL] + eager


def end_keys(ladders: Ladders) -> list[GraphKey]:
    """Return the largest and the smallest of each kind of `model_keys` of the ladders. They are in
    service whenever others are."""
    kinds: dict[tuple[CUDAGraphMode, bool], list[GraphKey]] = {}
    for key in model_keys(ladders, ladders.keys()):
        kinds.setdefault((key[0], key[1].uniform_decode), []).append(key)
    return list(dict.fromkeys(key for keys in kinds.values() for key in (keys[0], keys[-1])))


def timed_keys(ladders: Ladders) -> list[GraphKey]:
    """Return the keys of the steps by which two generations are compared: `end_keys`, those of
    graphs if there are any."""
    keys = end_keys(ladders)
    return [key for key in keys if key[0] is not CUDAGraphMode.NONE] or keys


def _compare_code(
    runner: ModelRunner, trial: StepTrial, old: Generation, new: Generation, turn: Turn
) -> None:
    """Compare the eager run of the new generation with the one of the old. Raises
    CertificationError."""
    with Visit(runner, trial, old, turn):
        turn.begin_part(f"{trial.name}: the eager run of the code in service")
        expected = _log_probabilities(trial)
    with Visit(runner, trial, new, turn):
        turn.begin_part(f"{trial.name}: the eager run of the new code")
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


def measure_speedup(runner: ModelRunner, pool: BlockPool, new: Generation, turn: Turn) -> float:
    """Return how many times as fast the steps of a generation are as those of the generation in
    service: the geometric mean over `timed_keys`."""
    old = Generation.in_service(runner)
    speedups = []
    for key in timed_keys(runner.ladders):
        with _borrowed_space(runner, pool, key, turn) as space:
            batch = short_batch(key[1], space.limits(runner))
            trial = StepTrial(runner, space, key, batch, params=[GREEDY])
            least = {old: math.inf, new: math.inf}
            for _ in range(TIMED_REPLAYS):
                for generation in (old, new):
                    if key[0] is CUDAGraphMode.FULL:
                        turn.make_way()  # nothing interrupts what is timed, so it begins a turn
                    ms = _time(runner, trial, generation, turn)
                    least[generation] = min(least[generation], ms)
        speedups.append(least[old] / least[new])
    return geometric_mean(speedups)


def time_generation(
    runner: ModelRunner, pool: BlockPool, new: Generation, keys: Collection[GraphKey], turn: Turn
) -> dict[GraphKey, StepTime]:
    """Return what `timing.time_graphs` does, for some steps of a generation, while requests
    run."""
    times = {}
    for key in keys:
        with _borrowed_space(runner, pool, key, turn, plain_batch) as space:
            batch = plain_batch(key[1], space.limits(runner))
            trial = StepTrial(runner, space, key, batch, params=[GREEDY])
            found = [_time(runner, trial, new, turn) for _ in range(TIMED_REPLAYS)]
        times[key] = step_time(found, trial.output.work)
    return times


def _time(runner: ModelRunner, trial: StepTrial, generation: Generation, turn: Turn) -> float:
    """Return the duration of the step of a trial by a generation, in milliseconds, more than 0. One
    in which steps of requests have run is timed again once: on a GPU the host's time of these is
    not quite that by which they have delayed the trial."""
    for _ in range(2):
        with Visit(runner, trial, generation, turn) as visit:
            turn.begin_part(f"{trial.name}: a run that is timed")
            ms = trial.time(runner.graphs.get(trial.key)) - 1000 * visit.seconds_away
        if not visit.seconds_away:
            break
    return max(ms, LEAST_MS)


@contextmanager
def _borrowed_space(
    runner: ModelRunner,
    pool: BlockPool,
    key: GraphKey,
    turn: Turn,
    make_batch: BatchMaker = short_batch,
) -> Iterator[TrialSpace]:
    """Borrow blocks for a trial of a graph for the block; wait until there are any. Requests come
    first: one that needs all blocks could be admitted between two trials only."""
    turn.make_way()
    turn.begin_part(f"the preparation of a trial of {key[0].name} {key[1].num_tokens}")
    while (space := borrow_space(runner, pool, key, make_batch, turn.spare_blocks)) is None:
        turn.wait()
    try:
        yield space
    finally:
        pool.give_back(space.blocks)


class Visit(StepObserver):
    """The block in which a trial runs by a generation, on the runner that serves.

    A new visit makes way first if the turn is over, and so does a run at each piece. If the graphs
    that serve share the memory of the one that is replayed, its intermediates are set aside, or
    where that cannot be the replay is not interrupted. The buffers of compiled code are set aside
    too if it is the code that serves. Those who observe the steps of requests are not told of the
    runs unless they want to be, and no garbage is collected meanwhile, which could disturb a
    capture.

    seconds_away: how long the steps of requests have run during the visit.
    shares_memory: whether the graphs that serve have their intermediates where this one has.
    """

    def __init__(
        self, runner: ModelRunner, trial: BufferedTrial, generation: Generation, turn: Turn
    ) -> None:
        self.seconds_away = 0.0
        self._runner = runner
        self._trial = trial
        self._generation = generation
        self._turn = turn
        self._observers: list[StepObserver] = []
        self._here = ExitStack()
        self.shares_memory = generation.backend is runner.model_step.backend
        program = generation.program
        self._shared: Sequence[Tensor] = ()
        if program is not None and program is runner.model.compiled:
            self._shared = program.buffers

    def __enter__(self) -> Visit:
        if self._turn.is_over:
            self._turn.make_way()
        others = [each for each in self._runner.observers if each.is_told_of_trials]
        self._observers = [self, *others]
        self._come()
        return self

    def __exit__(self, *_: object) -> None:
        self._turn.begin_part(f"{self._trial.name}: the end of the trial")
        self._trial.clear()
        self._here.close()
        self._observers = []  # a circle of references would keep the generation

    def piece(self) -> None:
        """See `StepObserver`."""
        if not (self._trial.is_replayed and self.shares_memory):
            self.make_way()
        elif (intermediates := self._generation.backend.intermediates()) is not None:
            self.make_way(intermediates)

    def make_way(self, *memory: Tensor) -> None:
        """Let steps of requests run if the turn is over.

        memory: what is to be set aside meanwhile besides the buffers.
        """
        if not self._turn.is_over:
            return
        began = time.perf_counter()
        memory = (*memory, *self._shared)
        self._trial.suspend(*memory)
        self._observers = list(self._runner.observers)  # a timer of the run is among them
        self._here.close()
        try:
            self._turn.make_way()
        finally:
            self._come()
        self._trial.resume(*memory)
        self.seconds_away += time.perf_counter() - began

    def go_on_with(self, part: str) -> None:
        """Let steps of requests run if the turn is over, and say what comes next."""
        self.make_way()
        self._turn.begin_part(f"{self._trial.name}: {part}")

    def _come(self) -> None:
        self._here.enter_context(_observed_by(self._observers, self._runner))
        self._here.enter_context(_no_collection())
        self._here.enter_context(serving(self._runner, self._generation))


@contextmanager
def _observed_by(observers: list[StepObserver], runner: ModelRunner) -> Iterator[None]:
    before = list(runner.observers)
    runner.observers[:] = observers
    try:
        yield
    finally:
        runner.observers[:] = before


@contextmanager
def _no_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()

"""Other ladders, while the engine serves: the capture sizes follow the batches that come.

From time to time the steps since the last look are added to what is left of those before, and the
capture sizes that fit them best are computed for as many graphs as there are (`core.ladder_fit`).
If these would save enough, they are proposed, and if the settings say so they come into service:
all graphs of the new ladders are captured, certified and timed beside those that serve, in turns
between the steps of requests, and then take their place as one generation between two steps. Every
batch has its graph throughout, except for those that were quarantined, which are not captured
again. If anything fails on this way, the ladders stay as they are.

Knows: when it is time for a look, and what a proposal must save. Knows nothing of how ladders are
fitted, nor of how a graph is certified (`certification.generation`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import msgspec

from minisrv.certification.generation import build_generation, time_generation
from minisrv.core.batch_counts import BatchCounter, BatchCounts
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.core.ladder_fit import (
    Price,
    cost_of,
    fit_sizes,
    graphs_of,
    padded_share,
    use_of,
    with_sizes,
)
from minisrv.engine.background import Background, Work
from minisrv.engine.compilation import Compilation
from minisrv.engine.filling import LadderFilling
from minisrv.engine.generations import compiled_kernels, freed, predicted_bytes, take_over
from minisrv.engine.memory import mebibytes
from minisrv.engine.messages import RefitReport
from minisrv.engine.step_costs import StepCosts
from minisrv.errors import MinisrvError
from minisrv.graph.backend import GraphBackend
from minisrv.runner.generation import Generation
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

LOOK_SECONDS = 60.0
"""Number of seconds between two looks at the batches."""

REST_SECONDS = 600.0
"""Minimum number of seconds between two proposals in the log, and between two refits."""

LEAST_STEPS = 2000
"""Number of steps since the last look without which there is none: a proposal is to be for traffic,
and not for a moment."""

KEPT = 0.5
"""Share of the weight that steps keep from one look to the next."""

LEAST_GAIN = 0.03
"""Share of the steps' cost that a proposal must save. Less is not worth the capture, and is of the
size in which the traffic of one minute differs from that of the next."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Capture sizes that would fit batches better.

    sizes: ascending.
    ladders: the ladders of these sizes.
    gain: the share of the cost of steps by graphs that they would have saved.
    padding_before, padding: the share of padding in the tokens of these steps, by the ladders in
        service and by these.
    """

    sizes: tuple[int, ...]
    ladders: Ladders
    gain: float
    padding_before: float
    padding: float


def propose(
    ladders: Ladders,
    batches: BatchCounts,
    price: Price,
    most_graphs: int,
    between: Callable[[], None],
) -> Proposal | None:
    """Return the best capture sizes for batches, with at most so many graphs; None if they would
    save less than `LEAST_GAIN`.

    ladders: those in service.
    between: is called where the steps of requests may run.
    """
    fits = fit_sizes(ladders, batches, price, graphs_of(ladders), most_graphs, between)
    if not fits:
        return None
    others = with_sizes(ladders, fits[-1].sizes)
    before, after = (use_of(each, batches, price) for each in (ladders, others))
    gain = 1 - cost_of(after) / cost_of(before) if cost_of(before) else 0.0
    if gain < LEAST_GAIN:
        return None
    return Proposal(fits[-1].sizes, others, gain, padded_share(before), padded_share(after))


class LadderRefit:
    """Looks at the batches of one engine, and proposes other ladders or puts them into service, as
    a work between its steps. No error of it ends the engine.

    costs: what steps cost, and who chooses by it.
    filling: brings the graphs of the ladders in service there; nothing is refitted before that.
    compilation: brings compiled code into service; nothing is refitted before that either.
    counter: counts the batches.
    make_backend: makes the backend of another generation's graphs.
    compile_kernels: compiles the kernels of other ladders; see `generations.compiled_kernels`.
    applies: whether what is proposed is to come into service.
    has_room: whether graphs may take that many bytes more.
    release: returns memory that nobody uses any more to the device.
    clock: returns the time in seconds.
    """

    def __init__(
        self,
        background: Background,
        runner: ModelRunner,
        pool: BlockPool,
        costs: StepCosts,
        filling: LadderFilling,
        compilation: Compilation,
        counter: BatchCounter,
        make_backend: Callable[[], GraphBackend],
        compile_kernels: Callable[[Ladders], Generator[None, None, str]],
        *,
        applies: bool,
        has_room: Callable[[int], bool],
        release: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._turn = background.turn
        self._runner = runner
        self._pool = pool
        self._costs = costs
        self._filling = filling
        self._compilation = compilation
        self._counter = counter
        self._make_backend = make_backend
        self._compile_kernels = compile_kernels
        self._applies = applies
        self._has_room = has_room
        self._release = release
        self._clock = clock
        self._report = RefitReport()
        self._most_graphs = len(runner.ladders.keys())
        self._seen = self._recent = BatchCounts()
        self._looked_at = clock()
        self._rests_until = -math.inf
        self._failed: set[tuple[int, ...]] = set()

    def work(self) -> Work:
        """Look at the batches for as long as the engine serves."""
        while True:
            if not self._is_time():
                self._turn.waits = True
                yield True
                continue
            try:
                yield from self._look()
            except Exception as error:
                what = error.message if isinstance(error, MinisrvError) else f"{error!r}."
                self._refuse(what, None if isinstance(error, MinisrvError) else error)
            except BaseException:
                self._tell(refused="it was interrupted.")
                raise
            yield True

    def _is_time(self) -> bool:
        return (
            self._clock() >= self._looked_at + LOOK_SECONDS
            and not self._compilation.is_under_way
            and self._filling.is_whole
            and self._counter.num_steps - self._seen.num_steps >= LEAST_STEPS
        )

    def _look(self) -> Work:
        """Propose the ladders that fit the latest batches best, if they are better than those in
        service, and apply what is proposed."""
        self._looked_at = began = self._clock()
        seen = self._counter.counts()
        self._recent = seen.plus(self._seen, -1.0).plus(self._recent, KEPT)
        self._seen = seen
        runner, turn, costs = self._runner, self._turn, self._costs
        turn.begin_part("the fit of capture sizes")
        look = partial(
            propose, runner.ladders, self._recent, costs.price, self._most_graphs, turn.offer
        )
        found = yield from turn.take(look)
        if found is None:
            self._tell(sizes=(), gain=0.0)
            return
        self._tell(sizes=found.sizes, gain=found.gain)
        if began < self._rests_until or (self._applies and found.sizes in self._failed):
            return
        self._rests_until = began + REST_SECONDS
        logger.info(
            "the capture sizes %s would save %.1f%% of the steps' %s, with padding of %.1f%% of "
            "the computed tokens in place of %.1f%%: --cudagraph-capture-sizes %s",
            ", ".join(map(str, found.sizes)),
            100 * found.gain,
            "time" if costs.itl_target_ms else "computed tokens",
            100 * found.padding,
            100 * found.padding_before,
            " ".join(map(str, found.sizes)),
        )
        if self._applies:
            yield from self._apply(found, began)

    def _apply(self, found: Proposal, began: float) -> Work:
        """Put proposed ladders into service. Raises what their capture and certification do."""
        runner, pool, turn, costs = self._runner, self._pool, self._turn, self._costs
        self._failed.add(found.sizes)
        if why := (yield from compiled_kernels(self._compile_kernels(found.ladders), turn)):
            self._refuse(f"their kernels could not be compiled: {why}")
            return
        keys = self._filling.without_quarantined(found.ladders.keys())
        needed = predicted_bytes(keys, runner.graphs)
        if not self._has_room(needed):
            self._refuse(f"they may take {mebibytes(needed)}, which the GPU has not left.")
            return
        new = Generation.empty(runner, self._make_backend(), runner.model.compiled, found.ladders)
        yield from turn.take(partial(build_generation, runner, pool, new, keys, (), turn))
        timed = costs.timed_keys_of(found.ladders, keys)
        times = yield from turn.take(partial(time_generation, runner, pool, new, timed, turn))
        old = take_over(runner, new, partial(costs.use_ladders, found.ladders, keys, times))
        self._failed.clear()
        self._report = RefitReport(
            refits=self._report.refits + 1, seconds=round(self._clock() - began, 3)
        )
        self._filling.replaced(self._report)
        logger.info(
            "other ladders serve, with %d graphs, after %.1f s", len(keys), self._report.seconds
        )
        del new
        yield from freed(old, turn, self._release)

    def _refuse(self, why: str, error: Exception | None = None) -> None:
        """Go on with the ladders in service."""
        logger.warning("the proposed capture sizes may not serve: %s", why, exc_info=error)
        self._tell(refused=why)

    def _tell(self, **changes: object) -> None:
        self._report = msgspec.structs.replace(self._report, **changes)
        self._filling.tell(self._report)

"""Verification in service: a share of the steps that run by graphs is run again eagerly on copies,
and a graph that disagrees is taken out of service.

A certification shows that a graph was right on batches made for it, before it served. Here the
batches are those of requests, and what is compared is what the requests get. A step is recorded as
it is launched, and the eager run follows in turns of the work between steps. Until the verdict no
step is launched or retires: no token of the recorded step is sent, and no block that it has used is
free. If the two runs differ,
- the graph is *quarantined*: no further step runs by it, nor is it captured again, and its batches
  run by the next graph that holds them, or eagerly;
- every request that has had a step ends with an error, because what it has may be wrong: the graph
  may have been so for as long as it was not looked at, its tokens have been the input of later
  steps, and it may have written to the cache of others;
- the prefix cache forgets everything, for the same reason. Requests that wait run as usual.

Knows: which steps are verified, and what follows. Knows nothing of how a step is compared
(`certification.shadow`), nor of when it is time for a turn (`background`).
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from minisrv.certification.shadow import (
    StepRecord,
    num_written_blocks,
    take_blocks,
    verify_step,
)
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.engine.background import Background, Work
from minisrv.errors import GraphQuarantinedError
from minisrv.graph.observer import StepObserver, StepPart
from minisrv.modes import CUDAGraphMode, GraphKey, Stage
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

WATCHED_BLOCKS = 32
"""Maximum number of blocks which a verified step must not change, besides those to which it writes:
half of them are of its own rows. They are drawn anew for each step."""

AGREED, DISAGREED, SKIPPED, FAILED = "agreed", "disagreed", "skipped", "failed"
"""What can become of the verification of a step: the eager run gave the same, or not; there were
too few free blocks for it, or other work between steps was not done, so that a later step is
verified in its place; or it failed, as for lack of memory."""

MANY_SKIPPED = 10
"""Number of steps skipped one after the other at which the log says so: under a KV cache that is
always full, none would ever be verified."""

_TOO_FEW = "too few blocks of the KV cache are free; --kv-cache-memory sets its size"


class Verification:
    """Verifies steps of one engine. No error of it ends the engine.

    Each step that runs by graphs is drawn with the same probability. A step that is drawn is not
    recorded while other work between steps has something to do, such as the rest of the ladder,
    while an earlier step is being verified, or without free blocks for its copies. The next step
    that can be recorded then takes its place.

    rate: the probability that a step is drawn, from 0 to 1.
    quarantine: is called with the key of a graph that is to be taken out of service, and why.
    counts: the number of steps by what became of their verification.
    is_pending: whether a step has been launched that is to be verified, or is being verified.
    """

    def __init__(
        self,
        rate: float,
        background: Background,
        runner: ModelRunner,
        scheduler: Scheduler,
        quarantine: Callable[[GraphKey, str], None],
    ) -> None:
        self.counts: dict[str, int] = {}
        self.is_pending = False
        self._rate = rate
        self._background = background
        self._runner = runner
        self._scheduler = scheduler
        self._quarantine = quarantine
        self._draw = random.Random(0)
        self._is_due = False
        self._num_skipped = 0
        """Number of steps that were skipped since one was recorded."""
        self._record: StepRecord | None = None
        self._error: GraphQuarantinedError | None = None
        if rate:
            runner.observers.append(_StepRecorder(self))

    # ---- within steps ------------------------------------------------------------------------

    def stage(self, key: GraphKey, output: SchedulerOutput) -> AbstractContextManager[None] | None:
        """See `StepObserver.stage`."""
        record = self._record
        if record is None or record.output is not output:
            if not self._takes(key, output):
                return None
            try:
                self._record = record = self._begin(output)
            except Exception as error:
                self._fail("of which no record could be begun", error)
                return None
        return self._recorded(record, key)

    @contextmanager
    def _recorded(self, record: StepRecord, key: GraphKey) -> Iterator[None]:
        """Record a stage that is launched in the block. The step goes on without a record if there
        is no memory for that."""
        self._keep(record, record.begin_stage, key)
        yield
        self._keep(record, record.end_stage, key)

    def _keep(self, record: StepRecord, part: Callable[[GraphKey], None], key: GraphKey) -> None:
        if self._record is not record:
            return  # something of it could not be kept
        try:
            part(key)
        except Exception as error:
            self._record = None
            self._fail(record.name, error)

    def launched(self) -> None:
        """Have the step verified that is being recorded, if it has been launched whole."""
        record = self._record
        if record is not None and record.is_complete:
            self._record = None
            if any(graph is not None for _, graph in record.stages):
                self.is_pending = True
                self._background.add(self._verify(record), first=True)

    def _takes(self, key: GraphKey, output: SchedulerOutput) -> bool:
        """Whether a step that is launched now is recorded."""
        is_replayed = key[0] is not CUDAGraphMode.NONE or bool(self._runner.epilogue_step.graphs)
        if not is_replayed or key[1].stage is not Stage.MODEL or output.step_id < 0:
            return False
        is_drawn = self._draw.random() < self._rate
        self._is_due |= is_drawn
        if not self._is_due or self._record is not None:
            return False
        has_blocks = self._has_blocks(output)
        if self._is_background_busy or not has_blocks:
            if is_drawn:
                self._skip("other work between steps is not done" if has_blocks else _TOO_FEW)
            return False
        self._is_due, self._num_skipped = False, 0
        return True

    def _skip(self, why: str) -> None:
        self._count(SKIPPED)
        self._num_skipped += 1
        if self._num_skipped == MANY_SKIPPED:
            logger.warning(
                "%d steps that were to be verified have been skipped one after the other (%s); "
                "minisrv:verified_steps_total counts them, and the next that can be verified is",
                self._num_skipped,
                why,
            )

    def _has_blocks(self, output: SchedulerOutput) -> bool:
        """Whether there are free blocks for the copies of a step, and one that stays free for each
        running request."""
        pool, running = self._scheduler.block_pool, self._scheduler.running
        return num_written_blocks(output, pool.block_size) <= pool.num_free - len(running)

    @property
    def _is_background_busy(self) -> bool:
        """Whether other work between steps has something to do, or is in the middle of something:
        if that waits for blocks which requests hold, it would do so for ever."""
        return self._background.has_work or self._background.is_in_the_middle

    def _begin(self, output: SchedulerOutput) -> StepRecord:
        """Begin the record of a step."""
        named = {request.req_index: request for request in self._scheduler.running}
        tables = {row.req_index: [*named[row.req_index].blocks] for row in output.batch_rows}
        pool, own = self._scheduler.block_pool, [b for table in tables.values() for b in table]
        drawn = self._draw.sample(own, min(len(own), WATCHED_BLOCKS // 2))
        drawn += self._draw.choices(range(1, pool.total), k=WATCHED_BLOCKS // 2)
        return StepRecord(self._runner, output, tables, drawn)

    # ---- between steps -----------------------------------------------------------------------

    def _verify(self, record: StepRecord) -> Work:
        turn, pool = self._background.turn, self._scheduler.block_pool
        blocks = take_blocks(pool, record)
        try:
            verify = partial(verify_step, self._runner, blocks, record, turn)
            found = yield from turn.take(verify)
            if found is None:
                self._count(AGREED)
                return
            self._count(DISAGREED)
            self._withdraw(found.keys, f"in a step of {len(record.rows)} requests {found.what}.")
        except Exception as error:
            self._fail(record.name, error)
        finally:
            pool.give_back(blocks)
            self.is_pending = False

    def _withdraw(self, keys: list[GraphKey], why: str) -> None:
        """Take graphs out of service, and let nobody go on with what they may have spoilt."""
        for key in keys:
            self._quarantine(key, why)
        self._scheduler.block_pool.clear_prefix_cache()
        self._error = GraphQuarantinedError(
            "A graph that may have computed a part of this output has been found to be wrong, and "
            "is out of service; send the request again."
        )

    def take_failures(self) -> list[tuple[str, GraphQuarantinedError]]:
        """Return the requests that have had a step and must end with an error, once, and the
        error."""
        error, self._error = self._error, None
        if error is None:
            return []
        requests = (*self._scheduler.running, *self._scheduler.waiting)
        return [(r.request_id, error) for r in requests if r.prefill_target]

    def _fail(self, name: str, error: Exception) -> None:
        level = logging.DEBUG if FAILED in self.counts else logging.WARNING
        logger.log(level, "a step (%s) could not be verified: %r", name, error)
        self._count(FAILED)

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1


class _StepRecorder(StepObserver):
    """Tells a `Verification` of steps. It does not keep it, nor the engine: the thread of a trial
    keeps the runner, and so its observers."""

    def __init__(self, verification: Verification) -> None:
        self._verification = weakref.ref(verification)

    def stage(self, key: GraphKey, output: SchedulerOutput) -> AbstractContextManager[None] | None:
        """See `StepObserver`."""
        verification = self._verification()
        return None if verification is None else verification.stage(key, output)

    def lap(self, part: StepPart) -> None:
        """See `StepObserver`."""
        verification = self._verification()
        if part is StepPart.LAUNCH and verification is not None:
            verification.launched()

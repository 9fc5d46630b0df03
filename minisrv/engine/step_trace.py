"""The step trace: the last steps of an engine, each with what it ran as, held and took.

It is always on, so what the loop of steps pays for it is a few clock readings and one record; a
record becomes a message when somebody asks, and text in the process that asked. The number of steps
kept is bounded, and so is the number of their rows together. Requests have opaque ids, which nobody
outside can derive; prompts and outputs are not kept.

Knows: what is recorded of a step, and what becomes of the record. Knows nothing of sockets or HTTP.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Any

from minisrv.core.dispatcher import Dispatch
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.engine.messages import EngineInfo
from minisrv.engine.trace_format import AskSteps, Steps, TracedBatch, TracedStep, TraceEvent
from minisrv.graph.observer import StepObserver, StepPart
from minisrv.modes import CUDAGraphMode, GraphKey, StageOutput
from minisrv.nn.model import Model
from minisrv.runner.launches import LaunchCensus

MAX_ROWS = 1 << 20
"""Maximum number of rows of all batches that are kept: 8 bytes each, and the ids of requests."""

MAX_EVENTS = 512
"""Maximum number of events that are kept."""

MAX_IN_FLIGHT = 2
"""Maximum number of steps that have been launched and not retired."""

STEPS_OF_AN_ANSWER = 128
"""Maximum number of steps in one answer, so that steps wait a fraction of a millisecond for it."""

ROWS_OF_AN_ANSWER = 512
"""Maximum number of rows of the batches in one answer, but for those of the first step, so that
their opaque ids take about a millisecond: where prompts come, each step is a batch of its own."""

ID_BYTES = 6
"""Number of bytes of an opaque id: two of a million requests have the same by a chance of 1 to
560."""

_INDEX = {part: index for index, part in enumerate(StepPart)}
_SCHEDULE, _DISPATCH, _FILL, _LAUNCH, _RESULT, _WAIT, _UPDATE, _REST = _INDEX.values()
_WORDS = tuple(part.value for part in StepPart)[:_REST]
_NO_TIME = (0.0,) * (_REST - _FILL)


class _Batch:
    """What the steps of one batch have in common."""

    __slots__ = ("context", "id", "ids", "prefills")

    def __init__(self, step: SchedulerOutput) -> None:
        rows = step.batch_rows
        prefills = rows[step.num_decodes :]
        self.id = step.batch_id
        self.ids = [row.request_id for row in rows]
        self.prefills = [row.num_tokens for row in prefills]
        self.context = step.batch_work.decode_context + sum(
            row.num_computed_tokens + row.num_tokens for row in prefills
        )


class StepTrace(StepObserver):
    """The last steps of one engine, which are told to it in the order of a step: as an observer it
    hears of the parts of the host's time, and passes on to a census what it hears of trials.

    size: the maximum number of steps that are kept.
    scheduler: whose queues are recorded with each step.
    model: the model, whose PIECEWISE graphs break at each of its attention layers.
    info: the description of the engine; a change of it is an event (`note`).
    census: knows the launches of stages without a graph.
    """

    is_told_of_trials = True

    def __init__(
        self, size: int, scheduler: Scheduler, model: Model, info: EngineInfo, census: LaunchCensus
    ) -> None:
        self._size = size
        self._scheduler = scheduler
        self._piecewise_launches = 2 * len(model.attention_layers) + 1
        self._info = info
        self._census = census
        self._key = os.urandom(16)
        self._ring: list[TracedStep | None] = [None] * size
        self._dispatches: list[Dispatch | None] = [None] * (size + MAX_IN_FLIGHT)
        self._first = self._end = 0
        self._batches: dict[int, _Batch] = {}
        self._num_rows = 0
        self._events: deque[TraceEvent] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self._shared = [0.0] * len(_INDEX)
        self._laps_of = [self._shared] * len(_INDEX)
        """For each part the list of milliseconds to which it is added, at its index: that of the
        step that was launched last, or the one that all steps share."""
        self._laps_in_flight: deque[list[float]] = deque()
        self._last_lap = self._last_retired = time.perf_counter()
        self._was_busy = False
        self._num_preemptions = 0

    # ---- the loop of steps -------------------------------------------------------------------

    def lap(self, part: StepPart) -> None:
        """See `StepObserver`. The parts from its launch on belong to the step that was launched
        last, whichever step is retired next."""
        now = time.perf_counter()
        index = _INDEX[part]
        self._laps_of[index][index] += 1000 * (now - self._last_lap)
        self._last_lap = now

    def stage(self, key: GraphKey, output: SchedulerOutput) -> AbstractContextManager[None] | None:
        """See `StepObserver`. Steps of requests, whose ids are not negative, are not counted."""
        return None if output.step_id >= 0 else self._census.stage(key, output)

    def launch(self, step: SchedulerOutput, dispatch: Dispatch, generation: int) -> TracedStep:
        """Return the record of a step that is about to be launched, which `retire` completes."""
        batch = self._batches.get(step.batch_id)
        if batch is None:
            batch = self._batches[step.batch_id] = _Batch(step)
            self._num_rows += len(batch.ids)
        shared, descriptor, epilogue = self._shared, dispatch.descriptor, dispatch.epilogue
        laps = [shared[_SCHEDULE], shared[_DISPATCH], *_NO_TIME]
        shared[_SCHEDULE] = shared[_DISPATCH] = 0.0
        laps_of = self._laps_of
        laps_of[_FILL] = laps_of[_LAUNCH] = laps_of[_RESULT] = laps
        self._laps_in_flight.append(laps)
        if not self._was_busy:
            so_far = laps[_SCHEDULE] + laps[_DISPATCH]
            self._last_retired, self._was_busy = self._last_lap - so_far / 1000, True
        preemptions = self._scheduler.num_preemptions
        preempted, self._num_preemptions = preemptions - self._num_preemptions, preemptions
        self._dispatches[step.step_id % len(self._dispatches)] = dispatch
        tokens, rows, rung = step.num_tokens, len(batch.ids), descriptor.num_tokens
        record = TracedStep(
            step.step_id,
            time.time(),
            dispatch.mode.name,
            dispatch.reason.value,
            rung,
            descriptor.num_reqs,
            tokens,
            rung - tokens,
            rows,
            step.num_decodes,
            tokens - step.num_decodes,
            batch.context + step.position_offset * rows,
            descriptor.output.name,
            None if epilogue is None else epilogue[1].num_tokens,
            None if epilogue is None else epilogue[1].output.name,
            generation,
            None,
            None,
            None if step.budget_reason is None else step.budget_reason.value,
            {},
            step.batch_id,
        )
        record.preempted = preempted
        return record

    def rest(self) -> None:
        """Say that the last request has ended: the time from here on belongs to no step."""
        self._was_busy = False

    def retire(
        self, step: TracedStep, predicted_ms: float | None, measured_ms: float, sampled: int
    ) -> None:
        """Complete the record of the oldest step in flight, and keep it.

        sampled: the number of tokens that it added to requests.
        """
        now, scheduler, shared = time.perf_counter(), self._scheduler, self._shared
        laps = self._laps_in_flight.popleft()
        laps[_WAIT], laps[_UPDATE] = shared[_WAIT], shared[_UPDATE]
        shared[_WAIT] = shared[_UPDATE] = 0.0
        step.host_ms = dict(zip(_WORDS, laps, strict=True))
        step.predicted_ms = predicted_ms
        step.measured_ms = measured_ms
        step.wall_ms = 1000 * (now - self._last_retired)
        self._last_retired = now
        step.sampled = sampled
        step.running = len(scheduler.running)
        step.waiting = len(scheduler.waiting) + len(scheduler.waiting_for_grammar)
        step.kv_used = scheduler.block_pool.num_used
        if self._end - self._first == self._size:
            self._drop_first(step)
        self._ring[step.id % self._size] = step
        self._end = step.id + 1
        while self._num_rows > MAX_ROWS and self._first < step.id:
            self._drop_first(step)

    def _drop_first(self, newest: TracedStep) -> None:
        """Forget the oldest step, and its batch if it was the last of its steps; those come one
        after the other."""
        dropped = self._ring[self._first % self._size]
        self._ring[self._first % self._size] = None
        self._first += 1
        following = self._ring[self._first % self._size] or newest
        assert dropped is not None, "every step between the first and the last is kept"
        if following.batch != dropped.batch:
            self._num_rows -= len(self._batches.pop(dropped.batch).ids)

    # ---- events ------------------------------------------------------------------------------

    def note(self, info: EngineInfo) -> None:
        """Record as events what has changed in the description of the engine."""
        before, self._info = self._info, info
        ladder, compilation = info.ladder, info.compilation
        served = {"graphs": ladder.graphs, "total": ladder.total, "in_service": ladder.sizes}
        if ladder.refit.refits != before.ladder.refit.refits:
            self._add("refit", ladders=info.ladders, seconds=ladder.refit.seconds, **served)
        elif ladder.graphs > before.ladder.graphs:
            self._add("graph_captured", **served)
        for graph in ladder.refused.keys() - before.ladder.refused.keys():
            self._add("refused", graph=graph, reason=ladder.refused[graph])
        for graph in ladder.quarantined.keys() - before.ladder.quarantined.keys():
            self._add("quarantine", graph=graph, reason=ladder.quarantined[graph], **served)
        if compilation.state != before.compilation.state:
            state = compilation.state.value
            self._add("compilation", state=state, reason=compilation.reason)
        if compilation.generation != before.compilation.generation:
            self._add("swap", generation=compilation.generation)
        if info.sleep.is_asleep != before.sleep.is_asleep:
            if info.sleep.is_asleep:
                self._add("sleep", level=info.sleep.level, seconds=info.sleep.sleep_seconds)
            else:
                self._add("wake", seconds=info.sleep.wake_up_seconds)

    def _add(self, event: str, **details: Any) -> None:
        number, after = self._num_events, self._end - 1
        self._events.append(TraceEvent(number, after, time.time(), event, details))
        self._num_events += 1

    # ---- those who read ----------------------------------------------------------------------

    def opaque_id(self, request_id: str) -> str:
        """Return the id by which a trace names a request."""
        return blake2b(request_id.encode(), key=self._key, digest_size=ID_BYTES).hexdigest()

    def read(self, ask: AskSteps) -> Steps:
        """Return the steps that a reader asks for, or the first of them, with the events among
        them. A reader that names a step which has not been retired, such as one of an earlier
        start, gets the last steps."""
        after = ask.after
        if after is None or after >= self._end:
            after = self._end - 1 - ask.limit
        begin = max(after + 1, self._first)
        end = min(self._end, begin + min(ask.limit, STEPS_OF_AN_ANSWER))
        found: list[TracedStep] = []
        batches: dict[int, _Batch] = {}
        num_rows = 0
        for number in range(begin, end):
            step = self._ring[number % self._size]
            assert step is not None, "every step between the first and the last is kept"
            if step.batch not in batches:
                num_rows += step.rows
                if found and num_rows > ROWS_OF_AN_ANSWER:
                    end = number
                    break
                batches[step.batch] = self._batches[step.batch]
            self._count_launches(step)
            found.append(step)
        events = [
            event
            for event in self._events
            if event.number > ask.events_after and begin - 1 <= event.after < max(begin, end)
        ]
        return Steps(
            self._first,
            self._end,
            found,
            [TracedBatch(batch.id, self._requests(batch)) for batch in batches.values()],
            events,
        )

    def _requests(self, batch: _Batch) -> list[tuple[str, int]]:
        decodes = len(batch.ids) - len(batch.prefills)
        tokens = [*[1] * decodes, *batch.prefills]
        return list(zip(map(self.opaque_id, batch.ids), tokens, strict=True))

    def _count_launches(self, step: TracedStep) -> None:
        """Fill in the launches of a step from the host, and those that its graphs stand for, as far
        as they are known. Behind logits operations are launched one by one."""
        dispatch = self._dispatches[step.id % len(self._dispatches)]
        assert dispatch is not None, "the dispatch of a step is kept as long as the step"
        stages = dispatch.stages
        is_graph = all(mode is not CUDAGraphMode.NONE for mode, _ in stages)
        if not is_graph or stages[-1][1].output is StageOutput.LOGITS:
            return
        step.launches = len(stages)
        if step.mode == CUDAGraphMode.PIECEWISE.name:
            step.launches += self._piecewise_launches - 1
        replaced = [self._census.count(descriptor, step.generation) for _, descriptor in stages]
        known = [count for count in replaced if count is not None]
        step.launches_replaced = sum(known) if len(known) == len(stages) else None

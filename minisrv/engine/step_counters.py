"""The counters of an engine's steps: by mode and reason, by the size of their graph, by the number
of their tokens and the reason for that of their prompt tokens, and by request; their times, and by
how much these differed from the predicted ones; and when each request came and had its first step.

Knows: what is counted of a step, and that the trace and the cost model are told of it too. Knows
nothing of how a step is made or run, nor of who reads the counts.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from minisrv.core.batch_counts import BatchCounter, BatchCounts
from minisrv.core.budget import PrefillBudget
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import ScheduledRow, SchedulerOutput
from minisrv.engine.messages import (
    BatchCount,
    BudgetCount,
    EngineStats,
    Histogram,
    SizeCount,
    StepCount,
)
from minisrv.engine.step_trace import StepTrace
from minisrv.engine.trace_format import TracedStep
from minisrv.modes import BudgetReason, CUDAGraphMode
from minisrv.request import EngineOutput, EngineRequest, GraphStats
from minisrv.runner.results import DeviceTime

ERROR_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Upper bounds of the buckets for relative errors of predicted times."""
TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the buckets for numbers of tokens of a step, which are vLLM's."""


class _Course:
    """The way of a request that asks about it through the steps, as far as it has come; see
    `GraphStats`."""

    __slots__ = (
        *("admissions", "cached_tokens", "first_token", "generations", "padded_tokens", "rungs"),
    )

    def __init__(self) -> None:
        self.first_token: float | None = None
        self.admissions = self.cached_tokens = self.padded_tokens = 0
        self.rungs: Counter[str] = Counter()
        self.generations: set[int] = set()

    def admit(self, row: ScheduledRow) -> None:
        """Note that the request gets its first step, or its first one since it was preempted."""
        if not self.admissions:
            self.cached_tokens = row.num_computed_tokens
        self.admissions += 1

    def stats(self, opaque_id: str | None, queued_at: float, scheduled_at: float) -> GraphStats:
        """Return the numbers about a request that ends now."""
        now = time.perf_counter()
        launched = scheduled_at or now
        first_token = now if self.first_token is None else self.first_token
        waits = (launched - queued_at, first_token - launched, now - first_token)
        queue_ms, prefill_ms, decode_ms = (round(1000 * seconds, 3) for seconds in waits)
        return GraphStats(
            id=opaque_id,
            padded_tokens=self.padded_tokens,
            rungs=dict(self.rungs),
            queue_ms=queue_ms,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            preemptions=max(0, self.admissions - 1),
            cached_tokens=self.cached_tokens,
            generations=sorted(self.generations),
        )


class _Open:
    """A request that has not ended.

    queued_at: when it came.
    scheduled_at: when it had its first step; 0 before that.
    steps: the number of its steps by mode and reason.
    course: its way through the steps, if it asks about it.
    """

    __slots__ = ("course", "queued_at", "scheduled_at", "steps")

    def __init__(self, course: _Course | None) -> None:
        self.queued_at = time.perf_counter()
        self.scheduled_at = 0.0
        self.steps: dict[str, int] = {}
        self.course = course


class StepCounters:
    """Counts steps since the start of the engine, and the steps of each open request.

    The modes in which a request's steps ran are counted by "MODE/reason", to which "/compiled" is
    added for steps by compiled code. The steps of one batch are counted once, for all of its rows,
    and written to each request when another batch comes or a request ends. More is counted only of
    requests that ask for it.

    batches: counts the steps by the sizes of their batches.
    cost_model, budget: the model that learns from the times of steps if the budget has a target.
    trace: keeps a record of each step; None for no trace.
    has_clock: whether the device measures the time of its own work.
    """

    def __init__(
        self,
        batches: BatchCounter,
        cost_model: CostModel,
        budget: PrefillBudget,
        trace: StepTrace | None = None,
        *,
        has_clock: bool = False,
    ) -> None:
        self._batches = batches
        self.cost_model = cost_model
        self._budget = budget
        self._has_clock = has_clock
        self._gpu_busy_ms = self._gpu_idle_ms = 0.0
        self._prompt_tokens = self._prefill_tokens = self._generated_tokens = 0
        self._compiled_steps = 0
        self._steps: dict[tuple[str, str], list[int]] = {}
        self._sizes: dict[tuple[bool, int], list[int]] = {}
        """Steps and padding tokens, by whether the batch only decodes and the size of the graph."""
        self._budgets: dict[BudgetReason, list[int]] = {}
        self._errors = [0] * (len(ERROR_BOUNDS) + 1)
        self._total_error = 0.0
        self._open: dict[str, _Open] = {}
        self._num_courses = 0
        self._begun: dict[str, _Open] = {}
        """The requests that have had a step and no output."""
        self._batch_id: int | None = None
        self._rows: list[ScheduledRow] = []
        self._pending: dict[str, int] = {}
        self._pending_rungs: dict[tuple[str, int, int], list[int]] = {}
        """The number of steps and of padding tokens by mode, rung and generation, while any request
        asks for them."""
        self._trace = trace
        self._generated_before = 0

    def open(self, request: EngineRequest) -> None:
        """Register a request that comes now."""
        self._prompt_tokens += len(request.prompt_token_ids)
        self._open[request.request_id] = _Open(_Course() if request.include_graph_stats else None)
        self._num_courses += request.include_graph_stats

    def count(
        self, step: SchedulerOutput, dispatch: Dispatch, *, generation: int
    ) -> TracedStep | None:
        """Count a step that is launched, and return its record, if there is a trace.

        generation: the generation that runs it; see `CompilationReport`.
        """
        compiled = generation > 0
        mode, reason = dispatch.mode.name, dispatch.reason.value
        counts = self._steps.setdefault((mode, reason), [0, 0, 0])
        counts[0] += 1
        counts[1] += step.num_tokens
        descriptor = dispatch.descriptor
        num_padded = descriptor.num_tokens - step.num_tokens
        counts[2] += num_padded
        if dispatch.mode is not CUDAGraphMode.NONE:
            key_of_size = descriptor.query_len is not None, descriptor.num_tokens
            of_size = self._sizes.setdefault(key_of_size, [0, 0])
            of_size[0] += 1
            of_size[1] += num_padded
        decode = step.query_len is not None
        self._batches.count(step.num_tokens, step.num_rows, decode=decode)
        num_prefill_tokens = step.num_tokens - step.num_decodes
        self._prefill_tokens += num_prefill_tokens
        if step.budget_reason is not None:
            budget = self._budgets.setdefault(step.budget_reason, [0, 0])
            budget[0] += 1
            budget[1] += num_prefill_tokens
        self._compiled_steps += compiled
        if step.new_reqs:
            self._note_admissions(step)
        if step.batch_id != self._batch_id:
            self._write()
            self._batch_id, self._rows = step.batch_id, step.batch_rows
        key = f"{mode}/{reason}{'/compiled' if compiled else ''}"
        self._pending[key] = self._pending.get(key, 0) + 1
        if self._num_courses:
            rung = mode, descriptor.num_tokens, generation
            counts = self._pending_rungs.setdefault(rung, [0, 0])
            counts[0] += 1
            counts[1] += num_padded
        return None if self._trace is None else self._trace.launch(step, dispatch, generation)

    def _note_admissions(self, step: SchedulerOutput) -> None:
        """Note who gets the first step, or the first one since a preemption."""
        now = time.perf_counter()
        admitted = {new.req_index for new in step.new_reqs}
        for row in step.batch_rows[step.num_decodes :]:  # no request begins with a decode row
            if row.req_index in admitted:
                request = self._open[row.request_id]
                if not request.scheduled_at:
                    request.scheduled_at = now
                    self._begun[row.request_id] = request
                if request.course is not None:
                    request.course.admit(row)

    def count_outputs(self, outputs: Iterable[EngineOutput]) -> None:
        """Count the tokens of outputs. Add to the first output of a request when it came and when
        it had its first step, and to its last one the counts of its steps; then forget it."""
        for output in outputs:
            self._generated_tokens += len(output.token_ids)
            if self._begun and output.request_id in self._begun:
                begun = self._begun.pop(output.request_id)
                output.queued_at, output.scheduled_at = begun.queued_at, begun.scheduled_at
            if output.finish_reason is not None:
                self.close(output)

    def retire(
        self,
        step: SchedulerOutput,
        dispatch: Dispatch,
        record: TracedStep | None,
        taken: DeviceTime,
        *,
        had_work_throughout: bool,
    ) -> None:
        """Count the time of the oldest step in flight, let the cost model learn from it if there is
        a target, and complete its record. A step that waits for the host between its stages is no
        example of any other, nor is one for which the clock is too coarse.

        had_work_throughout: whether there has been work ever since the step before it.
        """
        if self._has_clock:
            self._gpu_busy_ms += taken.busy_ms
            if had_work_throughout and taken.idle_ms is not None:
                self._gpu_idle_ms += taken.idle_ms
        predicted_ms = None
        waits_for_host = step.needs_logits or step.has_structured_output_requests
        if self._budget.has_target and not waits_for_host and taken.busy_ms > 0:
            sample = StepSample(dispatch.key, step.work, taken.busy_ms)
            if predicted_ms := self.cost_model.predict(sample.key, sample.work):
                error = abs(predicted_ms / taken.busy_ms - 1)
                self._errors[bisect_left(ERROR_BOUNDS, error)] += 1
                self._total_error += error
            self.cost_model.observe(sample)
        if self._num_courses:
            self._note_first_tokens(step)
        if self._trace is not None and record is not None:
            sampled = self._generated_tokens - self._generated_before
            self._generated_before = self._generated_tokens
            self._trace.retire(record, predicted_ms or None, taken.busy_ms, sampled)

    def _note_first_tokens(self, step: SchedulerOutput) -> None:
        for row in step.batch_rows[step.num_decodes :]:
            request = self._open.get(row.request_id)
            course = None if request is None else request.course
            if course is not None and row.samples_token and course.first_token is None:
                course.first_token = time.perf_counter()

    def close(self, output: EngineOutput) -> None:
        """Add the counts of a request to its last output, and forget it. They include a step that
        is still in flight, whose token is dropped."""
        self._write()
        request = self._open.pop(output.request_id)
        if self._trace is not None and not self._open:
            self._trace.rest()
        output.graph_steps = request.steps
        if request.course is not None:
            self._num_courses -= 1
            trace = self._trace
            opaque_id = None if trace is None else trace.opaque_id(output.request_id)
            output.graph_stats = request.course.stats(
                opaque_id, request.queued_at, request.scheduled_at
            )

    def stats(self) -> EngineStats:
        """Return a snapshot that has all that is counted here, and nothing else."""
        batches = self._batches.counts()
        kinds = (("decode", batches.decode), ("mixed", batches.mixed))
        return EngineStats(
            prompt_tokens=self._prompt_tokens,
            prefill_tokens=self._prefill_tokens,
            gpu_busy_ms=self._gpu_busy_ms,
            gpu_idle_ms=self._gpu_idle_ms,
            generated_tokens=self._generated_tokens,
            steps=[StepCount(*key, *counts) for key, counts in self._steps.items()],
            sizes=[
                SizeCount("decode" if decodes else "mixed", size, *counts)
                for (decodes, size), counts in self._sizes.items()
            ],
            batches=[
                BatchCount(kind, size, int(steps))
                for kind, sizes in kinds
                for size, steps in sorted(sizes.items())
            ],
            compiled_steps=self._compiled_steps,
            budgets=[BudgetCount(why.value, *counts) for why, counts in self._budgets.items()],
            step_time_errors=Histogram(ERROR_BOUNDS, tuple(self._errors), self._total_error),
            tokens_of_steps=self._tokens_of_steps(batches),
        )

    def _tokens_of_steps(self, batches: BatchCounts) -> Histogram:
        """Return the numbers of real tokens of steps: one of each request that decodes, and the
        size of any other batch. No size is rounded over the bound of a bucket."""
        counts = [0] * (len(TOKEN_BOUNDS) + 1)
        for sizes in (batches.decode, batches.mixed):
            for size, steps in sizes.items():
                counts[bisect_left(TOKEN_BOUNDS, size)] += int(steps)
        return Histogram(TOKEN_BOUNDS, tuple(counts), sum(step[1] for step in self._steps.values()))

    def _write(self) -> None:
        if not self._pending:
            return
        for row in self._rows:
            request = self._open.get(row.request_id)
            if request is None:  # it has ended
                continue
            for key, steps in self._pending.items():
                request.steps[key] = request.steps.get(key, 0) + steps
            course = request.course
            if course is None:
                continue
            for (mode, rung, generation), (steps, padding) in self._pending_rungs.items():
                course.padded_tokens += padding
                course.generations.add(generation)
                if mode != CUDAGraphMode.NONE.name:
                    course.rungs[f"{mode}/{rung}"] += steps
        self._pending, self._pending_rungs = {}, {}

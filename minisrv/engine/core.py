"""The step loop without a process around it: requests in, tokens out.

Knows: the order of a step (schedule, dispatch, run, update) with no or one step launched ahead.
Tells what it counts of every step to `StepCounters`. Knows nothing of how its parts are made, nor
of sockets, text or HTTP.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import msgspec

from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import SchedulerOutput
from minisrv.engine.builder import EngineParts
from minisrv.engine.messages import EngineInfo, EngineStats
from minisrv.engine.step_counters import StepCounters
from minisrv.engine.trace_format import TracedStep
from minisrv.errors import EngineDeadError, MinisrvError
from minisrv.graph.observer import StepPart
from minisrv.request import EngineOutput, EngineRequest, RequestFailure
from minisrv.runner.results import StepResult
from minisrv.validation import check_tokens_are_left, validate_request

GRAMMAR_SECONDS = 0.01
"""Number of seconds for which a step that has nothing to run waits for a grammar to be compiled,
before it looks for requests again."""


@dataclass(slots=True)
class _InFlight:
    """A launched step and the data needed to retire it.

    record: what the trace keeps of it.
    result: None while its epilogue has not been launched.
    had_work_throughout: whether there has been work ever since the step before it, so that the time
        between the two is time in which the device waited for the host.
    """

    output: SchedulerOutput
    dispatch: Dispatch
    had_work_throughout: bool
    record: TracedStep | None
    result: StepResult | None = None


class EngineCore:
    """An engine, made of the parts that `builder.build_engine` returns."""

    def __init__(self, parts: EngineParts) -> None:
        self.config = parts.config
        self.scheduler = parts.scheduler
        self.dispatcher = parts.dispatcher
        self.cost_model = parts.cost_model
        self.runner = parts.runner
        self.info = parts.info
        self.background = parts.background
        self.compilation = parts.compilation
        self.filling = parts.filling
        self.verification = parts.verification
        self.observers = parts.runner.observers
        self.sleeper = parts.sleeper
        self._grammars = parts.grammars
        self._told = self.compilation.report, self.filling.report
        self._steps_ahead = int(parts.config.async_scheduling)
        self._interrupted = self._had_work_throughout = self._runs = False
        self._in_flight: deque[_InFlight] = deque()
        self._seeds = random.Random(parts.config.seed)
        self.step_trace = parts.step_trace
        self.counters = StepCounters(
            parts.batches,
            parts.cost_model,
            parts.scheduler.budget,
            parts.step_trace,
            has_clock=parts.config.kind.has_clock,
        )

    # ---- requests ----------------------------------------------------------------------------

    def check(self, request: EngineRequest) -> None:
        """Raise RequestError or ContextLengthError for a request that can never be served."""
        params, info = request.params, self.info
        validate_request(
            request.prompt_token_ids,
            params,
            max_tokens=params.max_tokens,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
        )
        check_tokens_are_left(params, info.vocab_size, self.scheduler.eos_token_ids)

    def add(self, request: EngineRequest) -> None:
        """Queue a request, or raise what `check` does, QueueFullError or EngineAsleepError."""
        self.sleeper.check_awake()
        self.check(request)
        seed, grammar = request.params.seed, request.structured_output
        had_work = self.scheduler.has_work
        self.scheduler.add(
            request,
            self._seeds.getrandbits(63) if seed is None else seed,
            waiting_for_grammar=grammar is not None,
        )
        if grammar is not None:
            self._grammars.compile(request.request_id, grammar, request.params)
        self._had_work_throughout &= had_work
        self.counters.open(request)

    @property
    def has_room(self) -> bool:
        """Whether `add` would find room in the queue."""
        return self.scheduler.has_room

    def abort(self, request_id: str) -> EngineOutput | None:
        """Abort a request and return its last output; None if it has ended already."""
        output = self.scheduler.abort(request_id)
        if output is not None:
            self._count_outputs([output])
        return output

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""
        return self.scheduler.has_work or bool(self._in_flight)

    # ---- between steps -----------------------------------------------------------------------

    def advance_background(self) -> bool:
        """Give the work between steps a turn if it is time for one, and return whether `describe`
        says something else than at the last call. While the engine sleeps there is no memory to
        work with. Where no request can run, as a trial holds the blocks, the trial is not to wait
        for their steps."""
        if self.sleeper.report.is_asleep:
            return False
        busy, running = self._runs and self.has_work, len(self.scheduler.running)
        self.background.advance(busy=busy, running=running)
        told, self._told = self._told, (self.compilation.report, self.filling.report)
        return told != self._told

    # ---- steps -------------------------------------------------------------------------------

    def step(self) -> list[EngineOutput]:
        """Launch as many steps as may be in flight, retire the oldest one, and return what it
        added.

        Any interruption of a step, Ctrl-C included, leaves requests, device and host inconsistent:
        the engine refuses to continue after it (EngineDeadError).
        """
        if self._interrupted:
            raise EngineDeadError("a step was interrupted; make a new engine.")
        self._interrupted = True
        outputs = self._step()
        self._interrupted = False
        return outputs

    def _step(self) -> list[EngineOutput]:
        if self.verification.is_pending:  # it ends also for a caller who gives no turns
            self.background.advance(busy=False, running=len(self.scheduler.running))
        self._lap(StepPart.REST)
        failed = [self._end_with_error(*spoilt) for spoilt in self.verification.take_failures()]
        failed += self._queue_compiled() if self._grammars.compiling else []
        while self._may_launch:
            output = self.scheduler.schedule()
            self._lap(StepPart.SCHEDULE)
            if output is None:
                break
            self._launch(output)
        self._runs = bool(self._in_flight) and not self.verification.is_pending
        if not self._runs:
            if self._grammars.compiling and not failed:
                self._grammars.wait(GRAMMAR_SECONDS)
            return failed
        step = self._in_flight.popleft()
        result = step.result
        assert result is not None, "the oldest step is launched whole"
        tokens = result.tokens()
        self._lap(StepPart.WAIT)
        outputs = self.scheduler.update(step.output.step_id, tokens)
        self._lap(StepPart.UPDATE)
        errors: dict[str, MinisrvError] = {}
        if step.output.has_structured_output_requests:
            errors = self._grammars.accept_tokens(outputs)
        if result.logprobs is not None:
            result.logprobs.add_to(outputs, step.output)
        self._count_outputs(outputs)
        self.counters.retire(
            step.output,
            step.dispatch,
            step.record,
            result.device_time(),
            had_work_throughout=step.had_work_throughout,
        )
        if errors:
            outputs = [output for output in outputs if output.request_id not in errors]
            failed += [self._end_with_error(*failure) for failure in errors.items()]
        if self._masks_pending:
            self._sample(self._in_flight[0])
        return failed + outputs

    @property
    def _may_launch(self) -> bool:
        """Whether another step may be launched now. None is while one is being verified: a trial
        between its stages would take the buffers from it."""
        ahead = len(self._in_flight)
        waits = self._masks_pending or self.verification.is_pending
        return ahead <= self._steps_ahead and not waits

    def _lap(self, part: StepPart) -> None:
        for observer in self.observers:
            observer.lap(part)

    @property
    def _masks_pending(self) -> bool:
        """Whether the epilogue of the youngest step has to wait, because the tokens that a grammar
        allows in one of its rows depend on a token that an earlier step samples. Its model runs
        meanwhile; only steps that contain such a row wait."""
        return bool(self._in_flight) and self._in_flight[-1].result is None

    def _queue_compiled(self) -> list[EngineOutput]:
        """Let requests run whose grammars have been compiled, and return the last outputs of those
        whose grammars could not be."""
        failed = []
        for request_id, error in self._grammars.pop_compiled():
            if error is None:
                self.scheduler.grammar_ready(request_id)
            else:
                failed.append(self._end_with_error(request_id, error))
        return failed

    def _end_with_error(self, request_id: str, error: MinisrvError) -> EngineOutput:
        """End a request with an error, also if this step has ended it for another reason."""
        self.abort(request_id)
        return EngineOutput(request_id=request_id, error=RequestFailure.of(error))

    def _launch(self, output: SchedulerOutput) -> None:
        dispatch = self.dispatcher.dispatch(
            output.num_tokens,
            output.num_rows,
            query_len=output.query_len,
            needs_logits=output.needs_logits,
            has_structured_output_requests=output.has_structured_output_requests,
        )
        if dispatch.missing:
            self.filling.want(dispatch.missing)
        self._lap(StepPart.DISPATCH)
        record = self.counters.count(output, dispatch, generation=self.compilation.generation)
        step = _InFlight(output, dispatch, self._had_work_throughout, record)
        self._had_work_throughout = True
        self._lap(StepPart.REST)
        self.runner.execute_model(output, dispatch)
        if not (output.has_structured_output_requests and self._in_flight):
            self._sample(step)
        self._in_flight.append(step)

    def _sample(self, step: _InFlight) -> None:
        """Launch the rest of a step whose model has been launched."""
        step.result = self.runner.sample_tokens(step.output, step.dispatch)

    def _count_outputs(self, outputs: list[EngineOutput]) -> None:
        """Count the tokens of outputs. Add the counts of its steps to the last output of a request,
        and forget the request."""
        self.counters.count_outputs(outputs)
        for output in outputs:
            if output.finish_reason is not None:
                self._grammars.remove(output.request_id)

    def describe(self) -> EngineInfo:
        """Return the description of the engine as it is now: it may sleep, run other code, or have
        more graphs or other ladders than at its start."""
        return msgspec.structs.replace(
            self.info,
            compilation=self.compilation.report,
            ladder=self.filling.report,
            ladders=self.dispatcher.ladders.sizes,
            itl_target_ms=self.scheduler.budget.target_or_zero,
            sleep=self.sleeper.report,
        )

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        scheduler = self.scheduler
        return msgspec.structs.replace(
            self.counters.stats(),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.waiting_for_grammar),
            waiting_for_grammar=len(scheduler.waiting_for_grammar),
            kv_blocks_used=scheduler.block_pool.num_used,
            kv_blocks_total=scheduler.block_pool.total - 1,
            preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            itl_target_ms=scheduler.budget.target_or_zero,
            compilation=self.compilation.report,
            sleep=self.sleeper.report,
            ladder=self.filling.report,
            longest_turn_seconds=self.background.longest_turn,
            verified_steps=self.verification.counts,
        )

"""The choices of one response, read side by side.

A choice is one request of the engine. Its outputs become text in an `OutputProcessor`; here they
are measured, and a request that a stop string has ended is aborted in the engine.

Knows: the engine client and the latencies of a choice. Knows nothing of JSON or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from minisrv.engine.client import EngineClient
from minisrv.errors import EngineError, shutting_down_error
from minisrv.metrics import Metrics
from minisrv.request import EngineOutput, EngineRequest, FinishReason
from minisrv.request_metrics import EndedChoice
from minisrv.text.output_processor import CompletionDelta, OutputProcessor


def coalesce(deltas: Iterable[CompletionDelta]) -> list[CompletionDelta]:
    """Merge deltas into one for each choice that has any."""
    by_choice: dict[int, CompletionDelta] = {}
    for delta in deltas:
        if delta.index in by_choice:
            by_choice[delta.index].extend(delta)
        else:
            by_choice[delta.index] = delta
    return list(by_choice.values())


class PromptCount:
    """Counts the choices of one prompt that have ended.

    n: the number of its choices.
    """

    def __init__(self, metrics: Metrics, n: int) -> None:
        self._metrics = metrics
        self._n = self._running = n
        self._longest = 0

    def ended(self, num_generated_tokens: int) -> None:
        """Count a choice that ended, with the number of its tokens."""
        self._longest = max(self._longest, num_generated_tokens)
        self._running -= 1
        if not self._running:
            self._metrics.prompt_ended(self._n, self._longest)


class Choice:
    """One choice of a response.

    processor: reads the outputs of `request`.
    prompt_count: counts the choices of the same prompt.
    arrival: when the request arrived, by `time.perf_counter`.
    """

    def __init__(
        self,
        client: EngineClient,
        request: EngineRequest,
        processor: OutputProcessor,
        metrics: Metrics,
        prompt_count: PromptCount,
        *,
        arrival: float,
    ) -> None:
        self.request = request
        self._client = client
        self._processor = processor
        self._metrics = metrics
        self._prompt_count = prompt_count
        self._arrival = arrival
        self._queued_at = self._scheduled_at = 0.0
        self._first_output: float | None = None
        self._last_output = 0.0
        self._num_tokens = self._num_cached_tokens = 0
        self._aborted = False

    def read(self, output: EngineOutput, now: float) -> CompletionDelta | None:
        """Return what an output adds to the choice; see `OutputProcessor.process`.

        now: when the output came, by `time.perf_counter`.
        Raises EngineNotReadyError if the engine dropped the request.
        """
        processor = self._processor
        if output.scheduled_at:
            self._queued_at, self._scheduled_at = output.queued_at, output.scheduled_at
            self._num_cached_tokens = output.num_cached_tokens
        if output.token_ids and not self._aborted:
            self._measure(output, now)
        delta = processor.process(output)
        if processor.must_abort and not self._aborted:
            self._aborted = True
            self._client.abort(self.request.request_id)
        if delta is not None and delta.finish_reason is not None:
            if delta.finish_reason is FinishReason.ABORT:
                raise shutting_down_error()
            self._count_end(delta.finish_reason, now)
        return delta

    def _measure(self, output: EngineOutput, now: float) -> None:
        num_tokens = len(output.token_ids)
        if self._first_output is None:
            self._first_output = now
            self._metrics.first_token(now - self._arrival)
        else:
            self._metrics.gap((now - self._last_output) / num_tokens)
        self._last_output = now
        self._num_tokens += num_tokens

    def _count_end(self, reason: FinishReason, now: float) -> None:
        first, last = self._first_output, self._last_output
        if first is None:  # no token was asked for
            first = last = now
        self._metrics.ended(
            EndedChoice(
                reason=reason.value,
                latency=now - self._arrival,
                queue=self._scheduled_at - self._queued_at,
                prefill=first - self._scheduled_at,
                decode=last - first,
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_cached_tokens=self._num_cached_tokens,
                num_generated_tokens=self._num_tokens,
                max_tokens=self.request.params.max_tokens,
            )
        )
        self._prompt_count.ended(self._num_tokens)


class Generation:
    """The choices of one response, read together.

    requests: the requests to submit to the engine.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.requests = [choice.request for choice in choices]
        self._by_id = {choice.request.request_id: choice for choice in choices}
        self._running = len(choices)

    @property
    def has_ended(self) -> bool:
        """Whether every choice has had its last delta."""
        return self._running == 0

    def read(self, outputs: Iterable[EngineOutput]) -> list[CompletionDelta]:
        """Return the deltas of a batch of outputs. Raises what `Choice.read` raises."""
        now = time.perf_counter()
        deltas = []
        for output in outputs:
            choice = self._by_id[output.request_id]
            delta = choice.read(output, now)
            if delta is not None:
                deltas.append(delta)
                self._running -= delta.finish_reason is not None
        return deltas

    def check_ended(self) -> None:
        """Raise EngineError if the engine ended a request without a finish reason."""
        if not self.has_ended:
            raise EngineError("the engine ended a request without a finish reason.")

"""The choices of one response, side by side.

A choice is one request of the engine: its tokens become text here, stop strings are found here,
and what it needed is measured here.

Knows: outputs and the detokenizer, and the engine client where a stop string aborts. Knows nothing
of JSON or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minisrv.engine.client import EngineClient
from minisrv.errors import EngineError, time_is_over
from minisrv.metrics import Metrics
from minisrv.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from minisrv.text.detokenizer import Detokenizer


@dataclass(slots=True)
class Delta:
    """What one output of the engine adds to one choice.

    token_ids: every token, the one that ended the choice included; it counts in the usage.
    logprobs: of all of them, so that a client which asks for one token and takes the last entry
        off, as lm-eval does, never loses an entry of the prompt.
    text_starts: where in the text each of these begins, or would if no stop string had cut it; for
        completions.
    num_cached_tokens: prompt tokens found in the prefix cache, with the first token only.
    finish_reason: OpenAI's word, with the last delta only.
    prompt_logprobs: of all prompt tokens but the first, with the first delta, if asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    graph_steps: dict[str, int] | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    text_starts: Sequence[int] = ()

    def extend(self, later: Delta) -> None:
        """Add what came after this one."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
            self.text_starts = [*self.text_starts, *later.text_starts]
        self.num_cached_tokens += later.num_cached_tokens
        self.finish_reason = later.finish_reason
        self.graph_steps = later.graph_steps


def coalesce(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta for each choice that has any."""
    by_choice: dict[int, Delta] = {}
    for delta in deltas:
        if delta.index in by_choice:
            by_choice[delta.index].extend(delta)
        else:
            by_choice[delta.index] = delta
    return list(by_choice.values())


class Choice:
    """One choice: `index` is its place in the response, `arrival` the request's (perf_counter).

    report_steps: the last delta carries `graph_steps`. Then a choice that ends at a stop string
        waits for the engine's answer to the abort, which carries them.
    """

    def __init__(
        self,
        client: EngineClient,
        request: EngineRequest,
        detokenizer: Detokenizer,
        metrics: Metrics,
        *,
        index: int,
        arrival: float,
        report_steps: bool,
    ) -> None:
        self.request = request
        self.ended = False
        self._client = client
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._index = index
        self._arrival = arrival
        self._last_output: float | None = None
        self._report_steps = report_steps
        self._prompt_logprobs: list[TokenLogprobs] = []
        """What has come of them before the first token."""
        self._stopped: Delta | None = None
        """The last delta, while it waits for its steps."""

    def read(self, output: EngineOutput, now: float) -> Delta | None:
        """What an output adds, if anything; the last delta, and no other, has a finish reason.

        now: when it came, as `arrival`.
        Raises EngineNotReadyError if the engine dropped the request.
        """
        if self.ended:
            return None  # a stop string was found, and the engine did not know yet
        if output.prompt_logprobs:
            self._prompt_logprobs += output.prompt_logprobs
        if not output.token_ids and output.finish_reason is None:
            return None  # the prompt is not done yet
        delta = self._stopped
        if delta is None:
            self._measure(output, now)
            delta = self._read(output)
            if self._detokenizer.stopped and delta.finish_reason is None:
                delta.finish_reason = FinishReason.STOP.value
                self._client.abort(self.request.request_id)
                if self._report_steps:
                    self._stopped = delta
                    return None
        elif output.finish_reason is None:
            return None
        else:
            delta.graph_steps = output.graph_steps
        if delta.finish_reason is not None:
            self.ended = True
            self._metrics.finished(delta.finish_reason, now - self._arrival)
        return delta

    def _read(self, output: EngineOutput) -> Delta:
        reason = output.finish_reason
        if reason is FinishReason.ABORT:
            raise time_is_over()
        shown = output.token_ids
        if reason is FinishReason.STOP:
            shown = self._detokenizer.without_stop_token(shown)
        text = self._detokenizer.push(shown, final=reason is not None)
        if self._detokenizer.stopped:
            reason = reason and FinishReason.STOP
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        return Delta(
            self._index,
            text,
            output.token_ids,
            output.logprobs,
            output.num_cached_tokens,
            reason and reason.value,
            output.graph_steps if self._report_steps else None,
            prompt_logprobs,
            self._detokenizer.take_starts(len(output.logprobs or ())),
        )

    def _measure(self, output: EngineOutput, now: float) -> None:
        if not output.token_ids:
            return
        if self._last_output is None:
            self._metrics.first_token(now - self._arrival)
        else:
            self._metrics.gap((now - self._last_output) / len(output.token_ids))
        self._last_output = now


class Generation:
    """The choices of one response, read together.

    requests: what to submit.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.requests = [choice.request for choice in choices]
        self._by_id = {choice.request.request_id: choice for choice in choices}
        self._running = len(choices)

    @property
    def has_ended(self) -> bool:
        """Whether every choice has had its last delta."""
        return self._running == 0

    def read(self, outputs: Iterable[EngineOutput]) -> list[Delta]:
        """What the outputs that have come by now add. Raises what `Choice.read` raises."""
        now = time.perf_counter()
        deltas = []
        for output in outputs:
            choice = self._by_id[output.request_id]
            delta = choice.read(output, now)
            if delta is not None:
                deltas.append(delta)
                self._running -= choice.ended
        return deltas

    def check_ended(self) -> None:
        """Raises EngineError if the engine gave a request up."""
        if not self.has_ended:
            raise EngineError("the engine ended a request without a finish reason.")

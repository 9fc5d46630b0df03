"""The choices of one response, read side by side.

A choice is one request of the engine: here its tokens become text, its stop strings are found, and
its latencies are measured.

Knows: outputs and the detokenizer, and the engine client where a stop string aborts a request.
Knows nothing of JSON or HTTP.
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
    """The part of one choice that one output of the engine adds.

    token_ids: every new token, including the one that ended the choice, which counts in the usage.
    logprobs: those of all new tokens, so that a client that asks for one token and drops the last
        entry, as lm-eval does, never loses an entry of the prompt.
    text_starts: the index in the text at which each of these tokens begins, or would begin if no
        stop string had cut the text; for completions.
    num_cached_tokens: prompt tokens found in the prefix cache; set with the first token only.
    finish_reason: OpenAI's word for it; set in the last delta only.
    prompt_logprobs: those of all prompt tokens but the first; set in the first delta, if asked for.
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
        """Append a later delta of the same choice to this one."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
            self.text_starts = [*self.text_starts, *later.text_starts]
        self.num_cached_tokens += later.num_cached_tokens
        self.finish_reason = later.finish_reason
        self.graph_steps = later.graph_steps


def coalesce(deltas: Iterable[Delta]) -> list[Delta]:
    """Merge deltas into one for each choice that has any."""
    by_choice: dict[int, Delta] = {}
    for delta in deltas:
        if delta.index in by_choice:
            by_choice[delta.index].extend(delta)
        else:
            by_choice[delta.index] = delta
    return list(by_choice.values())


class Choice:
    """One choice of a response.

    index: the choice's place in the response.
    arrival: when the request arrived, by `time.perf_counter`.
    report_steps: the last delta carries `graph_steps`. A choice that ends at a stop string then
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
        """Prompt logprobs that have come before the first token."""
        self._stopped: Delta | None = None
        """The last delta, while it waits for its `graph_steps`."""

    def read(self, output: EngineOutput, now: float) -> Delta | None:
        """Return what an output adds to the choice, or None if nothing; the last delta, and no
        other, has a finish reason.

        now: when the output came, by `time.perf_counter`.
        Raises EngineNotReadyError if the engine dropped the request.
        """
        if self.ended:
            return None  # a stop string was found, and the engine had not handled the abort yet
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

    def read(self, outputs: Iterable[EngineOutput]) -> list[Delta]:
        """Return the deltas of a batch of outputs. Raises what `Choice.read` raises."""
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
        """Raise EngineError if the engine ended a request without a finish reason."""
        if not self.has_ended:
            raise EngineError("the engine ended a request without a finish reason.")

"""Turns the engine's outputs of one request into text, up to the first stop string.

`LLM`, the chat in a terminal and the server all read outputs here. A stop string is found in the
text, of which the engine knows nothing, so the caller has to abort the request in the engine when
`OutputProcessor.must_abort` says so.

Knows: outputs and the detokenizer. Knows nothing of engines, of JSON or of HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from minisrv.request import EngineOutput, FinishReason, GraphStats, TokenLogprobs
from minisrv.text.detokenizer import Detokenizer


@dataclass(slots=True)
class CompletionDelta:
    """The part of a completion that one output of the engine adds.

    index: the number of the completion among those that are read together.
    text: the text that has become certain. A stop string is not part of it, nor is the text of a
        stop token, unless the request asks for that.
    token_ids: every new token, including the one that ended the completion, which counts in the
        usage.
    logprobs: the log-probabilities at all new tokens, so that a client that asks for one token and
        drops the last entry, as lm-eval does, never loses an entry of the prompt; None if they were
        not requested.
    num_cached_tokens: the number of prompt tokens that were found in the prefix cache; set with the
        first token only.
    finish_reason: the reason why the completion ended; set in the last delta only.
    graph_steps: the number of steps of the request by "MODE/reason"; set in the last delta, if they
        are included.
    graph_stats: further numbers about its steps; set together with `graph_steps`.
    prompt_logprobs: the log-probabilities at all prompt tokens but the first; set in the first
        delta, if they were requested.
    text_offsets: the index in the text at which each new token begins, or would begin if no stop
        string had cut the text. Empty if the detokenizer does not track offsets.
    stop_reason: the stop string, or the member of the request's stop token ids, that ended the
        completion; None if anything else ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    graph_steps: dict[str, int] | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    text_offsets: Sequence[int] = ()
    stop_reason: int | str | None = None
    graph_stats: GraphStats | None = None

    def extend(self, later: CompletionDelta) -> None:
        """Append a later delta of the same completion to this one."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
            self.text_offsets = [*self.text_offsets, *later.text_offsets]
        self.num_cached_tokens += later.num_cached_tokens
        self.finish_reason = later.finish_reason
        self.graph_steps, self.graph_stats = later.graph_steps, later.graph_stats
        self.stop_reason = later.stop_reason


class OutputProcessor:
    """Reads the engine's outputs of one request.

    detokenizer: decodes the text of the completion and finds its stop strings.
    index: see `CompletionDelta.index`.
    stop_token_ids: the stop token ids of the request, which `stop_reason` reports.
    include_graph_steps: whether the last delta carries `graph_steps` and `graph_stats`. A
        completion that ends at a stop string then waits for the engine's answer to the abort, which
        carries them.

    finished: whether the completion has had its last delta.
    must_abort: whether a stop string has ended the text of a request that, as far as the outputs
        say, still runs in the engine. The caller has to abort it there.
    """

    __slots__ = (
        "_detokenizer",
        "_include_graph_steps",
        "_index",
        "_last_delta",
        "_prompt_logprobs",
        "_stop_token_ids",
        "finished",
        "must_abort",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        index: int = 0,
        stop_token_ids: Collection[int] = (),
        include_graph_steps: bool = False,
    ) -> None:
        self.finished = False
        self.must_abort = False
        self._detokenizer = detokenizer
        self._index = index
        self._stop_token_ids = stop_token_ids
        self._include_graph_steps = include_graph_steps
        self._prompt_logprobs: list[TokenLogprobs] = []
        """Prompt logprobs that have come before the first token."""
        self._last_delta: CompletionDelta | None = None
        """The last delta, while it waits for its `graph_steps`."""

    def process(self, output: EngineOutput) -> CompletionDelta | None:
        """Return what an output adds to the completion, or None if nothing; the last delta, and no
        other, has a finish reason.

        Outputs that come after the last delta add nothing: the engine had not handled the abort
        yet. Raises the error that ended the request, if one did.
        """
        if self.finished:
            return None
        if output.error is not None:
            raise output.error.as_exception()
        if output.prompt_logprobs:
            self._prompt_logprobs += output.prompt_logprobs
        reason = output.finish_reason
        if reason is None:
            if not output.token_ids or self._last_delta is not None:
                return None  # the prompt is not done yet, or the abort has not been handled yet
        else:
            self.must_abort = False
        delta = self._last_delta
        if delta is not None:
            delta.graph_steps, delta.graph_stats = output.graph_steps, output.graph_stats
        else:
            delta = self._decode(output)
            if delta.finish_reason is not None and reason is None:
                self.must_abort = True
                if self._include_graph_steps:
                    self._last_delta = delta
                    return None
        self.finished = delta.finish_reason is not None
        return delta

    def _decode(self, output: EngineOutput) -> CompletionDelta:
        detokenizer, reason = self._detokenizer, output.finish_reason
        shown = output.token_ids
        if reason is FinishReason.STOP:
            shown = detokenizer.without_stop_token(shown)
        text = detokenizer.push(shown, final=reason is not None)
        stop_reason: int | str | None = None
        if detokenizer.stopped:
            reason, stop_reason = FinishReason.STOP, detokenizer.stop_string
        elif reason is FinishReason.STOP and output.token_ids[-1] in self._stop_token_ids:
            stop_reason = output.token_ids[-1]
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        return CompletionDelta(
            self._index,
            text,
            output.token_ids,
            output.logprobs,
            output.num_cached_tokens,
            reason,
            output.graph_steps if self._include_graph_steps else None,
            prompt_logprobs,
            detokenizer.pop_text_offsets(len(output.logprobs or ())),
            stop_reason,
            output.graph_stats if self._include_graph_steps else None,
        )

"""The results that `LLM` returns: prompts and their completions. The names are vLLM's.

Knows: finish reasons and log-probabilities. Knows nothing of how they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.request import FinishReason, GraphStats, TokenLogprobs


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    index: the number of the completion among those of its prompt, from 0.
    text: the text. It ends before the stop string, or after it if the request asks for that.
    token_ids: every sampled token.
    cumulative_logprob: the sum of the log-probabilities of `token_ids`; None if log-probabilities
        were not requested.
    logprobs: the log-probabilities at each sampled token; None if they were not requested.
    finish_reason: the reason why the completion ended; None while it has not.
    stop_reason: the stop string or the member of `stop_token_ids` that ended the completion; None
        if anything else ended it.
    graph_steps: the number of steps in which the request took part, by "MODE/reason", or
        "MODE/reason/compiled" for steps by compiled code.
    graph_stats: further numbers about these steps; None until the completion has ended.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    graph_steps: dict[str, int] = field(default_factory=dict)
    graph_stats: GraphStats | None = None

    def finished(self) -> bool:
        """Whether the completion has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and its completions.

    prompt: the text of the prompt; for a chat the text that the chat template made. None if the
        prompt was given as token ids.
    outputs: the `n` completions of the prompt.
    num_cached_tokens: the number of prompt tokens that the first completion found in the prefix
        cache.
    prompt_logprobs: the log-probabilities at each prompt token, with None for the first token; None
        if they were not requested.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(output.finished() for output in self.outputs)

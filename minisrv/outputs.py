"""What `LLM` gives back: prompts and their completions. The names are vLLM's.

Knows: finish reasons and log-probabilities. Does not know how they come about.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.request import FinishReason, TokenLogprobs


@dataclass
class CompletionOutput:
    """One completion. `text` ends before a stop string, or behind it if that is asked for;
    `token_ids` holds every sampled token.

    cumulative_logprob: the sum over `token_ids`; None if log-probabilities were not asked for.
    stop_reason: the stop string or the one of `stop_token_ids` that ended it; None for any other
        end.
    graph_steps: the steps it took part in, counted by "MODE/reason".
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    graph_steps: dict[str, int] = field(default_factory=dict)

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and what came of it.

    prompt: its text, for a chat what the template has made; None for token ids alone.
    outputs: its `n` completions.
    num_cached_tokens: tokens of the prompt that were found in the prefix cache, by the first.
    prompt_logprobs: of each prompt token, None for the first; None if they were not asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether all of its completions have ended."""
        return all(output.finished() for output in self.outputs)

"""Whether a model can serve a request: its prompt, its token ids, and the length of its completion.

An API worker asks before it sends a request, and `EngineCore.add` asks before it queues one, so
that a request gets the same answer over HTTP and in the same process.

Knows: the vocabulary's size and the context length, as arguments. Does not know the bounds of
single sampling parameters, which `SamplingParams` checks, nor anything of text, HTTP or tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from minisrv.errors import ContextLengthError, RequestError
from minisrv.request import SamplingParams


class NamesTokens(Protocol):
    """The fields of a request that name tokens of the vocabulary."""

    @property
    def stop_token_ids(self) -> Collection[int]:
        """See `SamplingParams`."""

    @property
    def logit_bias(self) -> Collection[int]:
        """See `SamplingParams`."""

    @property
    def allowed_token_ids(self) -> Collection[int]:
        """See `SamplingParams`."""


def validate_request(
    prompt_token_ids: Collection[int],
    named: NamesTokens,
    *,
    max_tokens: int | None,
    max_model_len: int,
    vocab_size: int,
    prompt_param: str = "prompt",
) -> None:
    """Raise RequestError or ContextLengthError for a request that can never be served.

    max_tokens: the maximum number of completion tokens that was asked for; None for as many as the
        context has room for, which must be one at least.
    named: the fields that name tokens.
    max_model_len: the maximum number of tokens of a request, prompt and completion together.
    prompt_param: the name of the field that holds the prompt; errors name it.
    """
    if not prompt_token_ids:
        raise RequestError(
            f"The {prompt_param} came out empty: send at least one token of text.",
            param=prompt_param,
        )
    check_token_ids(prompt_param, prompt_token_ids, vocab_size)
    check_token_ids("stop_token_ids", named.stop_token_ids, vocab_size)
    check_token_ids("logit_bias", named.logit_bias, vocab_size)
    check_token_ids("allowed_token_ids", named.allowed_token_ids, vocab_size)
    _check_length(prompt_param, len(prompt_token_ids), max_tokens, max_model_len)


def check_num_characters(
    param: str, num_characters: int, *, longest_token: int, max_model_len: int
) -> None:
    """Raise ContextLengthError for a text that would not fit into the context even if it consisted
    of the longest token alone, so that it need not be tokenised.

    longest_token: number of characters of that token.
    """
    most = max_model_len * longest_token
    if num_characters > most:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, your {param} "
            f"has {num_characters} characters, and so many tokens have at most {most}. Please "
            f"reduce the length of the {param}.",
            param=param,
        )


def check_token_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raise RequestError, naming `param`, if one of the token ids is not in the vocabulary."""
    if not token_ids:
        return
    for token_id in (max(token_ids), min(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} holds the token id {token_id}; this model's ids go from 0 to "
                f"{vocab_size - 1}.",
                param=param,
            )


def check_tokens_are_left(
    params: SamplingParams, vocab_size: int, eos_token_ids: Collection[int]
) -> None:
    """Raise RequestError if the tokens that may be sampled are so few that `bad_words`, or
    `min_tokens`, could leave none."""
    last = {word[-1] for word in params.bad_words_token_ids}
    ends = {*params.stop_token_ids, *eos_token_ids} if params.min_tokens else set()
    allowed = set(params.allowed_token_ids)
    left = len(allowed - last - ends) if allowed else vocab_size - len(last | ends)
    if left <= 0:
        field, why = ("bad_words", "bad_words") if last else ("allowed_token_ids", "min_tokens")
        raise RequestError(
            f"{why} may leave no token to sample: allow more tokens, or ask for less.", param=field
        )


def _check_length(param: str, num_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raise ContextLengthError, in OpenAI's words, if prompt and completion do not fit into the
    context."""
    room = max_model_len - num_prompt
    limit = f"This model's maximum context length is {max_model_len} tokens. However, "
    if room < (0 if max_tokens == 0 else 1):
        raise ContextLengthError(
            f"{limit}your {param} resulted in {num_prompt} tokens, and a completion needs at least "
            f"one more. Please reduce the length of the {param}.",
            param=param,
        )
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthError(
            f"{limit}you requested {num_prompt + max_tokens} tokens ({num_prompt} in the {param}, "
            f"{max_tokens} in the completion). Please reduce the length of the {param} or "
            "completion.",
            param=param,
        )

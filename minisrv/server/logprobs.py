"""Log-probabilities in the two shapes OpenAI has for them.

Knows: the tokenizer's spelling of single tokens. Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from minisrv.request import TokenLogprobs
from minisrv.text.tokenizer import Tokenizer


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: a list of tokens, each with its `num_top` best rivals."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, piece = tokenizer.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(piece)}

    content = [
        {
            **entry(position.token_id, position.logprob),
            "top_logprobs": [entry(*pair) for pair in position.top[:num_top]],
        }
        for position in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, whose offsets run on from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def chunk(self, logprobs: Iterable[TokenLogprobs]) -> dict[str, Any]:
        """Four lists, one item per token.

        `top_logprobs` holds the sampled token too: at most `num_top` + 1 entries.
        """
        tokens: list[str] = []
        token_logprobs: list[float] = []
        top_logprobs: list[dict[str, float]] = []
        text_offset: list[int] = []
        for position in logprobs:
            spelling, length = self._spell(position.token_id)
            best = {self._spell(i)[0]: value for i, value in position.top[: self._num_top]}
            tokens.append(spelling)
            token_logprobs.append(position.logprob)
            top_logprobs.append(best | {spelling: position.logprob})
            text_offset.append(self._offset)
            self._offset += length
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _spell(self, token_id: int) -> tuple[str, int]:
        """The token as text, or as OpenAI writes one that is not text by itself, and its
        length in characters of the completion (a lone byte counts as one)."""
        text, piece = self._tokenizer.token_text(token_id)
        if "\ufffd" in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), len(text)
        return text, len(text)

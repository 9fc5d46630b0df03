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


def prompt_logprobs(
    tokenizer: Tokenizer, scored: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`, vLLM's: an entry for each prompt token, none for the first, of which
    nothing is known; in it the token itself and its `num_top` best rivals, by id."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text, _ = tokenizer.token_text(token_id)
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    def position(of: TokenLogprobs) -> dict[str, Any]:
        own = {str(of.token_id): entry(of.token_id, of.logprob, of.rank)}
        best = enumerate(of.top[:num_top], start=1)
        return own | {str(i): entry(i, logprob, rank) for rank, (i, logprob) in best}

    return [None, *map(position, scored)]


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, whose offsets run on from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def chunk(self, logprobs: Iterable[TokenLogprobs]) -> dict[str, list[Any]]:
        """Four lists, one item per token.

        `top_logprobs` holds the sampled token too: at most `num_top` + 1 entries.
        """
        lists = self._lists()
        for position in logprobs:
            spelling, length = self._spell(position.token_id)
            self._append(lists, spelling, position)
            self._offset += length
        return lists

    def prompt(
        self, text: str, token_ids: Sequence[int], scored: Sequence[TokenLogprobs]
    ) -> dict[str, list[Any]]:
        """The same of a prompt that the text begins with; nulls for its first token, of which
        nothing is known. Comes before any chunk.

        scored: all tokens but the first.
        """
        lists = self._lists()
        for token_id, position in zip(token_ids, (None, *scored), strict=True):
            spelling, length = self._spell(token_id)
            self._append(lists, spelling, position)
            added = token_id in self._tokenizer.special_ids
            if not (added and not text.startswith(spelling, self._offset)):  # BOS is not in it
                self._offset = min(self._offset + length, len(text))
        self._offset = len(text)
        return lists

    def _lists(self) -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _append(
        self, lists: dict[str, list[Any]], spelling: str, position: TokenLogprobs | None
    ) -> None:
        lists["tokens"].append(spelling)
        lists["text_offset"].append(self._offset)
        if position is None:
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            return
        best = {self._spell(i)[0]: value for i, value in position.top[: self._num_top]}
        lists["token_logprobs"].append(position.logprob)
        lists["top_logprobs"].append(best | {spelling: position.logprob})

    def _spell(self, token_id: int) -> tuple[str, int]:
        """The token as text, or as OpenAI writes one that is not text by itself, and its
        length in characters of the completion (a lone byte counts as one)."""
        text, piece = self._tokenizer.token_text(token_id)
        if "\ufffd" in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), len(text)
        return text, len(text)

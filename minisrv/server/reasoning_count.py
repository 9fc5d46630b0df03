"""Counts how many tokens of an answer are reasoning, for the usage that responses report.

Knows: the parser that splits an answer, and the tokenizer. Knows nothing of the shape of a
response.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from minisrv.text.chat_format import ChatParser
from minisrv.text.reasoning import REASONING_END
from minisrv.text.tokenizer import Tokenizer


class ReasoningCount:
    """Counts the tokens of one choice that are reasoning: all up to the one that holds the end of
    the marker at its end. The number does not depend on how the tokens come in pieces.

    parser: the parser of the choice's text; None if all of the text is content.
    """

    def __init__(self, parser: ChatParser | None, tokenizer: Tokenizer) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        """The tokens so far, as long as the reasoning had not ended before them."""
        self._found: int | None = None
        """The number, once the reasoning has ended."""

    def add(self, token_ids: Sequence[int]) -> None:
        """Add tokens, before the parser is given their text."""
        if self._parser is not None and not self._parser.reasoning_has_ended:
            self._token_ids += token_ids

    @property
    def number(self) -> int:
        """The number of tokens of reasoning in the text that the parser has been given."""
        if self._parser is None or not self._parser.has_reasoned:
            return 0
        if not self._parser.reasoning_has_ended:
            return len(self._token_ids)
        if self._found is None:
            self._found = self._up_to_marker()
            self._token_ids = []
        return self._found

    def _up_to_marker(self) -> int:
        ids, decode = self._token_ids, self._tokenizer.decode
        end = self._tokenizer.token_id(REASONING_END)
        if end in ids:
            return ids.index(end) + 1
        prefixes = range(1, len(ids))
        return 1 + bisect_left(prefixes, True, key=lambda size: REASONING_END in decode(ids[:size]))

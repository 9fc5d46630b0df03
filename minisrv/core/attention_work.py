"""The work of attention in a step, in numbers from which its time can be predicted.

Knows: how much a row of a step reads and scores. Knows nothing of times, nor of who predicts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class RowLike(Protocol):
    """What a row of a step computes, and behind how many tokens of its request."""

    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def is_decode(self) -> bool: ...


class AttentionWork(NamedTuple):
    """The work of a step that depends on the lengths of its rows and not on their number.

    decode_context: the number of tokens whose keys and values decode rows read, over all of them.
    prefill_pairs: the number of pairs of a query and a key in the attention of prefill rows: a row
        of n tokens behind h tokens has n * (h + n / 2).
    longest_prefill: the largest number of keys of a query in prefill: h + n for the longest of
        these rows. A query's keys are read one after the other, so it takes its time however few
        queries there are beside it.
    """

    decode_context: int = 0
    prefill_pairs: float = 0.0
    longest_prefill: int = 0

    @classmethod
    def of_chunk(cls, num_computed_tokens: int, num_tokens: int) -> AttentionWork:
        """Return the work of a prefill row."""
        pairs = num_tokens * (num_computed_tokens + num_tokens / 2)
        return cls(0, pairs, num_computed_tokens + num_tokens)

    @classmethod
    def of(cls, rows: Iterable[RowLike]) -> AttentionWork:
        """Return the work of the rows of a step."""
        decode_context, prefill = 0, NO_WORK
        for row in rows:
            if row.is_decode:  # most rows: each step has this loop
                decode_context += row.num_computed_tokens + row.num_tokens
            else:
                prefill = prefill.beside(cls.of_chunk(row.num_computed_tokens, row.num_tokens))
        return prefill.reading(decode_context)

    def beside(self, other: AttentionWork) -> AttentionWork:
        """Return the work of a step that holds the rows of both."""
        return AttentionWork(
            self.decode_context + other.decode_context,
            self.prefill_pairs + other.prefill_pairs,
            max(self.longest_prefill, other.longest_prefill),
        )

    def reading(self, num_tokens: int) -> AttentionWork:
        """Return the work with so many more tokens that decode rows read."""
        return self._replace(decode_context=self.decode_context + num_tokens)


NO_WORK = AttentionWork()
"""The work of a step whose rows are empty."""

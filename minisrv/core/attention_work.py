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

    cached_tokens: the number of tokens whose keys and values attention reads, over all rows.
    prefill_pairs: the number of pairs of a query and a key in the attention of prefill rows: a row
        of n tokens behind h tokens has n * (h + n / 2).
    """

    cached_tokens: int = 0
    prefill_pairs: float = 0.0

    @classmethod
    def of_chunk(cls, num_computed_tokens: int, num_tokens: int) -> AttentionWork:
        """Return the work of a prefill row."""
        pairs = num_tokens * (num_computed_tokens + num_tokens / 2)
        return cls(num_computed_tokens + num_tokens, pairs)

    @classmethod
    def of(cls, rows: Iterable[RowLike]) -> AttentionWork:
        """Return the work of the rows of a step."""
        cached_tokens, prefill_pairs = 0, 0.0
        for row in rows:
            if row.is_decode:  # most rows: each step has this loop
                cached_tokens += row.num_computed_tokens + row.num_tokens
            else:
                cached, pairs = cls.of_chunk(row.num_computed_tokens, row.num_tokens)
                cached_tokens += cached
                prefill_pairs += pairs
        return cls(cached_tokens, prefill_pairs)


NO_WORK = AttentionWork()
"""The work of a step whose rows are empty."""

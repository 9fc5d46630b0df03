"""Blocks of the KV cache and slots of request state, as numbers.

Knows: which numbers are free. Block 0 and slot 0 are the null ones: they belong to padding and
are never handed out. Knows nothing of tensors, nor of who holds a number and why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0
NULL_SLOT = 0


class FreeList:
    """Numbers 1 to `total - 1`, handed out first in, first out.

    First in, first out because a number that rests longest is the likeliest to show a use after
    free, and (for blocks) because the least recently used is what a prefix cache evicts.
    """

    def __init__(self, total: int) -> None:
        assert total >= 2, "one null number and at least one real one"
        self.total = total
        self._free = deque(range(1, total))
        self._is_free = [False] + [True] * (total - 1)

    @property
    def num_free(self) -> int:
        """Numbers that can be taken now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Numbers handed out, the null one not counted."""
        return self.total - 1 - len(self._free)

    def take(self) -> int:
        """A free number. Asking when none is free is the caller's mistake."""
        number = self._free.popleft()
        self._is_free[number] = False
        return number

    def give_back(self, numbers: Iterable[int]) -> None:
        """Return numbers that `take` gave out."""
        for number in numbers:
            assert number > 0, "the null number was never handed out"
            assert not self._is_free[number], f"{number} is free already"
            self._is_free[number] = True
            self._free.append(number)


class BlockPool(FreeList):
    """The blocks of the KV cache, each of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks)
        self.block_size = block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one request fill or begin."""
        return -(-num_tokens // self.block_size)

    @property
    def capacity(self) -> int:
        """Tokens that one request alone could keep in the cache."""
        return (self.total - 1) * self.block_size

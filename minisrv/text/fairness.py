"""Fair turns among owners, and budgets that refill over time.

Knows: owners, which are anything that can be a key of a dict, and numbers. Knows nothing of what is
waited for, of clocks, or of processes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class FairQueue(Generic[_T]):
    """A queue of items in which owners take turns (round robin).

    Before an item come those that its own owner has queued before it; before each of these, and
    before the item itself, comes at most one item of each other owner.
    """

    def __init__(self) -> None:
        self._owners: OrderedDict[Hashable, deque[_T]] = OrderedDict()  # next owner first

    def __bool__(self) -> bool:
        return bool(self._owners)

    def push(self, owner: Hashable, item: _T) -> None:
        """Queue an item behind those of its owner."""
        self._owners.setdefault(owner, deque()).append(item)

    def pop(self) -> tuple[Hashable, _T]:
        """Remove and return the next item with its owner; the queue must not be empty."""
        owner, items = self._owners.popitem(last=False)
        item = items.popleft()
        if items:
            self._owners[owner] = items
        return owner, item


class TokenBucket:
    """A budget: `capacity` may be used at once, and as much again is refilled in `period` seconds.

    It may be overdrawn, as the cost of something is known only after it; then nothing may be used
    until that is made up for.
    """

    def __init__(self, capacity: float, period: float) -> None:
        self._capacity = capacity
        self._rate = capacity / period
        self._left = capacity
        self._seen: float | None = None

    def consume(self, amount: float, now: float) -> None:
        """Use an amount.

        now: the time in seconds, never less than in an earlier call.
        """
        self._left = self.left(now) - amount
        self._seen = now

    def left(self, now: float) -> float:
        """Return what may be used now; not above 0 if nothing may."""
        since = 0.0 if self._seen is None else now - self._seen
        return min(self._capacity, self._left + since * self._rate)

    def seconds_until(self, amount: float, now: float) -> float:
        """Return the seconds until this amount is left."""
        return max(0.0, (amount - self.left(now)) / self._rate)

"""Whose turn it is, and how much somebody may still use.

Knows: owners, as anything that can be a key of a dict, and numbers. Knows nothing of what is waited
for, of clocks, or of processes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class FairQueue(Generic[_T]):
    """Items that wait, the owners taking turns.

    An item waits for those of its own owner that came before it, and with each of these, and with
    itself, for one of each other owner at most.
    """

    def __init__(self) -> None:
        self._owners: OrderedDict[Hashable, deque[_T]] = OrderedDict()  # whose turn it is first

    def __bool__(self) -> bool:
        return bool(self._owners)

    def push(self, owner: Hashable, item: _T) -> None:
        """Queue an item behind those of its owner."""
        self._owners.setdefault(owner, deque()).append(item)

    def pop(self) -> tuple[Hashable, _T]:
        """The next item, and whose it is; it must not be empty."""
        owner, items = self._owners.popitem(last=False)
        item = items.popleft()
        if items:
            self._owners[owner] = items
        return owner, item


class TokenBucket:
    """What somebody may use: `capacity` at once, and as much again in `period` seconds.

    It may be overdrawn, as what something costs is known behind it; then there is nothing until
    that is made up for.
    """

    def __init__(self, capacity: float, period: float) -> None:
        self._capacity = capacity
        self._rate = capacity / period
        self._left = capacity
        self._seen: float | None = None

    def take(self, amount: float, now: float) -> None:
        """Use so much. now: in seconds, never less than before."""
        self._left = self.left(now) - amount
        self._seen = now

    def left(self, now: float) -> float:
        """What may be used now; not above 0 if nothing may."""
        since = 0.0 if self._seen is None else now - self._seen
        return min(self._capacity, self._left + since * self._rate)

    def seconds_until(self, amount: float, now: float) -> float:
        """How long it takes until so much is left."""
        return max(0.0, (amount - self.left(now)) / self._rate)

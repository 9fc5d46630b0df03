"""A cache that evicts the least recently used entries when their total weight exceeds a limit.

Knows: keys, weights, and what was asked for when. Knows nothing of what is kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_T = TypeVar("_T")


class LRUCache(Generic[_Key, _T]):
    """A least-recently-used cache. Methods may be called by any thread.

    max_weight: maximum total weight of the entries.
    min_weight: minimum weight that each entry counts with, so that there are at most
        max_weight / min_weight entries.
    """

    def __init__(self, max_weight: float, min_weight: float) -> None:
        self._max_weight = max_weight
        self._min_weight = min_weight
        self._found: OrderedDict[_Key, tuple[_T, float]] = OrderedDict()
        self._weight = 0.0
        self._lock = threading.Lock()

    def get(self, key: _Key) -> _T | None:
        """Return the value of a key and mark it as used now; None if there is none."""
        with self._lock:
            if key not in self._found:
                return None
            self._found.move_to_end(key)
            return self._found[key][0]

    def remove(self, key: _Key, value: _T) -> None:
        """Forget a value; nothing happens if the key has no value or another one by now."""
        with self._lock:
            if key in self._found and self._found[key][0] is value:
                self._weight -= self._found.pop(key)[1]

    def add(self, key: _Key, value: _T, weight: float) -> None:
        """Keep a value, replacing the key's last one. A value that weighs more than the limit is
        not kept, and evicts nothing else."""
        weight = max(weight, self._min_weight)
        with self._lock:
            if key in self._found:
                self._weight -= self._found.pop(key)[1]
            if weight > self._max_weight:
                return
            self._found[key] = value, weight
            self._weight += weight
            while self._weight > self._max_weight:
                _, (_, gone) = self._found.popitem(last=False)
                self._weight -= gone

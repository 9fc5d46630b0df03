"""How many steps had which number of requests or tokens: the batches to which a ladder is fitted.

Knows: the numbers of steps by the size of their batch. So that a server counts in few numbers,
large sizes are rounded up. Knows nothing of graphs, nor of what is fitted (see `ladder_fit`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

EXACT_UP_TO = 256
"""The largest size up to which every size is counted for itself."""

PARTS = 32
"""Number of sizes between a power of two and the next one that are counted above that, so that a
size is rounded by at most 3%."""


def rounded_size(size: int) -> int:
    """Return the size as which a batch of `size` is counted, which is not smaller."""
    if size <= EXACT_UP_TO:
        return size
    apart = (1 << (size - 1).bit_length() - 1) // PARTS
    return -(-size // apart) * apart


@dataclass(frozen=True)
class BatchCounts:
    """The number of steps by the size of their batch.

    decode: by the number of requests, for steps in which every request decodes.
    mixed: by the number of tokens, for all others.
    """

    decode: Mapping[int, float] = field(default_factory=dict)
    mixed: Mapping[int, float] = field(default_factory=dict)

    @property
    def num_steps(self) -> float:
        """The number of all steps."""
        return sum(self.decode.values()) + sum(self.mixed.values())

    def rounded(self) -> BatchCounts:
        """Return the same steps with their sizes rounded up as `rounded_size` does."""
        found: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        for counter, counts in zip(found, (self.decode, self.mixed), strict=True):
            for size, steps in counts.items():
                counter[rounded_size(size)] += steps  # type: ignore[assignment]
        return BatchCounts(*found)

    def plus(self, other: BatchCounts, factor: float) -> BatchCounts:
        """Return the sum of these numbers and of `factor` times those of `other`, without those
        that are not positive."""

        def added(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
            sums = {n: ours.get(n, 0) + factor * theirs.get(n, 0) for n in {*ours, *theirs}}
            return {size: steps for size, steps in sums.items() if steps > 0}

        return BatchCounts(added(self.decode, other.decode), added(self.mixed, other.mixed))


class BatchCounter:
    """Counts the steps of one engine by their rounded sizes.

    num_steps: the number of all steps.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._decode: dict[int, int] = {}
        self._mixed: dict[int, int] = {}

    def count(self, num_tokens: int, num_reqs: int, *, decode: bool) -> None:
        """Count a step."""
        self.num_steps += 1
        counts, size = (self._decode, num_reqs) if decode else (self._mixed, num_tokens)
        size = rounded_size(size)
        counts[size] = counts.get(size, 0) + 1

    def counts(self) -> BatchCounts:
        """Return the numbers since the start."""
        return BatchCounts(dict(self._decode), dict(self._mixed))

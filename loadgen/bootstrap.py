"""Estimates a ratio from repeats, with a bootstrap interval.

Knows: ratios and resampling. Knows nothing of what was measured.
"""

from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np

_RESAMPLES = 10_000
_SHARE = (2.5, 97.5)


class Ratio(msgspec.Struct, frozen=True):
    """The geometric mean of ratios, and its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> Self:
        """Estimate the ratio that `groups` of ratios have on average, each group with the same
        weight, by resampling within each. There is at least one group, and none is empty.

        The random numbers are the same in each call, so that a report can be computed again.
        """
        rng = np.random.default_rng(0)
        logs = [np.log(group) for group in groups]
        resampled = [
            values[rng.integers(len(values), size=(_RESAMPLES, len(values)))].mean(axis=1)
            for values in logs
        ]
        low, high = np.percentile(np.mean(resampled, axis=0), _SHARE)
        mean = np.mean([values.mean() for values in logs])
        return cls(*(float(value) for value in np.exp([mean, low, high])))

    @property
    def is_one(self) -> bool:
        """Whether the interval holds 1, so that there may be no difference."""
        return self.low <= 1 <= self.high

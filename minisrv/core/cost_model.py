"""The cost model of a step: how many milliseconds it takes, predicted from what it holds.

The time of a step is the sum of three parts:
- its *base*, which depends on the graph and its padded tokens (weights, launches, sampling);
- the time to read keys and values, in proportion to the tokens that attention reads;
- the time of the attention of prompts, in proportion to its pairs of a query and a key.
Steps that run alike, such as all FULL graphs for decode, have a `_Curve` in common: a base at each
measured size, between which it is linear, and one rate for each of the other two parts. No part is
negative, and a base is never smaller than that of a smaller size, so a step that holds more is
never predicted to take less time than another one that runs alike.

A model is fitted at start-up to a few timed steps, and corrected by the steps that are served. Nine
measured steps of about one size correct it together, by the one whose error is their median. So a
few steps that take much longer for a reason of their own, such as a busy host, teach it nothing.

Knows: samples of steps with their times. Knows nothing of how steps are timed, nor of what follows
from a prediction (see `budget`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from minisrv.core.attention_work import AttentionWork
from minisrv.modes import CUDAGraphMode, GraphKey

WINDOW = 9
"""Number of measured steps that correct the model together; fewer than half of them may be
disturbed."""

GAIN = 0.5
"""Share of the median error that one correction removes, if the time has one part; if it has
several, each is corrected less."""

MOST_LEARNT = 2.0
"""Largest ratio of measured to predicted time that one correction takes into account."""


class StepSample(NamedTuple):
    """A step that has been timed.

    key: the mode in which its model ran, and its padded shape.
    work: the work of its attention.
    ms: its duration in milliseconds.
    """

    key: GraphKey
    work: AttentionWork
    ms: float


class CostModel:
    """Predicts the duration of steps.

    samples: the timed steps to which the model is fitted, at least one for each way in which a step
        can run. Steps that run unlike all of them are predicted to take no time, so without samples
        every step is.
    """

    def __init__(self, samples: Iterable[StepSample] = ()) -> None:
        alike: defaultdict[_Kind, list[StepSample]] = defaultdict(list)
        for sample in samples:
            alike[_kind(sample.key)].append(sample)
        self._curves = {kind: _Curve.fit(some) for kind, some in alike.items()}

    def predict(self, key: GraphKey, work: AttentionWork) -> float:
        """Return the duration in milliseconds of a step, with its epilogue.

        key: the mode in which its model runs, and its padded shape.
        work: the work of its attention.
        """
        curve = self._curves.get(_kind(key))
        return 0.0 if curve is None else curve.predict(key[1].num_tokens, work)

    def observe(self, sample: StepSample) -> None:
        """Learn from a step that has been served."""
        curve = self._curves.get(_kind(sample.key))
        if curve is not None:
            curve.observe(sample)


_Kind = tuple[CUDAGraphMode, bool]
"""The runtime mode of a step, and whether its graph is one of pure decode."""


def _kind(key: GraphKey) -> _Kind:
    return key[0], key[1].uniform_decode


@dataclass
class _Curve:
    """The costs of steps that run alike.

    sizes: the padded numbers of tokens that were measured, ascending.
    base_ms: the base at each of these sizes, never descending.
    ms_per_token: the time to read the keys and values of a token.
    ms_per_pair: the time of a pair of a query and a key in the attention of prefill.
    pending: for each size, the served steps from which nothing has been learnt yet.
    """

    sizes: list[int]
    base_ms: list[float]
    ms_per_token: float
    ms_per_pair: float
    pending: list[list[StepSample]]

    @classmethod
    def fit(cls, samples: Sequence[StepSample]) -> _Curve:
        """Return the curve with the least squared error, relative to the measured times. The two
        rates follow from sizes with several samples, the base from all samples of its size."""
        by_size: defaultdict[int, list[StepSample]] = defaultdict(list)
        for sample in samples:
            by_size[sample.key[1].num_tokens].append(sample)
        sizes = sorted(by_size)
        per_token, per_pair = _fit_rates([by_size[size] for size in sizes])
        bases = []
        for size in sizes:
            rest = [
                sample.ms - per_token * sample.work.cached_tokens
                - per_pair * sample.work.prefill_pairs
                for sample in by_size[size]
            ]  # fmt: skip
            bases.append(max(0.0, median(rest)))
        return cls(sizes, _ascending(bases), per_token, per_pair, [[] for _ in sizes])

    def predict(self, size: int, work: AttentionWork) -> float:
        """Return the duration of a step of `size` padded tokens."""
        base = sum(share * self.base_ms[index] for index, share in self._neighbours(size))
        return base + self.ms_per_token * work.cached_tokens + self.ms_per_pair * work.prefill_pairs

    def observe(self, sample: StepSample) -> None:
        """See `CostModel.observe`."""
        size = sample.key[1].num_tokens
        pending = self.pending[min(bisect_left(self.sizes, size), len(self.sizes) - 1)]
        pending.append(sample)
        if len(pending) == WINDOW:
            ratios = [(_ratio(each, self), index) for index, each in enumerate(pending)]
            ratio, index = sorted(ratios)[WINDOW // 2]
            self._correct(pending[index], min(ratio, MOST_LEARNT))
            pending.clear()

    def _correct(self, sample: StepSample, ratio: float) -> None:
        """Move the prediction for a step towards `ratio` times its value. Each part takes the
        correction in proportion to its share of the predicted time."""
        size, work = sample.key[1].num_tokens, sample.work
        total = self.predict(size, work)
        if not total:
            return
        step = GAIN * (ratio - 1) / total
        neighbours = [
            (index, share * self.base_ms[index]) for index, share in self._neighbours(size)
        ]
        self.ms_per_token *= 1 + step * self.ms_per_token * work.cached_tokens
        self.ms_per_pair *= 1 + step * self.ms_per_pair * work.prefill_pairs
        for index, part in neighbours:
            self._set_base(index, self.base_ms[index] * (1 + step * part))

    def _set_base(self, index: int, ms: float) -> None:
        """Set a base. Those of smaller sizes are not left larger, nor those of larger ones
        smaller."""
        bases = self.base_ms
        self.base_ms = [
            *(min(base, ms) for base in bases[:index]),
            ms,
            *(max(base, ms) for base in bases[index + 1 :]),
        ]

    def _neighbours(self, size: int) -> list[tuple[int, float]]:
        """Return the measured sizes between which `size` lies, as indices, with the weight of each.
        Below the smallest measured size the base is that of this size; above the largest it grows
        in proportion."""
        sizes = self.sizes
        index = bisect_left(sizes, size)
        if index == len(sizes):
            return [(index - 1, size / sizes[-1])]
        if index == 0 or sizes[index] == size:
            return [(index, 1.0)]
        share = (size - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return [(index - 1, 1 - share), (index, share)]


def _ratio(sample: StepSample, curve: _Curve) -> float:
    """Return the ratio of the measured to the predicted time."""
    predicted = curve.predict(sample.key[1].num_tokens, sample.work)
    return sample.ms / predicted if predicted else 1.0


def _fit_rates(groups: Iterable[Sequence[StepSample]]) -> tuple[float, float]:
    """Return the milliseconds per cached token and per prefill pair, neither negative, that explain
    best how the times of samples of one size differ.

    groups: the samples of each size.
    """
    # The base of each size is eliminated by taking differences from the weighted mean of the size.
    # What is left is a least squares problem with two unknowns: the normal equations are
    # [tt tp; tp pp] [per_token; per_pair] = [ty; py].
    tt = tp = pp = ty = py = 0.0
    for samples in groups:
        weights = [1 / max(sample.ms, 1e-9) ** 2 for sample in samples]
        columns = [
            _centred([getattr(sample.work, name) for sample in samples], weights)
            for name in ("cached_tokens", "prefill_pairs")
        ]
        times = _centred([sample.ms for sample in samples], weights)
        for weight, token, pair, ms in zip(weights, *columns, times, strict=True):
            tt += weight * token * token
            tp += weight * token * pair
            pp += weight * pair * pair
            ty += weight * token * ms
            py += weight * pair * ms
    candidates = [
        (0.0, 0.0),
        (max(0.0, ty / tt), 0.0) if tt else (0.0, 0.0),
        (0.0, max(0.0, py / pp)) if pp else (0.0, 0.0),
    ]
    determinant = tt * pp - tp * tp
    if determinant > 1e-9 * tt * pp:
        both = (ty * pp - py * tp) / determinant, (py * tt - ty * tp) / determinant
        if min(both) >= 0:
            candidates.append(both)

    def squared_error(rates: tuple[float, float]) -> float:
        """The squared error, without a term that is the same for all rates."""
        a, b = rates
        return a * a * tt + 2 * a * b * tp + b * b * pp - 2 * (a * ty + b * py)

    return min(candidates, key=squared_error)


def _ascending(values: Sequence[float]) -> list[float]:
    """Return the values that never descend and have the least squared distance to these: neighbours
    that descend are replaced by their mean (the pool adjacent violators algorithm)."""
    pools: list[tuple[float, int]] = []  # the mean of each pool of neighbours, and their number
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _centred(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the differences of values from their weighted mean."""
    mean = sum(map(lambda v, w: v * w, values, weights)) / sum(weights)
    return [value - mean for value in values]

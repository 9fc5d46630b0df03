"""The cost model of a step: how many milliseconds it takes, predicted from what it holds.

The time of a step is the sum of three parts:
- its *base*, which depends on the graph and its padded tokens (weights, launches, sampling);
- the time in which decode rows read keys and values, in proportion to their number;
- the time of the attention of prompts, in proportion to its pairs of a query and a key. A chunk of
  few tokens behind a long history cannot use the whole device, as a query's keys are read one after
  the other: it takes as long as a chunk of `width` tokens with as many keys for each.

Steps that run alike, such as all FULL graphs for decode, have their bases in common: one at each
measured size, between which it is linear. Attention costs the same in every mode, so all steps with
prefill have its rates in common, and so have all steps of pure decode. No part is negative, and a
base is never smaller than that of a smaller size, so a step that holds more is never predicted to
take less time than another one that runs alike.

A model is fitted at start-up to a few timed steps, and corrected by the steps that are served, in
two ways. A machine that becomes slower or faster as a whole, as one with a busy neighbour does,
changes the *pace*: the factor by which all steps take longer than the fitted model says, the median
of the last nine steps. What steps of one kind take longer than others at the same pace changes the
parts of the model: nine measured steps of about one size correct it together, by the one whose
error is their median. So a few steps that take much longer for a reason of their own teach it
nothing.

Knows: samples of steps with their times. Knows nothing of how steps are timed, nor of what follows
from a prediction (see `budget`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from minisrv.core.attention_work import AttentionWork
from minisrv.modes import CUDAGraphMode, GraphKey

WINDOW = 9
"""Number of measured steps that tell the pace, and that correct the model together; fewer than half
of them may be disturbed."""

GAIN = 0.5
"""Share of the median error that one correction removes, if the time has one part; if it has
several, each is corrected less."""

WIDTHS = (0.0, *(2 ** (step / 4) for step in range(16, 53)))
"""The widths (`_Rates`) among which a fit chooses: none, and 16 to 8,192 tokens."""

LEAST_BASE = 0.1
"""Smallest share that the base has in a measured time, whatever attention is taken to cost. Every
step reads weights."""

MOST_LEARNT = 2.0
"""Largest ratio of measured to predicted time that the correction of a part takes into account."""


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

    samples: the timed steps to which the model is fitted. Steps that run like none of them, such as
        eager ones whose graph has been taken out of service, begin with the bases of others. Only
        if no step of pure decode has been timed, all of these are predicted to take no time, and so
        are steps with prefill if none of them has been timed.
    """

    def __init__(self, samples: Iterable[StepSample] = ()) -> None:
        self.fit(samples)

    def fit(self, samples: Iterable[StepSample]) -> None:
        """Forget everything, and learn from timed steps (see the class)."""
        self._pace = 1.0
        self._ratios = deque([1.0] * WINDOW, maxlen=WINDOW)  # of measured to fitted times
        alike = _by_kind_and_size(samples)
        self._rates = {
            decode: _Rates.fit(
                [
                    same_base
                    for (_, uniform_decode), by_size in alike.items()
                    if uniform_decode is decode
                    for same_base in by_size.values()
                ]
            )
            for decode in (False, True)
        }
        self._bases = {
            kind: _Bases.fit(by_size, self._rates[kind[1]]) for kind, by_size in alike.items()
        }

    def rebase(self, samples: Iterable[StepSample]) -> None:
        """Learn the bases from timed steps of another code of the model, whose attention costs what
        it did. Those of steps that run unlike all of them stay."""
        at_pace = [StepSample(key, work, ms / self._pace) for key, work, ms in samples]
        self._bases = self._bases | {
            kind: _Bases.fit(by_size, self._rates[kind[1]])
            for kind, by_size in _by_kind_and_size(at_pace).items()
        }

    def add(self, samples: Iterable[StepSample]) -> None:
        """Learn the bases of sizes at which no step has been timed before, from steps that have
        been timed since. What is known about other sizes stays, and bounds what is learnt."""
        for key, work, ms in samples:
            bases = self._bases.get(_kind(key))
            if bases is not None and ms > 0:
                base_ms = _base(ms / self._pace, self._rates[key[1].uniform_decode].ms(work))
                bases.add(key[1].num_tokens, base_ms)

    def predict(self, key: GraphKey, work: AttentionWork) -> float:
        """Return the duration in milliseconds of a step, with its epilogue.

        key: the mode in which its model runs, and its padded shape.
        work: the work of its attention.
        """
        return self._pace * self._fitted_ms(key, work)

    def _fitted_ms(self, key: GraphKey, work: AttentionWork) -> float:
        """Return the duration at the pace of 1."""
        kind = _kind(key)
        bases = self._bases.get(kind) or self._begin_kind(kind)
        if bases is None:
            return 0.0
        return bases.at(key[1].num_tokens) + self._rates[kind[1]].ms(work)

    def _begin_kind(self, kind: _Kind) -> _Bases | None:
        """Give steps that run like none that was timed the bases of others, of which the smallest
        steps are known, and return them; None if there are no others. What they take longer is
        learnt when they are served."""
        others = [bases for (_, decode), bases in self._bases.items() if decode is kind[1]]
        if not others:
            return None
        self._bases[kind] = min(others, key=lambda bases: bases.sizes[0]).copy()
        return self._bases[kind]

    def observe(self, sample: StepSample) -> None:
        """Learn from a step that has been served."""
        key, work, ms = sample
        fitted_ms = self._fitted_ms(key, work)
        if ms > 0 and fitted_ms > 0:  # a clock may be too coarse
            self._observe_at_pace(StepSample(key, work, ms / self._pace))
            self._ratios.append(ms / fitted_ms)
            self._pace = median(self._ratios)

    def _observe_at_pace(self, sample: StepSample) -> None:
        bases, size = self._bases[_kind(sample.key)], sample.key[1].num_tokens
        pending = bases.pending[min(bisect_left(bases.sizes, size), len(bases.sizes) - 1)]
        pending.append(sample)
        if len(pending) == WINDOW:
            ratios = sorted((self._ratio(each), index) for index, each in enumerate(pending))
            ratio, index = ratios[WINDOW // 2]
            self._correct(pending[index], min(ratio, MOST_LEARNT))
            pending.clear()

    def _ratio(self, sample: StepSample) -> float:
        """Return the ratio of the measured to the fitted time."""
        fitted_ms = self._fitted_ms(sample.key, sample.work)
        return sample.ms / fitted_ms if fitted_ms else 1.0

    def _correct(self, sample: StepSample, ratio: float) -> None:
        """Move the fitted time of a step towards `ratio` times its value. Each part takes the
        correction in proportion to its share of the time."""
        kind = _kind(sample.key)
        total = self._fitted_ms(sample.key, sample.work)
        if total:
            step = GAIN * (ratio - 1) / total
            self._bases[kind].correct(sample.key[1].num_tokens, step)
            self._rates[kind[1]].correct(sample.work, step)


_Kind = tuple[CUDAGraphMode, bool]
"""The runtime mode of a step, and whether its graph is one of pure decode."""


def _kind(key: GraphKey) -> _Kind:
    return key[0], key[1].uniform_decode


def _by_kind_and_size(
    samples: Iterable[StepSample],
) -> dict[_Kind, dict[int, list[StepSample]]]:
    """Return the samples by the way in which their steps run and by their padded size, without
    those that a clock was too coarse for."""
    found: dict[_Kind, dict[int, list[StepSample]]] = {}
    for sample in samples:
        if sample.ms <= 0:
            continue
        by_size = found.setdefault(_kind(sample.key), {})
        by_size.setdefault(sample.key[1].num_tokens, []).append(sample)
    return found


@dataclass
class _Rates:
    """The costs of attention.

    ms_per_token: the time in which decode rows read the keys and values of a token.
    ms_per_pair: the time of a pair of a query and a key in the attention of prefill.
    width: the number of tokens of a chunk from which on the time is in proportion to its pairs.
    """

    ms_per_token: float
    ms_per_pair: float
    width: float

    @classmethod
    def fit(cls, groups: Sequence[Sequence[StepSample]]) -> _Rates:
        """Return the costs with the least squared error, relative to the measured times.

        groups: the samples of each base.
        """
        # For a given width, the model is linear. The smallest width is taken if others explain the
        # samples no better than that by 0.1%.
        fits = [(*_fit_rates(groups, width), width) for width in WIDTHS]
        _, per_token, per_pair, width = min(fits, key=lambda fit: round(fit[0], 6))
        return cls(per_token, per_pair, width)

    def pairs(self, work: AttentionWork) -> float:
        """Return the number of pairs that take as long as those of a step, if the whole device is
        used."""
        return _full_pairs(work, self.width)

    def ms(self, work: AttentionWork) -> float:
        """Return the time of the attention of a step."""
        return self.ms_per_token * work.decode_context + self.ms_per_pair * self.pairs(work)

    def correct(self, work: AttentionWork, step: float) -> None:
        """Change both rates by `step` for each millisecond that they have in a step."""
        self.ms_per_token *= 1 + step * self.ms_per_token * work.decode_context
        self.ms_per_pair *= 1 + step * self.ms_per_pair * self.pairs(work)


@dataclass
class _Bases:
    """The bases of steps that run alike.

    sizes: the padded numbers of tokens that were measured, ascending. No step is smaller than the
        first of them.
    base_ms: the base at each of these sizes, never descending.
    pending: for each size, the served steps from which nothing has been learnt yet.
    """

    sizes: list[int]
    base_ms: list[float]
    pending: list[list[StepSample]]

    @classmethod
    def fit(cls, by_size: Mapping[int, Sequence[StepSample]], rates: _Rates) -> _Bases:
        """Return the medians of what the attention leaves of the times of each size."""
        sizes = sorted(by_size)
        bases = [
            median(_base(sample.ms, rates.ms(sample.work)) for sample in by_size[size])
            for size in sizes
        ]
        return cls(sizes, _ascending(bases), [[] for _ in sizes])

    def copy(self) -> _Bases:
        """Return the same bases, from which nothing is pending."""
        return _Bases([*self.sizes], [*self.base_ms], [[] for _ in self.sizes])

    def add(self, size: int, base_ms: float) -> None:
        """Set the base at one more size, between those of the next sizes. One that is known
        stays."""
        index = bisect_left(self.sizes, size)
        if size in self.sizes[index : index + 1]:
            return
        least = max(self.base_ms[:index], default=0.0)
        most = min(self.base_ms[index:], default=math.inf)
        self.sizes.insert(index, size)
        self.base_ms.insert(index, min(max(base_ms, least), most))
        self.pending.insert(index, [])

    def at(self, size: int) -> float:
        """Return the base of steps of `size` padded tokens."""
        return sum(share * self.base_ms[index] for index, share in self._neighbours(size))

    def correct(self, size: int, step: float) -> None:
        """Change the bases next to a size by `step` for each millisecond that they have in it."""
        parts = [(index, share * self.base_ms[index]) for index, share in self._neighbours(size)]
        for index, part in parts:
            self._set(index, self.base_ms[index] * (1 + step * part))

    def _set(self, index: int, ms: float) -> None:
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
        Above the largest measured size the base grows in proportion."""
        sizes = self.sizes
        index = bisect_left(sizes, size)
        if index == len(sizes):
            return [(index - 1, size / sizes[-1])]
        if index == 0 or sizes[index] == size:
            return [(index, 1.0)]
        share = (size - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return [(index - 1, 1 - share), (index, share)]


def _base(ms: float, attention_ms: float) -> float:
    """Return what the attention leaves of the time of a step."""
    return max(LEAST_BASE * ms, ms - attention_ms)


def _full_pairs(work: AttentionWork, width: float) -> float:
    """Return the pairs of a step, or those that `width` tokens with as many keys for each as its
    longest prefill row would have, whichever are more."""
    return max(work.prefill_pairs, width * work.longest_prefill)


def _fit_rates(groups: Iterable[Sequence[StepSample]], width: float) -> tuple[float, float, float]:
    """Return how well two rates, the milliseconds per token that decode rows read and per pair,
    explain how the times of samples with one base differ; and the best such rates, neither of them
    negative. The first number is the squared error relative to the measured times, but for a term
    that is the same for all widths.

    groups: the samples of each base.
    """
    # The base is eliminated by taking differences from the weighted mean of the group. What is left
    # is a least squares problem with two unknowns: the normal equations are
    # [tt tp; tp pp] [per_token; per_pair] = [ty; py].
    tt = tp = pp = ty = py = 0.0
    for samples in groups:
        weights = [1 / max(sample.ms, 1e-9) ** 2 for sample in samples]
        tokens = _centred([sample.work.decode_context for sample in samples], weights)
        pairs = _centred([_full_pairs(sample.work, width) for sample in samples], weights)
        times = _centred([sample.ms for sample in samples], weights)
        for weight, token, pair, ms in zip(weights, tokens, pairs, times, strict=True):
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
        a, b = rates
        return a * a * tt + 2 * a * b * tp + b * b * pp - 2 * (a * ty + b * py)

    best = min(candidates, key=squared_error)
    return squared_error(best), *best


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

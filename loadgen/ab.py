"""Compares servers: the order of their runs, the results of each repeat, and which server won.

Knows: what is compared with what, and its formulas in words. Knows nothing of processes, nor of how
a number is printed.

A run is one `records.Leg`. The k-th runs of all servers, a repeat, send the same prompts Pk, which
depend on k, so that no other run sends them: each server sees each prompt once, and its prefix
cache has none of them. The runs of a repeat follow each other directly, in an order that is
reversed each time, so that a steady drift of the machine favours none:

    A(P0) B(P0) C(P0)  C(P1) B(P1) A(P1)  A(P2) B(P2) C(P2)  ...
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple, Self

import msgspec

from loadgen.bootstrap import Ratio
from loadgen.records import Answer, Leg, LevelResult, Load, RunConfig, StoppedBy
from loadgen.stats import LevelSummary, summarize

FORMULAS = {
    "run": "the requests of one level to one server, after their warm-up. The other servers are up "
    "and not asked: one that is busy when idle disturbs its neighbours",
    "repeat": "a run of each server, with the same prompts. No other run has them, so no prompt is "
    "in a server's prefix cache, unless shared prefixes are asked for",
    "order": "reversed in each repeat, so that a steady drift of the machine favours none",
    "value": "median (min..max) over the runs",
    "B / A": "B's value / A's of one repeat; geometric mean (95% bootstrap interval) over the "
    "repeats. Above 1, B took longer, or gave more tokens per second",
    "same answers": "of the requests that succeeded on both servers: those with the same token "
    "ids, or where a server gives none, the same text",
    "won": "by the ratio over all levels, each with the same weight; its interval resamples the "
    "repeats of each level 10,000 times. With few repeats such an interval is too narrow",
}

MIN_REPEATS = 3
MAX_DIFFERENCES = 100
"""Maximum number of differing answers of a run that are described; all are counted."""


class Metric(NamedTuple):
    """A metric that is compared."""

    of: Callable[[LevelSummary], float | None]
    """Reads it from a run. A repeat is left out if a run has no value, or a value of 0."""
    less_is_better: bool


METRICS = {
    "ITL p50 ms": Metric(lambda run: run.itl_ms.p50 if run.itl_ms else None, True),
    "TTFT p50 ms": Metric(lambda run: run.ttft_ms.p50 if run.ttft_ms else None, True),
    "tok/s": Metric(lambda run: run.output_tokens_per_s, False),
}


class Side(msgspec.Struct, frozen=True):
    """One of the servers."""

    label: str
    command: list[str] | None
    """The command by which it was started; None for one that was running."""
    ready_s: float | None
    """Seconds from its start until it was ready. Each server is started when the last is ready, and
    finds files that both read in the page cache."""
    simulated_launch_us: float
    config: RunConfig


class Difference(msgspec.Struct, frozen=True):
    """The place at which the two answers to the request `index` begin to differ: at index
    `position`, counted in `unit`, which is token or character."""

    index: int
    position: int
    unit: str


class Agreement(msgspec.Struct, frozen=True):
    """The answers of one server beside those of the first."""

    answers: int
    """Number of requests that succeeded on both servers."""
    same: int
    differences: list[Difference]

    @classmethod
    def of(cls, first: LevelResult, other: LevelResult) -> Self:
        """Compare the answers of two runs with the same prompts."""
        found = list(_differences(first, other))
        differ = [difference for difference in found if difference is not None]
        return cls(len(found), found.count(None), differ[:MAX_DIFFERENCES])


class Repeat(msgspec.Struct, frozen=True):
    """A run of each server with the same requests."""

    runs: list[LevelSummary]
    """The runs, in the order of the servers."""
    agreements: list[Agreement]
    """Those of all servers but the first."""


class Spread(msgspec.Struct, frozen=True):
    """The median of some values, the least and the greatest."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of `values`, at least one."""
        return cls(median(values), min(values), max(values))


class Compared(msgspec.Struct, frozen=True):
    """One metric at one level."""

    values: list[list[float]]
    """The values of each repeat, in the order of the servers."""
    spreads: list[Spread]
    """The spread of each server's values."""
    ratios: list[Ratio]
    """The ratios of all servers but the first to the first."""

    @classmethod
    def of(cls, values: list[list[float]]) -> Self:
        """Compare the values of repeats, at least one."""
        sides = list(zip(*values, strict=True))
        first, *others = sides
        return cls(
            values,
            [Spread.of(side) for side in sides],
            [Ratio.of([[b / a for a, b in zip(first, other, strict=True)]]) for other in others],
        )


class Level(msgspec.Struct, frozen=True):
    """The results of all repeats at one level."""

    concurrency: int | None
    request_rate: float | None
    metrics: dict[str, Compared]
    repeats: list[Repeat]

    @property
    def load(self) -> Load:
        """The load of all servers."""
        return Load(self.concurrency, self.request_rate)

    def agreement(self, side: int) -> tuple[int, int]:
        """Return how many answers of a server, other than the first, were the same as the first's,
        and how many were compared: (same, compared)."""
        found = [repeat.agreements[side - 1] for repeat in self.repeats]
        return sum(x.same for x in found), sum(x.answers for x in found)

    @classmethod
    def of(cls, repeats: Sequence[Repeat]) -> list[Self]:
        """Return one level for each load of the repeats."""
        groups: dict[Load, list[Repeat]] = {}
        for repeat in repeats:
            groups.setdefault(repeat.runs[0].load, []).append(repeat)
        levels = []
        for load, group in groups.items():
            metrics = {}
            for name, metric in METRICS.items():
                rows = [
                    [value for run in repeat.runs if (value := metric.of(run))] for repeat in group
                ]
                if whole := [row for row in rows if len(row) == len(group[0].runs)]:
                    metrics[name] = Compared.of(whole)
            levels.append(cls(load.concurrency, load.request_rate, metrics, group))
        return levels


def order(*configs: RunConfig) -> list[Leg]:
    """Return the runs of servers, whose configurations have the same loads, in the order that the
    module's docstring describes."""
    repeats = enumerate(zip(*map(Leg.of, configs), strict=True))
    return [leg for k, legs in repeats for leg in legs[:: -1 if k % 2 else 1]]


def repeats(results: Iterator[LevelResult], sides: int) -> Iterator[Repeat]:
    """Join the results of the runs in `order` to repeats as they come, so that the answers of few
    runs are in memory at a time. A repeat that an interrupt has cut short is left out."""
    for k, runs in enumerate(zip(*[results] * sides, strict=True)):
        if any(run.stopped_by is StoppedBy.INTERRUPT for run in runs):
            continue
        first, *others = runs[:: -1 if k % 2 else 1]
        yield Repeat(
            [summarize(run) for run in (first, *others)],
            [Agreement.of(first, other) for other in others],
        )


def verdict(labels: Sequence[str], levels: Sequence[Level]) -> str:
    """Return one sentence that says which server won by how much, in the first metric that all
    levels have; empty if there is none."""
    names = [name for name in METRICS if levels and all(name in level.metrics for level in levels)]
    if not names:
        return ""
    name = names[0]
    said = name.removesuffix(" ms")
    found = [level.metrics[name] for level in levels]
    to_first = [_over(found, at, 0).mean for at in range(len(labels))]
    pick = min if METRICS[name].less_is_better else max
    best = to_first.index(pick(to_first))
    others = [at for at in range(len(labels)) if at != best]
    ratios = {at: _over(found, best, at) for at in others}
    repeats = min(len(compared.values) for compared in found)
    closest = min(others, key=lambda at: abs(ratios[at].mean - 1))
    where = ", ".join(level.load.short for level in levels)
    over = f"over {repeats} repeats at {levels[0].load if len(levels) == 1 else 'loads ' + where}"
    if ratios[closest].is_one:
        return (
            f"No server won: the {said} of {labels[best]} was {_change(ratios[closest])} that of "
            f"{labels[closest]} {over}, so their difference may be chance."
        )
    than = " and ".join(f"{_change(ratios[at])} that of {labels[at]}" for at in others)
    return f"{labels[best]} won: its {said} was {than} {over}."


def _over(found: Sequence[Compared], of: int, to: int) -> Ratio:
    """Return the ratio of two servers over all levels."""
    return Ratio.of([[row[of] / row[to] for row in compared.values] for compared in found])


def _change(ratio: Ratio) -> str:
    """Say a ratio as a change in percent, with its interval."""
    low, mean, high = (100 * (value - 1) for value in (ratio.low, ratio.mean, ratio.high))
    if mean < 0:
        low, high = -high, -low
    word = "below" if mean < 0 else "above"
    return f"{abs(mean):.1f}% (95% interval {low:.1f}% to {high:.1f}%) {word}"


def _differences(a: LevelResult, b: LevelResult) -> Iterable[Difference | None]:
    """Yield, for each request that succeeded on both servers, the difference of its answers; None
    if they are the same."""
    answers = {
        (record.index, record.turn): record.answer for record in a.records if record.failure is None
    }
    for record in b.records:
        one, other = answers.get((record.index, record.turn)), record.answer
        if record.failure is None and one is not None and other is not None:
            parting = first_difference(one, other)
            yield None if parting is None else Difference(record.index, *parting)


def first_difference(one: Answer, other: Answer) -> tuple[int, str] | None:
    """Return (position, "token" or "character") at which two answers begin to differ; None if they
    are the same."""
    ids = one.token_ids and other.token_ids
    x: Sequence[object] = one.token_ids if ids else one.text
    y: Sequence[object] = other.token_ids if ids else other.text
    if x == y:
        return None
    parting = (at for at, (left, right) in enumerate(zip(x, y, strict=False)) if left != right)
    return next(parting, min(len(x), len(y))), "token" if ids else "character"

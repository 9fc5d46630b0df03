"""Compares two servers: the order of their runs, and the results of each pair of runs.

Knows: what is compared with what, and its formulas in words. Knows nothing of processes, nor of how
a number is printed.

A run is one `records.Leg`. The k-th runs of A and B send the same prompts Pk, which depend on k, so
that no other run sends them: each server sees each prompt once, and its prefix cache has none of
them. The two runs follow each other directly, and A and B take turns in being first:

    A(P0) B(P0)  B(P1) A(P1)  A(P2) B(P2)  B(P3) A(P3)  ...
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from statistics import median
from typing import Self

import msgspec

from loadgen.records import Answer, Leg, LevelResult, RunConfig, StoppedBy
from loadgen.stats import LevelSummary, summarize

FORMULAS = {
    "run": "the requests of one concurrency to one server, after their warm-up. The other server "
    "is up and not asked: one that is busy when idle disturbs its neighbour",
    "pair": "a run of A and the next of B, or the reverse, with the same prompts. No other run has "
    "them, so no prompt is in a server's prefix cache",
    "order": "A B B A in each round, so that a steady drift of the machine favours neither",
    "A, B": "median (min..max) over the runs",
    "B / A": "B's value / A's of one pair; median (min..max) over the pairs. Above 1, B took "
    "longer, or gave more tokens per second",
    "same answers": "of the requests that succeeded on both sides: those with the same token ids, "
    "or where a server gives none, the same text",
}

MAX_DIFFERENCES = 100
"""Maximum number of differing answers of a pair that are described; all are counted."""

METRICS: dict[str, Callable[[LevelSummary], float | None]] = {
    "ITL p50 ms": lambda run: run.itl_ms.p50 if run.itl_ms else None,
    "TTFT p50 ms": lambda run: run.ttft_ms.p50 if run.ttft_ms else None,
    "tok/s": lambda run: run.output_tokens_per_s,
}
"""The metrics that are compared, each with the function that reads it from a run. A pair is left
out of a metric if one of its runs has no value, or a value of 0."""


class Side(msgspec.Struct, frozen=True):
    """One of the two servers."""

    label: str
    command: list[str]
    ready_s: float
    """Seconds from the start of the server until it was ready. B is started when A is ready, and
    finds files that both read in the page cache."""
    simulated_launch_us: float
    config: RunConfig


class Difference(msgspec.Struct, frozen=True):
    """The place at which the two answers to the request `index` begin to differ: at index
    `position`, counted in `unit`, which is token or character."""

    index: int
    position: int
    unit: str


class Pair(msgspec.Struct, frozen=True):
    """Two runs with the same requests, and their answers side by side."""

    a: LevelSummary
    b: LevelSummary
    answers: int
    """Number of requests that succeeded on both sides."""
    same_answers: int
    differences: list[Difference]


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
    """One metric at one concurrency: its values on both sides, and their ratios B / A."""

    a: Spread
    b: Spread
    ratio: Spread


class Level(msgspec.Struct, frozen=True):
    """The results of all pairs at one concurrency."""

    concurrency: int
    answers: int
    same_answers: int
    metrics: dict[str, Compared]
    pairs: list[Pair]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> list[Self]:
        """Return one level for each concurrency of the pairs."""
        groups: dict[int, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(pair.a.concurrency, []).append(pair)
        return [
            cls(
                concurrency,
                sum(pair.answers for pair in group),
                sum(pair.same_answers for pair in group),
                {
                    name: Compared(
                        Spread.of([a for a, _ in values]),
                        Spread.of([b for _, b in values]),
                        Spread.of([b / a for a, b in values]),
                    )
                    for name, of in METRICS.items()
                    if (values := [(a, b) for p in group if (a := of(p.a)) and (b := of(p.b))])
                },
                group,
            )
            for concurrency, group in groups.items()
        ]


def order(a: RunConfig, b: RunConfig) -> list[Leg]:
    """Return the runs of A and B, whose configurations have the same concurrencies, in the order
    that the module's docstring describes."""
    pairs = enumerate(zip(Leg.of(a), Leg.of(b), strict=True))
    return list(chain.from_iterable(pair[:: -1 if k % 2 else 1] for k, pair in pairs))


def pairs(results: Iterator[LevelResult]) -> Iterator[Pair]:
    """Join the results of the runs in `order` to pairs as they come, so that the answers of few
    runs are in memory at a time. A pair that an interrupt has cut short is left out."""
    for k, (first, second) in enumerate(zip(results, results, strict=True)):
        if second.stopped_by is StoppedBy.INTERRUPT:
            continue
        a, b = (second, first) if k % 2 else (first, second)
        found = list(_differences(a, b))
        differ = [difference for difference in found if difference is not None]
        yield Pair(
            summarize(a), summarize(b), len(found), found.count(None), differ[:MAX_DIFFERENCES]
        )


def _differences(a: LevelResult, b: LevelResult) -> Iterable[Difference | None]:
    """Yield, for each request that succeeded on both sides, the difference of its answers; None if
    they are the same."""
    answers = {record.index: record.answer for record in a.records if record.failure is None}
    for record in b.records:
        one, other = answers.get(record.index), record.answer
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

"""Computes latencies of one request, and percentiles and summaries of samples.

Knows: the formulas of ITL and TPOT, weighted percentiles, and which requests decoded at the same
time. Knows nothing of levels.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Self

import msgspec
import numpy as np

from loadgen.records import RequestRecord


class Distribution(msgspec.Struct, frozen=True):
    """A summary of samples, in their unit; `count` is the number of samples."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[tuple[float, float]]) -> Self | None:
        """Summarise samples, which are (value, weight) pairs with positive weights; None if there
        are none."""
        ordered = sorted(samples)
        if not ordered:
            return None
        p50, p90, p99 = percentiles(ordered, (50, 90, 99))
        return cls(
            count=len(ordered),
            mean=sum(value * weight for value, weight in ordered)
            / sum(weight for _, weight in ordered),
            min=ordered[0][0],
            p50=p50,
            p90=p90,
            p99=p99,
            max=ordered[-1][0],
        )


def percentiles(ordered: Sequence[tuple[float, float]], ranks: Sequence[float]) -> list[float]:
    """Return, for each rank, the smallest value up to which at least that share of the weight lies.

    ordered: (value, weight) pairs in ascending order.
    ranks: percentages in ascending order.
    """
    total = sum(weight for _, weight in ordered)
    found: list[float] = []
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        # NOTE: sums of weights have rounding errors; with the tolerance p50 of 10 samples is always
        # the fifth.
        while len(found) < len(ranks) and reached >= total * (ranks[len(found)] / 100 - 1e-9):
            found.append(value)
    return found


def itl_samples_ms(record: RequestRecord) -> list[tuple[float, float]]:
    """Return (ITL in ms, number of tokens) for each gap between neighbouring chunks with tokens.

    A chunk may have several tokens: a gap stands for all tokens of the chunk that ends it, and each
    of them took an equal part of the gap. So the weighted mean is (last chunk - first chunk) /
    (tokens after the first chunk), however tokens are grouped into chunks.
    """
    gaps = pairwise(record.chunk_times_s)
    return [
        ((late - early) * 1e3 / tokens, tokens)
        for (early, late), tokens in zip(gaps, record.chunk_tokens[1:], strict=True)
        if tokens > 0
    ]


def tpot_ms(record: RequestRecord) -> float | None:
    """Return the milliseconds per output token after the first chunk; None if the first chunk
    brought all tokens, or there was none."""
    if record.ttft_s is None or record.later_tokens <= 0:
        return None
    return (record.e2e_s - record.ttft_s) * 1e3 / record.later_tokens


class BatchITL(msgspec.Struct, frozen=True):
    """The ITL while a number of requests decoded."""

    tokens: float
    """Number of tokens that came then."""
    p50_ms: float


def itl_by_batch(records: Sequence[RequestRecord]) -> dict[int, BatchITL]:
    """Return the ITL for each number of requests that decode at the same time, as the client sees
    them: a request decodes from its first chunk with tokens to its last, and a gap belongs to the
    number at its middle."""
    decoding = [record.chunk_times_s for record in records if len(record.chunk_times_s) > 1]
    begins = np.sort([times[0] for times in decoding])
    ends = np.sort([times[-1] for times in decoding])
    samples: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        times = np.asarray(record.chunk_times_s)
        middles = (times[1:] + times[:-1]) / 2
        batches = np.searchsorted(begins, middles, "right") - np.searchsorted(ends, middles, "left")
        tokens = np.asarray(record.chunk_tokens[1:])
        for batch, sample in zip(batches[tokens > 0].tolist(), itl_samples_ms(record), strict=True):
            samples.setdefault(batch, []).append(sample)
    return {
        batch: BatchITL(sum(weight for _, weight in found), percentiles(sorted(found), (50,))[0])
        for batch, found in sorted(samples.items())
    }

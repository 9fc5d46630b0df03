"""Service level objectives: limits on the latencies of one request, and how many requests met them.

Knows: which latencies may be limited, and goodput. Knows nothing of HTTP, nor of how a number is
printed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from loadgen.records import Objective, RequestRecord
from loadgen.samples import itl_samples_ms, percentiles, tpot_ms


def _ttft_ms(record: RequestRecord) -> float | None:
    return None if record.ttft_s is None else record.ttft_s * 1e3


def _itl_p99_ms(record: RequestRecord) -> float | None:
    samples = sorted(itl_samples_ms(record))
    return percentiles(samples, (99,))[0] if samples else None


LATENCIES: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft": _ttft_ms,
    "itl": _itl_p99_ms,
    "tpot": tpot_ms,
    "e2e": lambda record: record.e2e_s * 1e3,
}
"""The latencies that an objective may limit, in milliseconds; `itl` is the p99 of one request."""


class Goodput(msgspec.Struct, frozen=True):
    """How many requests met all objectives."""

    attained: int
    """Number of requests that succeeded and met every objective."""
    requests: int
    """Number of requests, failures included."""
    requests_per_s: float
    """The goodput: `attained` / window."""
    missed: dict[str, int]
    """Number of successful requests that missed each objective."""

    @property
    def attainment(self) -> float:
        """The share of requests that met all objectives; 1 without requests."""
        return self.attained / self.requests if self.requests else 1.0

    @classmethod
    def of(
        cls, records: Sequence[RequestRecord], objectives: Sequence[Objective], window_s: float
    ) -> Self:
        """Count the requests of a level. A latency that a request does not have, such as the ITL of
        a single token, meets its objective."""
        missed = dict.fromkeys(map(str, objectives), 0)
        attained = 0
        for record in records:
            if record.failure is not None:
                continue
            misses = Counter(
                str(objective)
                for objective in objectives
                if (found := LATENCIES[objective.latency](record)) is not None
                and found > objective.limit_ms
            )
            attained += not misses
            for name in misses:
                missed[name] += 1
        rate = attained / window_s if window_s > 0 else 0.0
        return cls(attained, len(records), rate, missed)

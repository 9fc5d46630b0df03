"""What API workers count of their requests: ends, times, and numbers of tokens.

Every API worker counts in its own row of one file that all of them map, so that any of them answers
a scrape with the sum over all, and a worker that replaces a dead one counts on in its row. To count
is to add to a number in memory: there is no lock, as each row has one writer, and no message.

Knows: the names, the buckets and the layout of what is counted, and prometheus-client. Knows
nothing of the engine's counters.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from minisrv import vllm_metrics
from minisrv.processes import map_shared

_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    *(0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0),
    *vllm_metrics.FIRST_TOKEN_BUCKETS,
)
_GAP_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02),
    *(0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0),
    *vllm_metrics.GAP_BUCKETS,
)
_REQUEST_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    *(2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0),
    *vllm_metrics.REQUEST_BUCKETS,
)
_TOKEN_BUCKETS = tuple(float(digit * 10**power) for power in range(9) for digit in (1, 2, 5))
_N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)

_REASONS = ("stop", "length")
_STATUSES = range(400, 600)


@dataclass(frozen=True, slots=True)
class EndedChoice:
    """What is counted of a choice that ended with a finish reason; times are in seconds.

    latency: from the arrival of its request to its end.
    queue: from its arrival at the engine to the launch of its first step.
    prefill: from there to its first output.
    decode: from its first output to its last one.
    max_tokens: the most tokens that it might have had; None for as many as the context holds.
    """

    reason: str
    latency: float
    queue: float
    prefill: float
    decode: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    max_tokens: int | None


class _Shape(NamedTuple):
    """A histogram: its name without prefix, its meaning, the upper bounds of its buckets, and
    whether only those that a request can reach are shown."""

    name: str
    help: str
    bounds: tuple[float, ...]
    counts_tokens: bool = False


_HISTOGRAMS = (
    _Shape(
        "time_to_first_token_seconds",
        "From the request's arrival to the first output of a choice.",
        _FIRST_TOKEN_BUCKETS,
    ),
    _Shape(
        "inter_token_latency_seconds",
        "Between two outputs of a choice, divided by the tokens of the second.",
        _GAP_BUCKETS,
    ),
    _Shape(
        "e2e_request_latency_seconds",
        "From the request's arrival to the end of a choice.",
        _REQUEST_BUCKETS,
    ),
    _Shape(
        "request_queue_time_seconds",
        "From a choice's arrival at the engine to the launch of its first step.",
        _REQUEST_BUCKETS,
    ),
    _Shape(
        "request_prefill_time_seconds",
        "From the launch of a choice's first step to its first output.",
        _REQUEST_BUCKETS,
    ),
    _Shape(
        "request_decode_time_seconds",
        "From the first output of a choice to its last one.",
        _REQUEST_BUCKETS,
    ),
    _Shape(
        "request_inference_time_seconds",
        "From the launch of a choice's first step to its last output.",
        _REQUEST_BUCKETS,
    ),
    _Shape(
        "request_time_per_output_token_seconds",
        "Average time of a choice's tokens after the first.",
        _GAP_BUCKETS,
    ),
    _Shape("request_prompt_tokens", "Prompt tokens of a choice.", _TOKEN_BUCKETS, True),
    _Shape("request_generation_tokens", "Tokens of a choice.", _TOKEN_BUCKETS, True),
    _Shape(
        "request_prefill_kv_computed_tokens",
        "Prompt tokens of a choice that were not in the prefix cache.",
        _TOKEN_BUCKETS,
        True,
    ),
    _Shape(
        "request_max_num_generation_tokens",
        "Tokens of the longest choice of a prompt.",
        _TOKEN_BUCKETS,
        True,
    ),
    _Shape(
        "request_params_max_tokens", "Most tokens that a choice may have.", _TOKEN_BUCKETS, True
    ),
    _Shape("request_params_n", "Choices of a prompt.", _N_BUCKETS),
)


class _Rows:
    """A row of numbers for each worker; all numbers start at zero.

    path: a file that all workers map, which the first one makes; None keeps the numbers in this
        process.
    length: the numbers in a row.
    worker: the index of this worker, which writes to the row `own`.
    workers: the number of workers.
    """

    def __init__(self, path: Path | None, length: int, worker: int, workers: int) -> None:
        size = 8 * length * workers
        numbers = mmap.mmap(-1, size) if path is None else map_shared(path, size)
        everything = memoryview(numbers).cast("d")
        self.rows = [everything[n * length : (n + 1) * length] for n in range(workers)]
        self.own = self.rows[worker]

    def total(self, place: int) -> float:
        """Return the sum over all workers of the number at index `place`."""
        return sum(row[place] for row in self.rows)


class _Histogram:
    """A histogram in a row: the counts by bucket, and behind them the sum of what was observed.

    place: the index in the row at which it begins.
    bounds: the upper bounds of the buckets, ascending; one more bucket has no bound.
    """

    def __init__(self, rows: _Rows, place: int, bounds: Sequence[float]) -> None:
        self._rows, self._place, self._bounds = rows, place, bounds
        self._sum = place + len(bounds) + 1

    @staticmethod
    def length(bounds: Sequence[float]) -> int:
        return len(bounds) + 2

    def observe(self, number: float) -> None:
        own = self._rows.own
        own[self._place + bisect_left(self._bounds, number)] += 1
        own[self._sum] += number

    def family(self, name: str, help_text: str, highest: float) -> HistogramMetricFamily:
        """Return the sum over all workers.

        highest: the highest bound that is shown.
        """
        bounds = (*self._bounds, math.inf)
        places = range(self._place, self._sum)
        counts = accumulate(map(self._rows.total, places))
        buckets = [
            (shown, count)
            for bound, shown, count in zip(
                bounds, map(floatToGoString, bounds), counts, strict=True
            )
            if bound <= highest or bound == math.inf
        ]
        return HistogramMetricFamily(name, help_text, buckets, self._rows.total(self._sum))


class RequestMetrics:
    """The counts of all API workers, of which one counts here.

    path: the file in which all workers count; None for a worker that is alone.
    worker: the index of this worker.
    workers: the number of workers.
    """

    def __init__(self, path: Path | None = None, *, worker: int = 0, workers: int = 1) -> None:
        all_bounds = [sorted(set(shape.bounds)) for shape in _HISTOGRAMS]
        places, length = [], 1 + len(_REASONS) + len(_STATUSES)
        for bounds in all_bounds:
            places.append(length)
            length += _Histogram.length(bounds)
        self._rows = _Rows(path, length, worker, workers)
        self._histograms = {
            shape.name: _Histogram(self._rows, place, bounds)
            for shape, place, bounds in zip(_HISTOGRAMS, places, all_bounds, strict=True)
        }
        self.first_token = self._histograms["time_to_first_token_seconds"].observe
        """Count the first output of a choice; the argument is the time since the arrival of its
        request in seconds."""
        self.gap = self._histograms["inter_token_latency_seconds"].observe
        """Count another token of a choice; the argument is the time since the one before in
        seconds."""

    def arrived(self) -> None:
        """Count an HTTP request, whatever its path."""
        self._rows.own[0] += 1

    def ended(self, choice: EndedChoice) -> None:
        """Count a choice that ended with a finish reason."""
        self._rows.own[1 + _REASONS.index(choice.reason)] += 1
        numbers: dict[str, float] = {
            "e2e_request_latency_seconds": choice.latency,
            "request_queue_time_seconds": choice.queue,
            "request_prefill_time_seconds": choice.prefill,
            "request_decode_time_seconds": choice.decode,
            "request_inference_time_seconds": choice.prefill + choice.decode,
            "request_prompt_tokens": choice.num_prompt_tokens,
            "request_generation_tokens": choice.num_generated_tokens,
            "request_prefill_kv_computed_tokens": (
                choice.num_prompt_tokens - choice.num_cached_tokens
            ),
        }
        if choice.num_generated_tokens > 1:
            average = choice.decode / (choice.num_generated_tokens - 1)
            numbers["request_time_per_output_token_seconds"] = average
        if choice.max_tokens is not None:
            numbers["request_params_max_tokens"] = choice.max_tokens
        for name, number in numbers.items():
            self._histograms[name].observe(number)

    def prompt_ended(self, n: int, num_generated_tokens: int) -> None:
        """Count a prompt all of whose `n` choices have ended.

        num_generated_tokens: the number of tokens of the longest choice.
        """
        self._histograms["request_params_n"].observe(n)
        self._histograms["request_max_num_generation_tokens"].observe(num_generated_tokens)

    def failed(self, status: int) -> None:
        """Count a request that ended with an error, by its HTTP status."""
        self._rows.own[1 + len(_REASONS) + _STATUSES.index(status)] += 1

    def families(self, max_model_len: int) -> Iterator[Metric]:
        """Return the sums over all workers.

        max_model_len: the most tokens of a request; buckets of tokens above it are not shown.
        """
        total = self._rows.total
        requests = CounterMetricFamily(
            "minisrv:http_requests", "HTTP requests, by the API worker.", labels=["worker"]
        )
        for worker, row in enumerate(self._rows.rows):
            requests.add_metric([str(worker)], row[0])
        yield requests
        success = CounterMetricFamily(
            "minisrv:request_success",
            "Choices that ended with a finish reason.",
            labels=["finished_reason"],
        )
        for place, reason in enumerate(_REASONS, 1):
            success.add_metric([reason], total(place))
        yield success
        failure = CounterMetricFamily(
            "minisrv:request_failure",
            "Requests that ended with an error, by HTTP status; 499: the client went away.",
            labels=["status"],
        )
        for place, status in enumerate(_STATUSES, 1 + len(_REASONS)):
            if number := total(place):
                failure.add_metric([str(status)], number)
        yield failure
        for shape in _HISTOGRAMS:
            highest = max_model_len if shape.counts_tokens else math.inf
            histogram = self._histograms[shape.name]
            yield histogram.family(f"minisrv:{shape.name}", shape.help, highest)

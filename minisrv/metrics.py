"""The Prometheus metrics: the engine's counters, and the API workers' counts of their requests.

Every API worker counts in its own row of one file that all of them map, so that any of them answers
a scrape with the sum over all, and a worker that replaces a dead one counts on in its row. To count
is to add to a number in memory: there is no lock, as each row has one writer, and no message.

Knows: prometheus-client and the names of the series, which are vLLM's where vLLM has the same. For
a scrape it is given a snapshot of the engine's counters. Knows nothing of where that comes from.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from minisrv.processes import map_shared

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    *(0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0),
)
_GAP_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02),
    *(0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0),
)
_REQUEST_BUCKETS = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    *(2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0),
)


class StepCountLike(Protocol):
    """The number of steps that ran in one mode for one reason since the start, and of their real
    and padding tokens."""

    @property
    def mode(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def padded_tokens(self) -> int: ...


class CompilationLike(Protocol):
    """Which generation of code and graphs serves, and what has become of compiled code."""

    @property
    def generation(self) -> int: ...
    @property
    def swaps(self) -> int: ...
    @property
    def refusals(self) -> Mapping[str, int]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...


class SleepLike(Protocol):
    """Whether an engine sleeps: the level, 0 if it is awake, and the seconds that the last sleep
    and the last waking up took to be complete."""

    @property
    def level(self) -> int: ...
    @property
    def sleep_seconds(self) -> float: ...
    @property
    def wake_up_seconds(self) -> float: ...


class LadderLike(Protocol):
    """The graphs that serve, those that were refused, and the number of those to come."""

    @property
    def graphs(self) -> int: ...
    @property
    def missing(self) -> int: ...
    @property
    def refused(self) -> Mapping[str, str]: ...
    @property
    def decode(self) -> Sequence[int]: ...
    @property
    def mixed(self) -> Sequence[int]: ...
    @property
    def epilogues(self) -> Sequence[int]: ...


class BudgetCountLike(Protocol):
    """The number of steps whose number of prompt tokens was chosen for one reason since the start,
    and of their prompt tokens."""

    @property
    def reason(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class ErrorHistogramLike(Protocol):
    """The relative errors of predicted step times since the start: the bounds of the buckets, the
    number of steps in each and in one without bound, and the sum of all errors."""

    @property
    def bounds(self) -> Sequence[float]: ...
    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def total(self) -> float: ...


class StatsLike(Protocol):
    """A snapshot of the engine's state and counters; the counters begin at the start."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def prefix_cache_queries(self) -> int: ...
    @property
    def prefix_cache_hits(self) -> int: ...
    @property
    def gpu_busy_ms(self) -> float: ...
    @property
    def gpu_idle_ms(self) -> float: ...
    @property
    def steps(self) -> Sequence[StepCountLike]: ...
    @property
    def compiled_steps(self) -> int: ...
    @property
    def itl_target_ms(self) -> float: ...
    @property
    def budgets(self) -> Sequence[BudgetCountLike]: ...
    @property
    def step_time_errors(self) -> ErrorHistogramLike: ...
    @property
    def compilation(self) -> CompilationLike: ...
    @property
    def sleep(self) -> SleepLike: ...
    @property
    def ladder(self) -> LadderLike: ...
    @property
    def longest_turn_seconds(self) -> float: ...


_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's names of the levels of sleep, from 0 on."""

_REASONS = ("stop", "length")
_STATUSES = range(400, 600)


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
    bounds: the upper bounds of the buckets in seconds; one more bucket has no bound.
    """

    def __init__(self, rows: _Rows, place: int, bounds: Sequence[float]) -> None:
        self._rows, self._place, self._bounds = rows, place, bounds
        self._sum = place + len(bounds) + 1

    @staticmethod
    def length(bounds: Sequence[float]) -> int:
        return len(bounds) + 2

    def observe(self, seconds: float) -> None:
        own = self._rows.own
        own[self._place + bisect_left(self._bounds, seconds)] += 1
        own[self._sum] += seconds

    def family(self, name: str, help_text: str) -> HistogramMetricFamily:
        buckets, count = [], 0.0
        for offset, bound in enumerate((*map(str, self._bounds), "+Inf")):
            count += self._rows.total(self._place + offset)
            buckets.append((bound, count))
        return HistogramMetricFamily(name, help_text, buckets, self._rows.total(self._sum))


class Metrics:
    """All metrics of a server, as one API worker counts and renders them.

    path: the file in which all workers count; None for a worker that is alone.
    worker: the index of this worker.
    workers: the number of workers.
    """

    def __init__(self, path: Path | None = None, *, worker: int = 0, workers: int = 1) -> None:
        bounds = (_FIRST_TOKEN_BUCKETS, _GAP_BUCKETS, _REQUEST_BUCKETS)
        places, length = [], 1 + len(_REASONS) + len(_STATUSES)
        for each in bounds:
            places.append(length)
            length += _Histogram.length(each)
        self._rows = _Rows(path, length, worker, workers)
        self._first_token, self._gap, self._request = (
            _Histogram(self._rows, *pair) for pair in zip(places, bounds, strict=True)
        )
        self.first_token = self._first_token.observe
        """Count the first output of a choice; the argument is the time since the arrival of its
        request in seconds."""
        self.gap = self._gap.observe
        """Count another token of a choice; the argument is the time since the one before in
        seconds."""

    def arrived(self) -> None:
        """Count an HTTP request, whatever its path."""
        self._rows.own[0] += 1

    def finished(self, reason: str, seconds: float) -> None:
        """Count a choice that ended with the finish reason `reason`, so many seconds after its
        request arrived."""
        self._rows.own[1 + _REASONS.index(reason)] += 1
        self._request.observe(seconds)

    def failed(self, status: int) -> None:
        """Count a request that ended with an error, by its HTTP status."""
        self._rows.own[1 + len(_REASONS) + _STATUSES.index(status)] += 1

    def render(
        self, stats: StatsLike, state: str, states: Sequence[str], simulated_launch_us: float
    ) -> bytes:
        """Return all metrics in Prometheus' text format (CONTENT_TYPE).

        stats: the engine's counters.
        state: the state of the engine, one of `states`.
        states: the names of all states of an engine.
        simulated_launch_us: microseconds that the engine adds to every launch.
        """
        engine = _engine_families(stats, state, states, simulated_launch_us)
        registry = CollectorRegistry()
        registry.register(_Families([*engine, *self._families()]))
        return generate_latest(registry)

    def _families(self) -> Iterator[Metric]:
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
            if number := total(place):
                success.add_metric([reason], number)
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
        yield self._first_token.family(
            "minisrv:time_to_first_token_seconds",
            "From the request's arrival to the first output of a choice.",
        )
        yield self._gap.family(
            "minisrv:inter_token_latency_seconds",
            "Between two outputs of a choice, divided by the tokens of the second.",
        )
        yield self._request.family(
            "minisrv:e2e_request_latency_seconds",
            "From the request's arrival to the end of a choice.",
        )


class _Families(Collector):
    """A collector of the given metric families, as `generate_latest` wants them in a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._found = families

    def collect(self) -> list[Metric]:
        return self._found


def _engine_families(
    stats: StatsLike, state: str, states: Sequence[str], simulated_launch_us: float
) -> Iterator[Metric]:
    by_step = ["mode", "reason"]
    steps = CounterMetricFamily(
        "minisrv:graph_steps", "Steps, by the mode they ran in and why.", labels=by_step
    )
    tokens = CounterMetricFamily(
        "minisrv:step_tokens", "Real tokens computed in those steps.", labels=by_step
    )
    padded = CounterMetricFamily(
        "minisrv:padded_tokens", "Padding tokens computed in those steps.", labels=by_step
    )
    for step in stats.steps:
        labels = [step.mode, step.reason]
        steps.add_metric(labels, step.steps)
        tokens.add_metric(labels, step.tokens)
        padded.add_metric(labels, step.padded_tokens)
    yield from (steps, tokens, padded)
    yield CounterMetricFamily(
        "minisrv:compiled_steps", "Steps that ran by compiled code.", stats.compiled_steps
    )
    yield from _budget_families(stats)
    yield from _compilation_families(stats.compilation)
    yield from _sleep_families(stats.sleep)
    yield from _ladder_families(stats)
    yield GaugeMetricFamily("minisrv:num_requests_running", "Requests running.", stats.running)
    yield GaugeMetricFamily(
        "minisrv:num_requests_waiting", "Requests waiting to run.", stats.waiting
    )
    yield GaugeMetricFamily(
        "minisrv:kv_cache_usage_perc",
        "Used share of the KV cache's blocks, from 0 to 1.",
        stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
    )
    yield CounterMetricFamily("minisrv:num_preemptions", "Requests preempted.", stats.preemptions)
    yield CounterMetricFamily(
        "minisrv:prompt_tokens", "Prompt tokens of accepted requests.", stats.prompt_tokens
    )
    yield CounterMetricFamily(
        "minisrv:generation_tokens", "Tokens generated.", stats.generated_tokens
    )
    yield CounterMetricFamily(
        "minisrv:prefix_cache_queries",
        "Prompt tokens of admitted requests, looked up in the prefix cache.",
        stats.prefix_cache_queries,
    )
    yield CounterMetricFamily(
        "minisrv:prefix_cache_hits",
        "Prompt tokens found in the prefix cache, so not computed.",
        stats.prefix_cache_hits,
    )
    yield CounterMetricFamily(
        "minisrv:gpu_busy_seconds",
        "Seconds in which the GPU ran steps, from their launch on.",
        stats.gpu_busy_ms / 1000,
    )
    yield CounterMetricFamily(
        "minisrv:gpu_idle_seconds",
        "Seconds between two steps in which requests had work and the GPU none: it waited for "
        "the host.",
        stats.gpu_idle_ms / 1000,
    )
    yield GaugeMetricFamily(
        "minisrv:simulated_launch_us",
        "Microseconds added to every launch. Other than 0: all times here are simulated.",
        simulated_launch_us,
    )
    gauge = GaugeMetricFamily(
        "minisrv:engine_state", "1 for the state the engine is in.", labels=["state"]
    )
    for name in states:
        gauge.add_metric([name], float(name == state))
    yield gauge


def _budget_families(stats: StatsLike) -> Iterator[Metric]:
    steps = CounterMetricFamily(
        "minisrv:prefill_budget_steps",
        "Steps for which prompt tokens waited, by why they took so many of them.",
        labels=["reason"],
    )
    tokens = CounterMetricFamily(
        "minisrv:prefill_budget_tokens", "Prompt tokens of those steps.", labels=["reason"]
    )
    for budget in stats.budgets:
        steps.add_metric([budget.reason], budget.steps)
        tokens.add_metric([budget.reason], budget.tokens)
    yield from (steps, tokens)
    yield GaugeMetricFamily(
        "minisrv:itl_target_seconds",
        "Time that a step in which requests decode should not exceed; 0 for no target.",
        stats.itl_target_ms / 1000,
    )
    errors = stats.step_time_errors
    bounds = (*map(str, errors.bounds), "+Inf")
    yield HistogramMetricFamily(
        "minisrv:step_time_error_ratio",
        "Difference between the predicted and the measured time of a step, as a share of the "
        "measured one.",
        list(zip(bounds, accumulate(errors.counts), strict=True)),
        errors.total,
    )


def _ladder_families(stats: StatsLike) -> Iterator[Metric]:
    ladder = stats.ladder
    graphs = GaugeMetricFamily(
        "minisrv:graphs",
        "Graphs that serve, are still to be captured, or failed.",
        labels=["state"],
    )
    states = (("serving", ladder.graphs), ("missing", ladder.missing))
    for state, number in (*states, ("refused", len(ladder.refused))):
        graphs.add_metric([state], number)
    yield graphs
    sizes = GaugeMetricFamily(
        "minisrv:graph_capture_size",
        "1 for each size with a graph that serves: decode and epilogue in requests, mixed in "
        "tokens.",
        labels=["kind", "size"],
    )
    kinds = {"decode": ladder.decode, "mixed": ladder.mixed, "epilogue": ladder.epilogues}
    for kind, captured in kinds.items():
        for size in captured:
            sizes.add_metric([kind, str(size)], 1)
    yield sizes
    yield GaugeMetricFamily(
        "minisrv:longest_turn_seconds",
        "Longest time for which work between two steps has made requests wait.",
        stats.longest_turn_seconds,
    )


def _compilation_families(compilation: CompilationLike) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "minisrv:generation",
        "Generation that serves: 0 is the model's own code, 1 compiled code.",
        compilation.generation,
    )
    yield CounterMetricFamily(
        "minisrv:generation_swaps",
        "Generations that have taken the place of another one.",
        compilation.swaps,
    )
    refusals = CounterMetricFamily(
        "minisrv:generation_refusals",
        "Compiled code that does not serve, by reason.",
        labels=["reason"],
    )
    for reason, number in compilation.refusals.items():
        refusals.add_metric([reason], number)
    yield refusals
    seconds = GaugeMetricFamily(
        "minisrv:compilation_seconds",
        "Seconds that each part of the way of compiled code into service took.",
        labels=["phase"],
    )
    for phase, took in compilation.seconds.items():
        seconds.add_metric([phase], took)
    yield seconds


def _sleep_families(sleep: SleepLike) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "minisrv:engine_sleep_state",
        "1 for whether the engine is awake, or what of it sleep has released.",
        labels=["sleep_state"],
    )
    for level, name in enumerate(_SLEEP_STATES):
        state.add_metric([name], float(level == sleep.level))
    yield state
    for what, seconds in (("sleep", sleep.sleep_seconds), ("wake_up", sleep.wake_up_seconds)):
        yield GaugeMetricFamily(
            f"minisrv:last_{what}_seconds", f"Seconds that the last {what} took.", seconds
        )

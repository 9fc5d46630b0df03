"""What Prometheus scrapes: the engine's counters, and what the API worker sees of its requests.

Knows: prometheus-client and the names of the series, which follow vLLM's where vLLM has the
same. It reads the engine's snapshot when it is scraped, through a callable, and knows nothing of
where that comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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
    """Steps that ran in one mode for one reason, since the start."""

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


class StatsLike(Protocol):
    """A snapshot of the engine's counters; counts are since the start."""

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


class Metrics:
    """All series of one API worker, in a registry of its own.

    stats: returns the engine's last snapshot.
    state: returns the engine's state, one of `states`.
    simulated_launch_us: returns what the engine adds to every launch.
    """

    def __init__(
        self,
        *,
        stats: Callable[[], StatsLike],
        state: Callable[[], str],
        states: Sequence[str],
        simulated_launch_us: Callable[[], float],
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, state, states, simulated_launch_us))
        self._success = Counter(
            "minisrv:request_success",
            "Choices that ended with a finish reason.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._failure = Counter(
            "minisrv:request_failure",
            "Requests that ended with an error, by HTTP status; 499: the client went away.",
            ["status"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "minisrv:time_to_first_token_seconds",
            "From the request's arrival to the first output of a choice.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self._gap = Histogram(
            "minisrv:inter_token_latency_seconds",
            "Between two outputs of a choice, divided by the tokens of the second.",
            buckets=_GAP_BUCKETS,
            registry=self._registry,
        )
        self._request = Histogram(
            "minisrv:e2e_request_latency_seconds",
            "From the request's arrival to the end of a choice.",
            buckets=_REQUEST_BUCKETS,
            registry=self._registry,
        )

    def first_token(self, seconds: float) -> None:
        """A choice had its first output, this long after its request arrived."""
        self._first_token.observe(seconds)

    def gap(self, seconds: float) -> None:
        """A choice had another token, this long after the one before."""
        self._gap.observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """A choice ended with a finish reason, this long after its request arrived."""
        self._success.labels(reason).inc()
        self._request.observe(seconds)

    def failed(self, status: int) -> None:
        """A request ended with an error."""
        self._failure.labels(str(status)).inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's snapshot as metric families, made anew for each scrape."""

    def __init__(
        self,
        stats: Callable[[], StatsLike],
        state: Callable[[], str],
        states: Sequence[str],
        simulated_launch_us: Callable[[], float],
    ) -> None:
        self._stats, self._state, self._states = stats, state, states
        self._simulated_launch_us = simulated_launch_us

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
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
        yield GaugeMetricFamily(
            "minisrv:num_requests_running", "Requests that own a slot.", stats.running
        )
        yield GaugeMetricFamily(
            "minisrv:num_requests_waiting", "Requests waiting for a slot.", stats.waiting
        )
        yield GaugeMetricFamily(
            "minisrv:kv_cache_usage_perc",
            "Used share of the KV cache's blocks, from 0 to 1.",
            stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
        )
        yield CounterMetricFamily(
            "minisrv:num_preemptions", "Requests preempted.", stats.preemptions
        )
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
            self._simulated_launch_us(),
        )
        now = self._state()
        state = GaugeMetricFamily(
            "minisrv:engine_state", "1 for the state the engine is in.", labels=["state"]
        )
        for name in self._states:
            state.add_metric([name], float(name == now))
        yield state

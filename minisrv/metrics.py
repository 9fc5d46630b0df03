"""The Prometheus metrics: the engine's counters, and the API workers' counts of their requests.

Knows: prometheus-client and the names of the series, which are vLLM's where vLLM has the same. For
a scrape it is given a snapshot of the engine's counters. Knows nothing of where that comes from.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from minisrv import __version__
from minisrv.request_metrics import RequestMetrics
from minisrv.vllm_metrics import vllm_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsNames(enum.StrEnum):
    """Whose names the metrics have."""

    MINISRV = "minisrv"
    VLLM = "vllm"
    BOTH = "both"


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


class SizeCountLike(Protocol):
    """The number of steps that ran by the graphs of one size since the start, and of their padding
    tokens."""

    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def steps(self) -> int: ...
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


class RefitLike(Protocol):
    """The capture sizes that are proposed, the share of the steps' cost that they would save, and
    the number of proposals that have come into service."""

    @property
    def sizes(self) -> Sequence[int]: ...
    @property
    def gain(self) -> float: ...
    @property
    def refits(self) -> int: ...


class LadderLike(Protocol):
    """The graphs that serve, those that were refused or taken out of service, and the number of
    those to come."""

    @property
    def graphs(self) -> int: ...
    @property
    def missing(self) -> int: ...
    @property
    def refused(self) -> Mapping[str, str]: ...
    @property
    def quarantined(self) -> Mapping[str, str]: ...
    @property
    def decode(self) -> Sequence[int]: ...
    @property
    def mixed(self) -> Sequence[int]: ...
    @property
    def epilogues(self) -> Sequence[int]: ...
    @property
    def refit(self) -> RefitLike: ...


class BatchCountLike(Protocol):
    """The number of steps whose batch had one size since the start."""

    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def steps(self) -> int: ...


class BudgetCountLike(Protocol):
    """The number of steps whose number of prompt tokens was chosen for one reason since the start,
    and of their prompt tokens."""

    @property
    def reason(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class HistogramLike(Protocol):
    """How a number was distributed over the steps since the start: the bounds of the buckets, the
    number of steps in each and in one without bound, and the sum of the number over all steps."""

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
    def waiting_for_grammar(self) -> int: ...
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
    def sizes(self) -> Sequence[SizeCountLike]: ...
    @property
    def compiled_steps(self) -> int: ...
    @property
    def itl_target_ms(self) -> float: ...
    @property
    def budgets(self) -> Sequence[BudgetCountLike]: ...
    @property
    def batches(self) -> Sequence[BatchCountLike]: ...
    @property
    def step_time_errors(self) -> HistogramLike: ...
    @property
    def tokens_of_steps(self) -> HistogramLike: ...
    @property
    def compilation(self) -> CompilationLike: ...
    @property
    def sleep(self) -> SleepLike: ...
    @property
    def ladder(self) -> LadderLike: ...
    @property
    def longest_turn_seconds(self) -> float: ...
    @property
    def verified_steps(self) -> Mapping[str, int]: ...


class InfoLike(Protocol):
    """The settings that a ready engine serves with."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def num_kv_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_waiting(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def cudagraph_mode(self) -> str: ...
    @property
    def compilation_mode(self) -> str: ...
    @property
    def async_scheduling(self) -> bool: ...
    @property
    def simulated_launch_us(self) -> float: ...


_SIMULATED = "minisrv:simulated_launch_us"
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's names of the levels of sleep, from 0 on."""


class Metrics(RequestMetrics):
    """All metrics of a server, as one API worker counts and renders them."""

    def render(
        self,
        stats: StatsLike,
        info: InfoLike | None,
        state: str,
        states: Sequence[str],
        *,
        model_name: str = "",
        names: MetricsNames = MetricsNames.MINISRV,
    ) -> bytes:
        """Return all metrics in Prometheus' text format (CONTENT_TYPE).

        stats: the engine's counters.
        info: the settings that the engine serves with; None while it loads.
        state: the state of the engine, one of `states`.
        states: the names of all states of an engine.
        model_name: the name of the model, for the labels.
        names: whose names the metrics have.
        """
        families = [
            *_engine_families(stats, state, states),
            *_info_families(info, model_name),
            *self.families(0 if info is None else info.max_model_len),
        ]
        shown = families
        if names is MetricsNames.VLLM:  # simulated times say so under any names
            shown = [family for family in families if family.name == _SIMULATED]
        if names is not MetricsNames.MINISRV:
            shown = [*shown, *vllm_families(families, model_name)]
        registry = CollectorRegistry()
        registry.register(_Families(shown))
        return generate_latest(registry)


class _Families(Collector):
    """A collector of the given metric families, as `generate_latest` wants them in a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._found = families

    def collect(self) -> list[Metric]:
        return self._found


def _engine_families(stats: StatsLike, state: str, states: Sequence[str]) -> Iterator[Metric]:
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
    by_size = ["kind", "size"]
    size_steps = CounterMetricFamily(
        "minisrv:graph_size_steps", "Steps that ran by a graph, by its size.", labels=by_size
    )
    size_padded = CounterMetricFamily(
        "minisrv:graph_size_padded_tokens", "Padding tokens of those steps.", labels=by_size
    )
    for count in stats.sizes:
        labels = [count.kind, str(count.size)]
        size_steps.add_metric(labels, count.steps)
        size_padded.add_metric(labels, count.padded_tokens)
    yield from (size_steps, size_padded)
    yield _histogram_family(
        "minisrv:iteration_tokens_total", "Real tokens of a step.", stats.tokens_of_steps
    )
    yield CounterMetricFamily(
        "minisrv:compiled_steps", "Steps that ran by compiled code.", stats.compiled_steps
    )
    batches = CounterMetricFamily(
        "minisrv:batch_size_steps",
        "Steps by the size of their batch: decode in requests, mixed in tokens.",
        labels=["kind", "size"],
    )
    for batch in stats.batches:
        batches.add_metric([batch.kind, str(batch.size)], batch.steps)
    yield batches
    yield from _budget_families(stats)
    yield from _compilation_families(stats.compilation)
    yield from _sleep_families(stats.sleep)
    yield from _ladder_families(stats)
    yield GaugeMetricFamily("minisrv:num_requests_running", "Requests running.", stats.running)
    yield GaugeMetricFamily(
        "minisrv:num_requests_waiting", "Requests waiting to run.", stats.waiting
    )
    waiting = GaugeMetricFamily(
        "minisrv:num_requests_waiting_by_reason",
        "Requests waiting to run: for room (capacity), or for their grammar (deferred).",
        labels=["reason"],
    )
    waiting.add_metric(["capacity"], stats.waiting - stats.waiting_for_grammar)
    waiting.add_metric(["deferred"], stats.waiting_for_grammar)
    yield waiting
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
    yield _histogram_family(
        "minisrv:step_time_error_ratio",
        "Difference between the predicted and the measured time of a step, as a share of the "
        "measured one.",
        stats.step_time_errors,
    )


def _histogram_family(name: str, help_text: str, histogram: HistogramLike) -> HistogramMetricFamily:
    bounds = map(floatToGoString, (*histogram.bounds, math.inf))
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, help_text, buckets, histogram.total)


def _info_families(info: InfoLike | None, model_name: str) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        _SIMULATED,
        "Microseconds added to every launch. Other than 0: all times here are simulated.",
        0.0 if info is None else info.simulated_launch_us,
    )
    model = GaugeMetricFamily("minisrv:model_config_info", "1, labelled with the settings.")
    cache = GaugeMetricFamily(
        "minisrv:cache_config_info", "1, labelled with the size of the KV cache."
    )
    if info is not None:
        settings: dict[str, object] = {
            "model_name": model_name,
            "version": __version__,
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "max_num_batched_tokens": info.max_num_batched_tokens,
            "max_waiting": info.max_waiting,
            "dtype": info.dtype,
            "device": info.device,
            "cudagraph_mode": info.cudagraph_mode,
            "compilation_mode": info.compilation_mode,
            "async_scheduling": info.async_scheduling,
        }
        _add_info(model, settings)
        num_tokens = (info.num_kv_blocks - 1) * info.block_size  # one block is for padding
        sizes = {
            "block_size": info.block_size,
            "num_gpu_blocks": info.num_kv_blocks,
            "cache_dtype": info.dtype,
            "kv_cache_size_tokens": num_tokens,
            "kv_cache_max_concurrency": num_tokens / info.max_model_len,
        }
        _add_info(cache, sizes)
    yield from (model, cache)


def _add_info(family: Metric, values: Mapping[str, object]) -> None:
    family.add_sample(family.name, {name: str(value) for name, value in values.items()}, 1.0)


def _ladder_families(stats: StatsLike) -> Iterator[Metric]:
    ladder = stats.ladder
    graphs = GaugeMetricFamily(
        "minisrv:graphs",
        "Graphs that serve, are still to be captured, failed, or were wrong in service.",
        labels=["state"],
    )
    states = (("serving", ladder.graphs), ("missing", ladder.missing))
    never = (("refused", len(ladder.refused)), ("quarantined", len(ladder.quarantined)))
    for state, number in (*states, *never):
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
    proposed = GaugeMetricFamily(
        "minisrv:proposed_capture_size",
        "1 for each size of other ladders that would fit the batches better.",
        labels=["size"],
    )
    for size in ladder.refit.sizes:
        proposed.add_metric([str(size)], 1)
    yield proposed
    yield GaugeMetricFamily(
        "minisrv:proposed_capture_gain_ratio",
        "Share of the cost of steps that the proposed sizes would have saved; 0 if there are none.",
        ladder.refit.gain,
    )
    yield CounterMetricFamily(
        "minisrv:ladder_refits",
        "Ladders that have taken the place of others to fit the batches.",
        ladder.refit.refits,
    )
    verified = CounterMetricFamily(
        "minisrv:verified_steps",
        "Steps by graphs that were drawn to be run again eagerly, by what came of it; skipped: too "
        "few blocks were free, or other work between steps was not done.",
        labels=["outcome"],
    )
    for outcome, number in stats.verified_steps.items():
        verified.add_metric([outcome], number)
    yield verified
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

"""The metrics under vLLM's names, for dashboards, autoscalers and routers that read a vLLM server.

Our metrics are called as vLLM's where vLLM has the same, so one of vLLM's is a copy of ours with
vLLM's prefix, its labels for the model and the engine, and, of a histogram's buckets, those that
vLLM has. Our buckets include vLLM's. The names are those of vLLM 0.33.0 (docs/monitoring.md).

Knows: prometheus-client's families, and vLLM's names, labels and buckets. Knows nothing of what is
counted, nor of where.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.utils import floatToGoString

OURS, PREFIX = "minisrv:", "vllm:"

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

_SAME = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "engine_sleep_state",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "iteration_tokens_total",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_params_n",
}
"""Names of the metrics that are the same but for prefix and labels."""

_BUCKETS = {
    "time_to_first_token_seconds": FIRST_TOKEN_BUCKETS,
    "inter_token_latency_seconds": GAP_BUCKETS,
    "request_time_per_output_token_seconds": GAP_BUCKETS,
    "e2e_request_latency_seconds": REQUEST_BUCKETS,
    "request_queue_time_seconds": REQUEST_BUCKETS,
    "request_prefill_time_seconds": REQUEST_BUCKETS,
    "request_decode_time_seconds": REQUEST_BUCKETS,
    "request_inference_time_seconds": REQUEST_BUCKETS,
}
"""vLLM's buckets of the histograms for which ours has more."""

_CLIENT_CLOSED_REQUEST, _INTERNAL_ERROR = "499", "500"


def vllm_families(families: Iterable[Metric], model_name: str) -> Iterator[Metric]:
    """Return vLLM's families, made from ours.

    model_name: the value of the label by which vLLM's dashboards choose a model.
    """
    labels = {"model_name": model_name, "engine": "0"}
    ours = {family.name.removeprefix(OURS): family for family in families}
    for name, family in ours.items():
        if name in _SAME or name in _BUCKETS:
            # vLLM's description of the cache is the same whatever the name of the model.
            added = {"engine": "0"} if name == "cache_config_info" else labels
            yield _renamed(family, PREFIX + name, added, _BUCKETS.get(name))
    yield from _prompt_families(ours, labels)
    yield _success_family(ours, labels)


def _renamed(
    family: Metric, name: str, labels: dict[str, str], buckets: tuple[float, ...] | None
) -> Metric:
    """Return a family under another name, with more labels, and only with these buckets if they are
    given."""
    bounds = {"+Inf", *map(floatToGoString, buckets)} if buckets else set()
    copy = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        if not buckets or sample.labels.get("le", "+Inf") in bounds:
            suffix = sample.name.removeprefix(family.name)
            copy.add_sample(name + suffix, labels | sample.labels, sample.value)
    return copy


def _value(family: Metric, **labels: str) -> float:
    """Return the value of the series that has these labels; 0 if there is none."""
    values = [sample.value for sample in family.samples if sample.labels == labels]
    return values[0] if values else 0.0


def _prompt_families(ours: dict[str, Metric], labels: dict[str, str]) -> Iterator[Metric]:
    """Return vLLM's other names for what came from the prefix cache, and for what did not."""
    hits = _value(ours["prefix_cache_hits"])
    computed = _value(ours["prompt_tokens"]) - hits
    names = list(labels)
    by_source = CounterMetricFamily(
        "vllm:prompt_tokens_by_source", "Prompt tokens by source.", labels=[*names, "source"]
    )
    for source, number in (("local_compute", computed), ("local_cache_hit", hits)):
        by_source.add_metric([*labels.values(), source], max(number, 0.0))
    yield by_source
    cached = CounterMetricFamily(
        "vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.", labels=names
    )
    cached.add_metric([*labels.values()], hits)
    yield cached


def _success_family(ours: dict[str, Metric], labels: dict[str, str]) -> Metric:
    """Return the ends of requests as vLLM counts them: also those whose client went away, and those
    that an error of the server ended."""
    family = CounterMetricFamily(
        "vllm:request_success", "Requests that ended.", labels=[*labels, "finished_reason"]
    )
    success, failure = ours["request_success"], ours["request_failure"]
    ends = {
        "stop": _value(success, finished_reason="stop"),
        "length": _value(success, finished_reason="length"),
        "abort": _value(failure, status=_CLIENT_CLOSED_REQUEST),
        "error": _value(failure, status=_INTERNAL_ERROR),
    }
    for reason, number in ends.items():
        family.add_metric([*labels.values(), reason], number)
    return family

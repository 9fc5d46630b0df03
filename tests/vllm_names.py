"""The metrics of vLLM 0.33.0, written from its documentation (docs/usage/metrics.md) and from
vllm/v1/metrics/loggers.py and buckets.py of that release.

A counter's name is without `_total`, as a Prometheus client declares it.
"""

from __future__ import annotations

VERSION = "0.33.0"

LABELS = ("model_name", "engine")

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_requests_running": ("gauge", LABELS),
    "num_requests_waiting": ("gauge", LABELS),
    "num_requests_waiting_by_reason": ("gauge", (*LABELS, "reason")),
    "engine_sleep_state": ("gauge", (*LABELS, "sleep_state")),
    "kv_cache_usage_perc": ("gauge", LABELS),
    "prefix_cache_queries": ("counter", LABELS),
    "prefix_cache_hits": ("counter", LABELS),
    "num_preemptions": ("counter", LABELS),
    "prompt_tokens": ("counter", LABELS),
    "prompt_tokens_by_source": ("counter", (*LABELS, "source")),
    "prompt_tokens_cached": ("counter", LABELS),
    "generation_tokens": ("counter", LABELS),
    "request_success": ("counter", (*LABELS, "finished_reason")),
    "request_prompt_tokens": ("histogram", LABELS),
    "request_generation_tokens": ("histogram", LABELS),
    "iteration_tokens_total": ("histogram", LABELS),
    "request_max_num_generation_tokens": ("histogram", LABELS),
    "request_params_n": ("histogram", LABELS),
    "request_params_max_tokens": ("histogram", LABELS),
    "time_to_first_token_seconds": ("histogram", LABELS),
    "inter_token_latency_seconds": ("histogram", LABELS),
    "request_time_per_output_token_seconds": ("histogram", LABELS),
    "e2e_request_latency_seconds": ("histogram", LABELS),
    "request_queue_time_seconds": ("histogram", LABELS),
    "request_inference_time_seconds": ("histogram", LABELS),
    "request_prefill_time_seconds": ("histogram", LABELS),
    "request_decode_time_seconds": ("histogram", LABELS),
    "request_prefill_kv_computed_tokens": ("histogram", LABELS),
}
"""Type and labels of those that a server of ours has too, by their name without `vllm:`."""

CACHE_CONFIG_LABELS = {
    *("block_size", "num_gpu_blocks", "cache_dtype", "kv_cache_size_tokens"),
    *("kv_cache_max_concurrency", "engine"),
}
"""Those labels of the gauge `cache_config_info` that mean something here; vLLM has one for each of
its settings."""

ABSENT = {
    "request_num_preemptions": "preemptions are not counted by request",
    "prompt_tokens_cached_by_source": "there is one tier of the cache",
    "external_prefix_cache_queries": "there are no KV connectors",
    "external_prefix_cache_hits": "there are no KV connectors",
    "mm_cache_queries": "models take text only",
    "mm_cache_hits": "models take text only",
    "admission_rejections": "request_failure counts them under status 429",
}
"""The others that vLLM has by default, and why a server of ours has not."""

_LATENCY = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 "
_LATENCY += "960.0 1920.0 7680.0 +Inf"
_FIRST_TOKEN = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 "
_FIRST_TOKEN += "40.0 80.0 160.0 640.0 2560.0 +Inf"
_GAP = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 "
_GAP += "+Inf"
_TOKENS_UP_TO_512 = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0 500.0 +Inf"
_STEP = "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0 +Inf"

BUCKETS = {
    "time_to_first_token_seconds": _FIRST_TOKEN,
    "inter_token_latency_seconds": _GAP,
    "request_time_per_output_token_seconds": _GAP,
    "e2e_request_latency_seconds": _LATENCY,
    "request_queue_time_seconds": _LATENCY,
    "request_inference_time_seconds": _LATENCY,
    "request_prefill_time_seconds": _LATENCY,
    "request_decode_time_seconds": _LATENCY,
    "iteration_tokens_total": _STEP,
    "request_params_n": "1.0 2.0 5.0 10.0 20.0 +Inf",
    "request_prompt_tokens": _TOKENS_UP_TO_512,
    "request_generation_tokens": _TOKENS_UP_TO_512,
    "request_max_num_generation_tokens": _TOKENS_UP_TO_512,
    "request_params_max_tokens": _TOKENS_UP_TO_512,
    "request_prefill_kv_computed_tokens": _TOKENS_UP_TO_512,
}
"""The buckets of the histograms, for a server whose requests have at most 512 tokens."""

"""The metrics that several workers count are shown as one sum, by any of the workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from minisrv.engine.messages import (
    BatchCount,
    BudgetCount,
    CompilationReport,
    CompilationState,
    EngineStats,
    Histogram,
    LadderReport,
)
from minisrv.metrics import Metrics, MetricsNames
from minisrv.request_metrics import EndedChoice

STATS = EngineStats(generated_tokens=7)


def show(metrics: Metrics, stats: EngineStats = STATS) -> dict[tuple[str, ...], float]:
    text = metrics.render(stats, None, "ready", ["ready", "dead"])
    return {
        (sample.name.removeprefix("minisrv:"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def choice(reason: str, **numbers: float) -> EndedChoice:
    """A choice of one prompt token and one token."""
    fields = {
        **dict.fromkeys(("latency", "queue", "prefill", "decode"), 0.0),
        **{"num_prompt_tokens": 1, "num_cached_tokens": 0, "num_generated_tokens": 1},
    }
    return EndedChoice(reason=reason, max_tokens=None, **(fields | numbers))  # type: ignore[arg-type]


def test_any_worker_shows_the_sum_and_the_engine_once(tmp_path: Path) -> None:
    workers = [Metrics(tmp_path / "metrics", worker=index, workers=3) for index in range(3)]
    for number, metrics in enumerate(workers, 1):
        for _ in range(number):
            metrics.arrived()
            metrics.first_token(0.003)
            metrics.gap(0.0009)
            metrics.ended(choice("stop", latency=0.5))
        metrics.failed(429)
    shown = [show(metrics) for metrics in workers]
    assert shown[0] == shown[1] == shown[2]
    expected = {
        ("http_requests_total", "0"): 1,
        ("http_requests_total", "1"): 2,
        ("http_requests_total", "2"): 3,
        ("request_success_total", "stop"): 6,
        ("request_failure_total", "429"): 3,
        ("time_to_first_token_seconds_count",): 6,
        ("inter_token_latency_seconds_count",): 6,
        ("e2e_request_latency_seconds_count",): 6,
        ("e2e_request_latency_seconds_sum",): 3,
        ("generation_tokens_total",): 7,
    }
    assert shown[0].items() >= expected.items()
    assert shown[0]["request_success_total", "length"] == 0, "a rate needs a beginning"


def test_a_worker_in_a_dead_ones_place_counts_on(tmp_path: Path) -> None:
    """A worker that takes a dead one's place adds to its counts instead of starting at 0."""
    for _ in range(2):
        metrics = Metrics(tmp_path / "metrics", worker=1, workers=2)
        metrics.ended(choice("length", latency=1.0))
    assert show(Metrics(tmp_path / "metrics", worker=0, workers=2))[
        "request_success_total", "length"
    ] == 2  # fmt: skip


def test_a_histogram_counts_up_to_and_with_each_bound() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.0006, 0.001, 100.0):
        metrics.gap(seconds)
    shown = show(metrics)
    name = "inter_token_latency_seconds_bucket"
    assert [shown[name, bound] for bound in ("0.0005", "0.001", "5.0", "+Inf")] == [1, 3, 3, 4]
    assert shown["inter_token_latency_seconds_sum",] == 100.0021


def test_the_generation_that_serves_and_what_was_refused_are_shown() -> None:
    served = CompilationReport(
        CompilationState.COMPILED, generation=1, swaps=1, seconds={"compile": 9.5, "certify": 2.0}
    )
    refused = CompilationReport(CompilationState.REFUSED, reason="it", refusals={"slower": 1})
    shown = show(Metrics(), EngineStats(compiled_steps=12, compilation=served))
    expected = {
        ("compiled_steps_total",): 12,
        ("generation",): 1,
        ("generation_swaps_total",): 1,
        ("compilation_seconds", "compile"): 9.5,
        ("compilation_seconds", "certify"): 2.0,
    }
    assert shown.items() >= expected.items()
    shown = show(Metrics(), EngineStats(compilation=refused))
    expected = {("generation",): 0, ("generation_refusals_total", "slower"): 1}
    assert shown.items() >= expected.items()
    assert ("generation_refusals_total", "load") not in shown


def test_the_graphs_that_serve_are_shown() -> None:
    ladder = LadderReport(
        5, 9, (1, 8), (16,), (8,), refused={"FULL decode 2 TOKENS": "it differs."}
    )
    shown = show(Metrics(), EngineStats(ladder=ladder, longest_turn_seconds=0.012))
    expected = {
        ("graphs", "serving"): 5,
        ("graphs", "missing"): 3,
        ("graphs", "refused"): 1,
        ("graph_capture_size", "decode", "1"): 1,
        ("graph_capture_size", "decode", "8"): 1,
        ("graph_capture_size", "mixed", "16"): 1,
        ("graph_capture_size", "epilogue", "8"): 1,
        ("longest_turn_seconds",): 0.012,
    }
    assert shown.items() >= expected.items()
    assert ("graph_capture_size", "decode", "2") not in shown


def test_the_budgets_of_steps_and_the_errors_of_predictions() -> None:
    stats = EngineStats(
        itl_target_ms=25.0,
        budgets=[BudgetCount("itl_target", 3, 700), BudgetCount("all_waiting", 1, 20)],
        step_time_errors=Histogram((0.05, 0.1), (6, 3, 1), 0.9),
    )
    shown = show(Metrics(), stats)
    expected = {
        ("itl_target_seconds",): 0.025,
        ("prefill_budget_steps_total", "itl_target"): 3,
        ("prefill_budget_tokens_total", "itl_target"): 700,
        ("prefill_budget_tokens_total", "all_waiting"): 20,
        ("step_time_error_ratio_bucket", "0.05"): 6,
        ("step_time_error_ratio_bucket", "0.1"): 9,
        ("step_time_error_ratio_bucket", "+Inf"): 10,
        ("step_time_error_ratio_sum",): 0.9,
    }
    assert shown.items() >= expected.items()
    # An engine that is not ready has counted nothing.
    assert show(Metrics(), EngineStats())["step_time_error_ratio_bucket", "+Inf"] == 0


def test_what_is_counted_of_a_choice_that_ended() -> None:
    metrics = Metrics()
    ended = choice(
        "stop",
        latency=3.5,
        queue=1.0,
        prefill=0.5,
        decode=2.0,
        num_prompt_tokens=48,
        num_cached_tokens=32,
        num_generated_tokens=5,
    )
    metrics.ended(replace(ended, max_tokens=30))
    metrics.ended(choice("length"))  # a single token has no time per further token
    metrics.prompt_ended(2, 5)
    shown = show(metrics)
    sums = {
        "e2e_request_latency_seconds": (2, 3.5),
        "request_queue_time_seconds": (2, 1.0),
        "request_prefill_time_seconds": (2, 0.5),
        "request_decode_time_seconds": (2, 2.0),
        "request_inference_time_seconds": (2, 2.5),
        "request_time_per_output_token_seconds": (1, 0.5),
        "request_prompt_tokens": (2, 49),
        "request_generation_tokens": (2, 6),
        "request_prefill_kv_computed_tokens": (2, 17),
        "request_params_max_tokens": (1, 30),
        "request_params_n": (1, 2),
        "request_max_num_generation_tokens": (1, 5),
    }
    found = {name: (shown[f"{name}_count",], shown[f"{name}_sum",]) for name in sums}
    assert found == sums


def test_waiting_for_a_grammar_is_told_from_waiting_for_room() -> None:
    shown = show(Metrics(), EngineStats(waiting=5, waiting_for_grammar=2))
    assert shown["num_requests_waiting",] == 5
    assert shown["num_requests_waiting_by_reason", "capacity"] == 3
    assert shown["num_requests_waiting_by_reason", "deferred"] == 2


def test_the_sizes_of_batches_are_shown() -> None:
    stats = EngineStats(batches=[BatchCount("decode", 33, 4), BatchCount("mixed", 33, 1)])
    expected = {
        ("batch_size_steps_total", "decode", "33"): 4,
        ("batch_size_steps_total", "mixed", "33"): 1,
    }
    assert show(Metrics(), stats).items() >= expected.items()


def test_simulated_times_say_so_under_vllm_s_names_too() -> None:
    text = Metrics().render(STATS, None, "ready", ["ready"], names=MetricsNames.VLLM).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {name for name in names if not name.startswith("vllm:")} == {
        "minisrv:simulated_launch_us"
    }

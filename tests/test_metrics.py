"""The metrics that several workers count are shown as one sum, by any of the workers."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from minisrv.engine.messages import (
    BudgetCount,
    CompilationReport,
    CompilationState,
    EngineStats,
    ErrorHistogram,
    LadderReport,
)
from minisrv.metrics import Metrics

STATS = EngineStats(generated_tokens=7)


def show(metrics: Metrics, stats: EngineStats = STATS) -> dict[tuple[str, ...], float]:
    text = metrics.render(stats, "ready", ["ready", "dead"], 0.0)
    return {
        (sample.name.removeprefix("minisrv:"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_any_worker_shows_the_sum_and_the_engine_once(tmp_path: Path) -> None:
    workers = [Metrics(tmp_path / "metrics", worker=index, workers=3) for index in range(3)]
    for number, metrics in enumerate(workers, 1):
        for _ in range(number):
            metrics.arrived()
            metrics.first_token(0.003)
            metrics.gap(0.0009)
            metrics.finished("stop", 0.5)
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
    assert ("request_success_total", "length") not in shown[0]


def test_a_worker_in_a_dead_ones_place_counts_on(tmp_path: Path) -> None:
    """A worker that takes a dead one's place adds to its counts instead of starting at 0."""
    for _ in range(2):
        metrics = Metrics(tmp_path / "metrics", worker=1, workers=2)
        metrics.finished("length", 1.0)
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
        step_time_errors=ErrorHistogram((0.05, 0.1), (6, 3, 1), 0.9),
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

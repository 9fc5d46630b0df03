"""The formulas of the statistics, on examples computed by hand."""

import pytest

from loadgen.records import (
    ClientLoad,
    Failure,
    FailureKind,
    LevelResult,
    Load,
    RequestRecord,
    StoppedBy,
)
from loadgen.samples import Distribution, itl_samples_ms, percentiles, tpot_ms
from loadgen.stats import client_warnings, simulated, summarize


def record(
    start: float,
    times: tuple[float, ...],
    end: float,
    tokens: int | None,
    failure: Failure | None = None,
    cached: int | None = None,
    chunks: tuple[float, ...] | None = None,
) -> RequestRecord:
    """Make a record.

    chunks: the number of tokens of each chunk; one each if not given.
    """
    return RequestRecord(
        index=0,
        start_s=start,
        end_s=end,
        chunk_times_s=times,
        chunk_tokens=(1.0,) * len(times) if chunks is None else chunks,
        prompt_tokens=5,
        completion_tokens=tokens,
        failure=failure,
        cached_tokens=cached,
    )


def level(records: list[RequestRecord], clients: list[ClientLoad] | None = None) -> LevelResult:
    return LevelResult(Load(2), StoppedBy.REQUESTS, records, [], clients or [])


def test_percentiles_are_nearest_rank() -> None:
    ordered = [(float(i), 1.0) for i in range(1, 11)]
    assert percentiles(ordered, (10, 50, 90, 99, 100)) == [1, 5, 9, 10, 10]
    assert percentiles([(7.0, 1.0)], (50, 99)) == [7, 7]


def test_percentiles_follow_the_weights() -> None:
    """Half of the weight lies at 1, so p50 is 1; without weights it would be 2."""
    assert percentiles([(1.0, 6.0), (2.0, 1.0), (3.0, 3.0)], (50, 60, 70, 71)) == [1, 1, 2, 3]


def test_percentiles_of_many_equal_fractions() -> None:
    """Fails if the rounding of summed weights moves a rank to the next sample."""
    ordered = [(float(i), 0.7) for i in range(1, 1001)]
    assert percentiles(ordered, (50, 90, 99)) == [500, 900, 990]


def test_distribution() -> None:
    got = Distribution.of([(4.0, 1.0), (1.0, 3.0)])
    assert got == Distribution(count=2, mean=1.75, min=1, p50=1, p90=4, p99=4, max=4)
    assert Distribution.of([]) is None


def test_ttft_itl_tpot_of_one_token_a_chunk() -> None:
    one = record(10.0, (10.5, 10.7, 11.1), 11.3, 3)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2e_s == pytest.approx(1.3)
    assert itl_samples_ms(one) == [
        (pytest.approx(200.0), 1.0),
        (pytest.approx(400.0), 1.0),
    ]
    assert tpot_ms(one) == pytest.approx(400.0)  # (1.3 - 0.5) / 2


def test_itl_jitter() -> None:
    """The jitter is p99 / p50 of the inter-token latencies, and None where p50 is 0."""
    steady = summarize(level([record(0.0, (1.0, 1.1, 1.2, 1.5), 1.5, 4)]))
    assert steady.itl_jitter == pytest.approx(3.0)
    at_once = summarize(level([record(0.0, (1.0, 1.0, 1.0), 1.0, 3)]))
    assert at_once.itl_jitter is None


def test_a_chunk_is_not_a_token() -> None:
    """A gap between chunks counts for as many tokens as the chunk behind it has; the tokens of the
    first chunk have no gap."""
    packed = record(0.0, (1.0, 1.6, 2.5), 3.0, 12, chunks=(4.0, 2.0, 6.0))
    assert itl_samples_ms(packed) == [(pytest.approx(300.0), 2.0), (pytest.approx(150.0), 6.0)]
    assert tpot_ms(packed) == pytest.approx(250.0)  # (3.0 - 1.0) / 8
    itl = Distribution.of(itl_samples_ms(packed))
    assert itl is not None
    assert itl.mean == pytest.approx(187.5)  # (2.5 - 1.0) / 8
    assert itl.p50 == pytest.approx(150.0)  # Six of eight tokens have this latency.


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_came_in_one_chunk_has_neither_itl_nor_tpot(tokens: int) -> None:
    single = record(0.0, (1.0,), 1.1, tokens, chunks=(float(tokens),))
    assert itl_samples_ms(single) == []
    assert tpot_ms(single) is None


def test_without_usage_chunks_are_counted_and_said_so() -> None:
    summary = summarize(level([record(0.0, (1.0, 2.0), 2.0, None)]))
    assert summary.output_tokens == 2
    assert summary.without_usage == 1
    assert any("without usage" in text for text in summary.warnings)


@pytest.mark.parametrize(
    ("cached", "total", "warns"),
    [((None, None), None, False), ((0, 0), 0, False), ((0, 4), 4, True), ((None, 5), 5, True)],
)
def test_cached_tokens_are_shown_and_warned_of(
    cached: tuple[int | None, int | None], total: int | None, warns: bool
) -> None:
    """Fails if a server that reports nothing about its cache is taken to have found nothing in
    it."""
    failure = Failure(FailureKind.TIMEOUT, "late")
    records = [record(0.0, (1.0, 2.0), 2.0, 2, cached=found) for found in cached]
    summary = summarize(level([*records, record(0.0, (1.0,), 2.0, 2, failure, cached=5)]))
    assert summary.cached_tokens == total
    found = [text for text in summary.warnings if "prefix cache" in text]
    assert len(found) == warns
    assert all(f"{total} of 10 prompt tokens" in text for text in found)


def test_answers_that_could_not_be_timed_are_warned_of() -> None:
    records = [record(0.0, (), 2.0, 4), record(0.0, (1.0, 2.0), 2.0, 2)]
    summary = summarize(level(records))
    assert (summary.ok, summary.without_times, summary.output_tokens) == (2, 1, 6)
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.count == 1
    assert summary.e2e_ms is not None
    assert summary.e2e_ms.count == 2
    [warning] = summary.warnings
    assert "1 of 2 answers" in warning
    assert "--return-token-ids" in warning


def test_what_simulated_servers_are_called() -> None:
    assert simulated(0.0) == simulated(0.0, 0.0) == ""
    assert simulated(11.5) == simulated(11.5, 11.5) == "simulated launches (11.5 us)"
    assert simulated(0.0, 40.0) == "simulated launches (0 and 40 us)"


def test_throughput_window_and_failures() -> None:
    """Failures extend the window and add nothing to tokens or latencies."""
    refused = Failure(FailureKind.HTTP_STATUS, "full", 429)
    slow = Failure(FailureKind.TIMEOUT, "late")
    summary = summarize(
        level(
            [
                record(100.0, (101.0, 102.0), 102.0, 2),
                record(100.5, (101.5, 102.5, 103.5, 104.5), 104.5, 8),
                record(102.0, (), 102.0, None, refused),
                record(103.0, (104.0,), 110.0, 9, slow),
            ]
        )
    )
    assert (summary.ok, summary.failed) == (2, 2)
    assert summary.failures == {"http_429": 1, "timeout": 1}
    assert summary.failure_examples == {"http_429": "full", "timeout": "late"}
    assert summary.window_s == pytest.approx(10.0)
    assert summary.output_tokens == 10
    assert summary.output_tokens_per_s == pytest.approx(1.0)
    assert summary.requests_per_s == pytest.approx(0.2)
    assert summary.in_flight == pytest.approx(1.3)  # (2 + 4 + 0 + 7) / 10
    assert summary.tokens_per_chunk == pytest.approx(10 / 6)
    assert summary.prompt_tokens == 10
    assert summary.e2e_ms is not None
    assert (summary.e2e_ms.count, summary.e2e_ms.max) == (2, pytest.approx(4000.0))
    assert summary.any_failed


def test_all_failed_and_nothing_measured() -> None:
    for records in ([], [record(0.0, (), 0.0, None, Failure(FailureKind.CONNECT, "no"))]):
        summary = summarize(level(records))
        assert summary.ok == 0
        assert summary.requests_per_s == 0
        assert summary.ttft_ms is None
        assert summary.itl_ms is None
        assert summary.any_failed == bool(records)


def test_a_failed_warm_up_counts_as_a_failure() -> None:
    failed = [Failure(FailureKind.TIMEOUT, "late")]
    result = LevelResult(Load(1), StoppedBy.REQUESTS, [record(0, (1,), 1, 1)], failed, [])
    summary = summarize(result)
    assert summary.failed == 0
    assert summary.warmup_failures == {"timeout": 1}
    assert summary.any_failed


@pytest.mark.parametrize(
    ("cpu", "lag_s", "itl_ms", "words"),
    [
        (0.3, 0.001, 10.0, []),
        (0.95, 0.001, 10.0, ["used 95% of a core"]),
        (0.3, 0.006, 10.0, ["10.0 ms; give the client cores"]),
        (0.5, 0.006, 10.0, ["10.0 ms; raise --processes"]),
        (0.3, 0.004, 10.0, []),  # The delay is below half an inter-token latency.
        # The delay is above half an inter-token latency, but within what a timer may be late.
        (0.3, 0.0015, 1.0, []),
        (0.9, 0.006, 10.0, ["raise --processes", "6.0 ms late"]),
    ],
)
def test_client_bound(cpu: float, lag_s: float, itl_ms: float, words: list[str]) -> None:
    """The busiest process decides; an idle one beside it does not hide it."""
    idle = ClientLoad(1, 0.01, 0.0, 0.0)
    itl = Distribution.of([(itl_ms, 1.0)])
    warnings = client_warnings([idle, ClientLoad(1, cpu, lag_s, lag_s)], itl)
    assert len(warnings) == len(words)
    for text, word in zip(warnings, words, strict=True):
        assert word in text
        assert "client-bound" in text

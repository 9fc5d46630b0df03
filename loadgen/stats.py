"""Computes metrics from records, by pure functions, and states their formulas in words.

Latencies and token counts are those of successful requests only; failures are counted by kind.

Knows: what each metric means. Knows nothing of HTTP, processes, or how a number is printed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Self

import msgspec

from loadgen.records import ClientLoad, LevelResult, RequestRecord

CPU_SHARE_LIMIT = 0.8
LAG_FLOOR_S = 0.002  # lag that is never warned of: timers of the event loop count in milliseconds
LAG_ITL_SHARE = 0.5
LAG_CPU_SHARE = 0.3

FORMULAS = {
    "TTFT": "first chunk with tokens - send start; chunks that carry only a role do not count",
    "ITL": "gap between neighbouring chunks with tokens / k, the tokens of the later one, and "
    "counted k times. TTFT, and what the first chunk brought, are no part of it; chunks of one "
    "read share its time",
    "k": "token ids of a chunk; without ids one for each chunk, and what usage counts beyond that "
    "shared out between the chunks by the length of their text",
    "ITL jitter": "p99 / p50 of ITL",
    "TPOT": "(E2E - TTFT) / tokens after the first chunk, for each request that has any: / (n - 1) "
    "where each token has a chunk",
    "E2E": "[DONE] - send start",
    "n": "output tokens, from the server's usage; without usage, token ids or chunks with tokens",
    "chunk with tokens": "one with text or token ids; one without either, too, where usage shows "
    "that each token had a chunk. A server need not send a chunk for a token without text",
    "cached": "prompt tokens that the server says it found in its prefix cache / prompt tokens; - "
    "where it does not say",
    "seed": "decides the prompts, is drawn for each run, and is given as --seed to send the same "
    "prompts again",
    "tok/s": "output tokens of successful requests / window",
    "req/s": "successful requests / window",
    "window": "first send start to last end at this concurrency, failures and the tail included",
    "in flight": "sum of all requests' durations / window",
    "pN": "the smallest sample that at least N% of the samples (of the tokens, for ITL) do not "
    "exceed: with fewer than 100 samples p99 is the largest, and with fewer than 10 so is p90",
    "client": "the busiest client process: its CPU time / wall time, and how late a timer of its "
    f"event loop fires. Above {CPU_SHARE_LIMIT:.0%} of a core, or with a p99 above "
    f"{LAG_ITL_SHARE:.0%} of the median ITL and {LAG_FLOOR_S * 1e3:g} ms, a warning says that the "
    "client may be what was measured. All client processes read one clock, CLOCK_MONOTONIC",
    "closed loop": "a new request is sent only when one ends, so this measures service at a fixed "
    "concurrency. It says nothing about latency at a fixed arrival rate: a slow server is asked "
    "less often (coordinated omission)",
}


class Distribution(msgspec.Struct, frozen=True):
    """A summary of samples, in their unit; `count` is the number of samples."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[tuple[float, float]]) -> Self | None:
        """Summarise samples, which are (value, weight) pairs with positive weights; None if there
        are none."""
        ordered = sorted(samples)
        if not ordered:
            return None
        p50, p90, p99 = percentiles(ordered, (50, 90, 99))
        return cls(
            count=len(ordered),
            mean=sum(value * weight for value, weight in ordered)
            / sum(weight for _, weight in ordered),
            min=ordered[0][0],
            p50=p50,
            p90=p90,
            p99=p99,
            max=ordered[-1][0],
        )


def percentiles(ordered: Sequence[tuple[float, float]], ranks: Sequence[float]) -> list[float]:
    """Return, for each rank, the smallest value up to which at least that share of the weight lies.

    ordered: (value, weight) pairs in ascending order.
    ranks: percentages in ascending order.
    """
    total = sum(weight for _, weight in ordered)
    found: list[float] = []
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        # NOTE: sums of weights have rounding errors; with the tolerance p50 of 10 samples is always
        # the fifth.
        while len(found) < len(ranks) and reached >= total * (ranks[len(found)] / 100 - 1e-9):
            found.append(value)
    return found


def itl_samples_ms(record: RequestRecord) -> list[tuple[float, float]]:
    """Return (ITL in ms, number of tokens) for each gap between neighbouring chunks with tokens.

    A chunk may have several tokens: a gap stands for all tokens of the chunk that ends it, and each
    of them took an equal part of the gap. So the weighted mean is (last chunk - first chunk) /
    (tokens after the first chunk), however tokens are grouped into chunks.
    """
    gaps = pairwise(record.chunk_times_s)
    return [
        ((late - early) * 1e3 / tokens, tokens)
        for (early, late), tokens in zip(gaps, record.chunk_tokens[1:], strict=True)
        if tokens > 0
    ]


def tpot_ms(record: RequestRecord) -> float | None:
    """Return the milliseconds per output token after the first chunk; None if the first chunk
    brought all tokens, or there was none."""
    if record.ttft_s is None or record.later_tokens <= 0:
        return None
    return (record.e2e_s - record.ttft_s) * 1e3 / record.later_tokens


class LevelSummary(msgspec.Struct, frozen=True):
    """The metrics of one concurrency. A distribution without samples is None."""

    concurrency: int
    stopped_by: str
    ok: int
    failed: int
    failures: dict[str, int]
    failure_examples: dict[str, str]
    warmup_failures: dict[str, int]
    window_s: float
    requests_per_s: float
    output_tokens_per_s: float
    in_flight: float
    prompt_tokens: int | None
    output_tokens: int
    cached_tokens: int | None
    """Number of prompt tokens that the server found in its prefix cache; None if it does not
    say."""
    chunks: int
    tokens_per_chunk: float | None
    without_usage: int
    """Number of successful requests without usage, whose tokens had to be counted by chunks."""
    without_times: int
    """Number of successful requests none of whose tokens had a chunk, which have neither TTFT nor
    TPOT."""
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    itl_jitter: float | None
    """p99 over p50 of the ITL; None without an ITL, or if its median is 0, as for answers that came
    in one read."""
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    clients: list[ClientLoad]
    warnings: list[str]

    @property
    def any_failed(self) -> bool:
        """Whether a request failed, in the warm-up or in the measurement."""
        return self.failed > 0 or bool(self.warmup_failures)


def summarize(level: LevelResult) -> LevelSummary:
    """Compute the metrics of one concurrency from its records."""
    good = [record for record in level.records if record.failure is None]
    failures = [record.failure for record in level.records if record.failure is not None]
    window_s = 0.0
    if level.records:
        first = min(record.start_s for record in level.records)
        window_s = max(record.end_s for record in level.records) - first
    output_tokens = sum(record.tokens for record in good)
    chunks = sum(len(record.chunk_times_s) for record in good)
    prompt_counts = [record.prompt_tokens for record in good if record.prompt_tokens is not None]
    prompt_tokens = sum(prompt_counts)
    cached_counts = [record.cached_tokens for record in good if record.cached_tokens is not None]
    cached_tokens = sum(cached_counts) if cached_counts else None
    without_usage = sum(record.completion_tokens is None for record in good)
    without_times = sum(not record.chunk_times_s for record in good)
    tpots = [value for record in good if (value := tpot_ms(record)) is not None]
    ttfts = [value * 1e3 for record in good if (value := record.ttft_s) is not None]
    itl = Distribution.of(sample for record in good for sample in itl_samples_ms(record))

    def rate(amount: float) -> float:
        return amount / window_s if window_s > 0 else 0.0

    warnings = client_warnings(level.clients, itl)
    if without_usage:
        warnings.append(
            f"{without_usage} of {len(good)} answers came without usage: their tokens were "
            "counted by chunks and may be too few"
        )
    if without_times:
        warnings.append(
            f"{without_times} of {len(good)} answers came without a chunk that has text: of their "
            "tokens none is timed; with --return-token-ids those without text can be, where the "
            "server knows it"
        )
    if cached_tokens:
        warnings.append(
            f"{cached_tokens} of {prompt_tokens} prompt tokens were in the server's prefix cache "
            "and not computed: it has seen prompts of this seed before, or what a chat template "
            "puts in front of each; without --seed a run draws prompts of its own"
        )
    return LevelSummary(
        concurrency=level.concurrency,
        stopped_by=str(level.stopped_by),
        ok=len(good),
        failed=len(failures),
        failures=dict(Counter(failure.key for failure in failures).most_common()),
        failure_examples={
            failure.key: failure.message for failure in [*level.warmup_failures, *failures]
        },
        warmup_failures=dict(Counter(failure.key for failure in level.warmup_failures)),
        window_s=window_s,
        requests_per_s=rate(len(good)),
        output_tokens_per_s=rate(output_tokens),
        in_flight=rate(sum(record.e2e_s for record in level.records)),
        prompt_tokens=prompt_tokens if prompt_counts else None,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        chunks=chunks,
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        without_usage=without_usage,
        without_times=without_times,
        ttft_ms=Distribution.of((value, 1.0) for value in ttfts),
        itl_ms=itl,
        itl_jitter=itl.p99 / itl.p50 if itl is not None and itl.p50 > 0 else None,
        tpot_ms=Distribution.of((value, 1.0) for value in tpots),
        e2e_ms=Distribution.of((record.e2e_s * 1e3, 1.0) for record in good),
        clients=level.clients,
        warnings=warnings,
    )


def most(clients: Sequence[ClientLoad]) -> ClientLoad:
    """Return a load with the streams of all given client processes, at least one, together, and
    with the largest of their other values, so that an idle process does not hide a busy one."""
    return ClientLoad(
        streams=sum(client.streams for client in clients),
        cpu_share=max(client.cpu_share for client in clients),
        lag_p99_s=max(client.lag_p99_s for client in clients),
        lag_max_s=max(client.lag_max_s for client in clients),
    )


def simulated(*launch_us: float) -> str:
    """Return the text that must be shown with every figure if a server lengthens its launches to
    simulate another machine; empty if none does.

    launch_us: the microseconds that are added to each launch, for each server.
    """
    text = " and ".join(f"{value:g}" for value in dict.fromkeys(launch_us))
    return f"simulated launches ({text} us)" if any(launch_us) else ""


def client_warnings(clients: Sequence[ClientLoad], itl_ms: Distribution | None) -> list[str]:
    """Return warnings that the client may have limited the measurement: because a client process
    was CPU-bound, or its event loop was late by a large part of the ITL."""
    if not clients:
        return []
    warnings = []
    worst = most(clients)
    relief = "raise --processes where cores are idle, or lower --concurrency"
    if worst.cpu_share > CPU_SHARE_LIMIT:
        warnings.append(
            f"client-bound: a client process used {worst.cpu_share:.0%} of a core, so it may be "
            f"what was measured; {relief}"
        )
    itl_p50_s = itl_ms.p50 / 1e3 if itl_ms is not None else 0.0
    if worst.lag_p99_s > max(LAG_FLOOR_S, LAG_ITL_SHARE * itl_p50_s):
        # A process that was late without being busy did not get the cores, and more client
        # processes would not help.
        advice = relief if worst.cpu_share > LAG_CPU_SHARE else "give the client cores of its own"
        warnings.append(
            f"client-bound: the client's event loop ran up to {worst.lag_p99_s * 1e3:.1f} ms late "
            f"(p99), median ITL is {itl_p50_s * 1e3:.1f} ms; {advice}"
        )
    return warnings

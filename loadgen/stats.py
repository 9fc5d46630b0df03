"""Computes the metrics of a level from its records, and states their formulas in words.

Latencies and token counts are those of successful requests only; failures are counted by kind.

Knows: what each metric means. Knows nothing of HTTP, processes, or how a number is printed.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

from loadgen.records import ClientLoad, LevelResult, Load
from loadgen.samples import BatchITL, Distribution, itl_by_batch, itl_samples_ms, tpot_ms
from loadgen.server_metrics import Beside, beside
from loadgen.slo import Goodput

CPU_SHARE_LIMIT = 0.8
LAG_FLOOR_S = 0.002  # lag that is never warned of: timers of the event loop count in milliseconds
LAG_ITL_SHARE = 0.5
LAG_CPU_SHARE = 0.3
SEND_DELAY_LIMIT_MS = 5.0

FORMULAS = {
    "TTFT": "first chunk with tokens - due; chunks that carry only a role do not count",
    "due": "send start in a closed loop, the scheduled time in an open loop. The later requests of "
    "a chat are due when they are sent, as soon as the answer before has ended",
    "send delay": "send start - scheduled time, in an open loop: the client's own delay, which the "
    "latencies include",
    "ITL": "gap between neighbouring chunks with tokens / k, the tokens of the later one, and "
    "counted k times. TTFT, and what the first chunk brought, are no part of it; chunks of one "
    "read share its time",
    "k": "token ids of a chunk; without ids one for each chunk, and what usage counts beyond that "
    "shared out between the chunks by the length of their text",
    "ITL jitter": "p99 / p50 of ITL",
    "TPOT": "(E2E - TTFT) / tokens after the first chunk, for each request that has any: / (n - 1) "
    "where each token has a chunk",
    "E2E": "[DONE] - due; the end of the response for a server that sends no [DONE]",
    "n": "output tokens, from the server's usage; without usage, token ids or chunks with tokens",
    "chunk with tokens": "one with text or token ids; one without either, too, where usage shows "
    "that each token had a chunk. A server need not send a chunk for a token without text",
    "cached": "prompt tokens that the server says it found in its prefix cache / prompt tokens; - "
    "where it does not say",
    "seed": "decides the prompts, is drawn for each run, and is given as --seed to send the same "
    "prompts again",
    "goodput": "requests that succeeded and met every limit of --slo / window; the share of all "
    "requests that did is the attainment. An itl limit is one on the p99 of a request's ITL",
    "server": "how much the server's own counters in /metrics grew between the end of the warm-up "
    "and the end of the level; it counts requests of others and of failures too, and its times "
    "begin when it has read a request",
    "tok/s": "output tokens of successful requests / window",
    "req/s": "successful requests / window",
    "window": "from when the first request of a level was due to its last end, failures and the "
    "tail included",
    "in flight": "sum of all requests' times from send start to end / window",
    "pN": "the smallest sample that at least N% of the samples (of the tokens, for ITL) do not "
    "exceed: with fewer than 100 samples p99 is the largest, and with fewer than 10 so is p90",
    "client": "the busiest client process: its CPU time / wall time, and how late a timer of its "
    f"event loop fires. Above {CPU_SHARE_LIMIT:.0%} of a core, or with a p99 above "
    f"{LAG_ITL_SHARE:.0%} of the median ITL and {LAG_FLOOR_S * 1e3:g} ms, a warning says that the "
    "client may be what was measured. All client processes read one clock, CLOCK_MONOTONIC",
    "closed loop": "a new request is sent only when one ends, so this measures service at a fixed "
    "concurrency. It says nothing about latency at a fixed arrival rate: a slow server is asked "
    "less often (coordinated omission)",
    "open loop": "requests are due at times that do not depend on the server: gamma-distributed "
    "gaps with the mean 1 / --request-rate and the shape --burstiness, or a trace's. One that is "
    "sent late is not left out, and its latencies count from when it was due",
}


class LevelSummary(msgspec.Struct, frozen=True):
    """The metrics of one level. A distribution without samples is None."""

    concurrency: int | None
    request_rate: float | None
    """The load; both are None for a trace."""
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
    send_delay_ms: Distribution | None
    """The send delays of all requests of an open loop, failures included; None in a closed loop."""
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    itl_jitter: float | None
    """p99 over p50 of the ITL; None without an ITL, or if its median is 0, as for answers that came
    in one read."""
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    goodput: Goodput | None
    """None if there are no objectives."""
    by_batch: dict[int, BatchITL]
    """ITL by the number of requests that decoded at the same time."""
    server: list[Beside]
    """What the client counted, and what the server's own metrics say; empty if it has none."""
    server_counters: dict[str, float]
    """By how much each of the server's counters grew while the level was measured, if it did."""
    clients: list[ClientLoad]
    warnings: list[str]

    @property
    def load(self) -> Load:
        """The load of the level."""
        return Load(self.concurrency, self.request_rate)

    @property
    def any_failed(self) -> bool:
        """Whether a request failed, in the warm-up or in the measurement."""
        return self.failed > 0 or bool(self.warmup_failures)


def summarize(level: LevelResult) -> LevelSummary:
    """Compute the metrics of one level from its records."""
    good = [record for record in level.records if record.failure is None]
    failures = [record.failure for record in level.records if record.failure is not None]
    window_s = 0.0
    if level.records:
        first = min(record.due_s for record in level.records)
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

    delays = [(r.send_delay_s * 1e3, 1.0) for r in level.records if r.scheduled_s is not None]
    delay = Distribution.of(delays)
    warnings = client_warnings(level.clients, itl)
    if delay is not None and delay.p99 > SEND_DELAY_LIMIT_MS:
        warnings.append(
            f"client-bound: requests were sent up to {delay.p99:.1f} ms late (p99), which their "
            "latencies include; raise --max-concurrency if as many were in flight, or --processes"
        )
    if without_usage:
        warnings.append(
            f"{without_usage} of {len(good)} answers came without usage: their tokens were "
            "counted by chunks and may be too few"
        )
    if without_done := sum(record.without_done for record in good):
        warnings.append(
            f"{without_done} of {len(good)} answers had a finish reason and came without [DONE]: "
            "they end with the response"
        )
    if ended := sum(record.disobeys_ignore_eos for record in good):
        warnings.append(
            f"{ended} of {len(good)} answers ended before --output-tokens, as this server does not "
            "obey ignore_eos: their lengths are the model's, and differ between servers"
        )
    if without_times:
        warnings.append(
            f"{without_times} of {len(good)} answers came without a chunk that has text: of their "
            "tokens none is timed; with --return-token-ids those without text can be, where the "
            "server knows it"
        )
    if cached_tokens and not level.shares_prefixes:
        warnings.append(
            f"{cached_tokens} of {prompt_tokens} prompt tokens were in the server's prefix cache "
            "and not computed: it has seen prompts of this seed before, or what a chat template "
            "puts in front of each; without --seed a run draws prompts of its own"
        )
    ttft = Distribution.of((value, 1.0) for value in ttfts)
    e2e = Distribution.of((record.e2e_s * 1e3, 1.0) for record in good)
    return LevelSummary(
        concurrency=level.load.concurrency,
        request_rate=level.load.request_rate,
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
        in_flight=rate(sum(record.end_s - record.start_s for record in level.records)),
        prompt_tokens=prompt_tokens if prompt_counts else None,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        chunks=chunks,
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        without_usage=without_usage,
        without_times=without_times,
        send_delay_ms=delay,
        ttft_ms=ttft,
        itl_ms=itl,
        itl_jitter=itl.p99 / itl.p50 if itl is not None and itl.p50 > 0 else None,
        tpot_ms=Distribution.of((value, 1.0) for value in tpots),
        e2e_ms=e2e,
        goodput=(
            Goodput.of(level.records, level.objectives, window_s) if level.objectives else None
        ),
        by_batch=itl_by_batch(good),
        server=beside(
            level.server_counters,
            {
                "requests": float(len(good)),
                "prompt tokens": float(prompt_tokens),
                "output tokens": float(output_tokens),
                "TTFT mean ms": ttft.mean if ttft else None,
                "ITL mean ms": itl.mean if itl else None,
                "E2E mean ms": e2e.mean if e2e else None,
            },
        ),
        server_counters=level.server_counters,
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

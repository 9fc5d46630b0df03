"""Log lines about the engine's throughput and queue, every few seconds while it is working.

The format is vLLM's, with the share of each graph mode in the steps, and that of each reason for
the number of prompt tokens in the steps for which some waited. Rates refer to the time since
the previous line, so everything is reported once; an idle engine logs nothing.

Knows: the engine's counters. Knows nothing of where they come from.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from minisrv.engine.messages import EngineStats

logger = logging.getLogger("minisrv.stats")

SECONDS = 10.0
"""Number of seconds between two lines, as in vLLM."""


class StatsLog:
    """Logs lines whenever they are due; call `tick` often.

    stats: takes a snapshot of the counters.
    clock: returns the time in seconds.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._last_stats = stats()
        self._logged_at = clock()

    def tick(self) -> None:
        """Log a line if it is time for one and there is something to report."""
        now = self._clock()
        seconds = now - self._logged_at
        if seconds < SECONDS:
            return
        before, stats = self._last_stats, self._stats()
        self._last_stats, self._logged_at = stats, now
        if stats.steps != before.steps or stats.running or stats.waiting:
            _log(before, stats, seconds)


def _log(before: EngineStats, stats: EngineStats, seconds: float) -> None:
    prompt = (stats.prefill_tokens - before.prefill_tokens) / seconds
    generation = (stats.generated_tokens - before.generated_tokens) / seconds
    cache = 100 * stats.kv_blocks_used / max(1, stats.kv_blocks_total)
    queries = stats.prefix_cache_queries - before.prefix_cache_queries
    hits = 100 * (stats.prefix_cache_hits - before.prefix_cache_hits) / max(1, queries)
    modes = _shares(
        ((count.mode, count.steps) for count in before.steps),
        ((count.mode, count.steps) for count in stats.steps),
    )
    budgets = _shares(
        ((count.reason, count.steps) for count in before.budgets),
        ((count.reason, count.steps) for count in stats.budgets),
    )
    logger.info(
        "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
        "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: "
        "%.1f%%, Steps: %s, Prefill budgets: %s",
        prompt,
        generation,
        stats.running,
        stats.waiting,
        cache,
        hits,
        _listed(modes),
        _listed(budgets),
        extra={
            "json_fields": {
                "prompt_tokens_per_s": round(prompt, 1),
                "generation_tokens_per_s": round(generation, 1),
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_cache_usage_percent": round(cache, 1),
                "prefix_cache_hit_percent": round(hits, 1),
                "steps_percent": {mode: round(share, 1) for mode, share in modes.items()},
                "prefill_budgets_percent": {
                    reason: round(share, 1) for reason, share in budgets.items()
                },
            }
        },
    )


def _shares(
    before: Iterable[tuple[str, int]], after: Iterable[tuple[str, int]]
) -> dict[str, float]:
    """Return the percentage of each name in the steps that were counted since `before`, the largest
    first, without names that had none."""
    steps: Counter[str] = Counter()
    for counts, sign in ((after, 1), (before, -1)):
        for name, number in counts:
            steps[name] += sign * number
    return {name: 100 * number / steps.total() for name, number in steps.most_common() if number}


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1f}%" for name, share in shares.items()) or "none"

"""Log lines about the engine's throughput and queue, every few seconds while it is working.

The format is vLLM's, with the share of each graph mode in the steps. Rates refer to the time since
the previous line, so everything is reported once; an idle engine logs nothing.

Knows: the engine's counters. Knows nothing of where they come from.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

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
    shares = _shares(before, stats)
    logger.info(
        "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
        "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: "
        "%.1f%%, Steps: %s",
        prompt,
        generation,
        stats.running,
        stats.waiting,
        cache,
        hits,
        ", ".join(f"{mode} {share:.1f}%" for mode, share in shares.items()) or "none",
        extra={
            "json_fields": {
                "prompt_tokens_per_s": round(prompt, 1),
                "generation_tokens_per_s": round(generation, 1),
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_cache_usage_percent": round(cache, 1),
                "prefix_cache_hit_percent": round(hits, 1),
                "steps_percent": {mode: round(share, 1) for mode, share in shares.items()},
            }
        },
    )


def _shares(before: EngineStats, stats: EngineStats) -> dict[str, float]:
    """Return the percentage of each runtime mode in the steps since `before`, without modes that
    had none."""
    steps: Counter[str] = Counter()
    for snapshot, sign in ((stats, 1), (before, -1)):
        for count in snapshot.steps:
            steps[count.mode] += sign * count.steps
    return {mode: 100 * number / steps.total() for mode, number in steps.most_common() if number}

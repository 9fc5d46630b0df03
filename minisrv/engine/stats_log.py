"""Lines in the log that tell what an engine does, every few seconds while it does something.

The form is vLLM's, with the share of each graph mode in the steps. Rates are of the time since the
line before, so what has been counted meanwhile is told once; an engine that rests says nothing.

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
"""Between two lines; vLLM's."""


class StatsLog:
    """Call `tick` often.

    stats: takes a snapshot of the counters. clock: seconds.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._last = stats()
        self._told = clock()

    def tick(self) -> None:
        """Log a line if it is time for one and there is something to tell."""
        now = self._clock()
        seconds = now - self._told
        if seconds < SECONDS:
            return
        before, stats = self._last, self._stats()
        self._last, self._told = stats, now
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
            "said": {
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
    """Percent of the steps since `before` by runtime mode, those without steps left out."""
    steps: Counter[str] = Counter()
    for snapshot, sign in ((stats, 1), (before, -1)):
        for count in snapshot.steps:
            steps[count.mode] += sign * count.steps
    return {mode: 100 * number / steps.total() for mode, number in steps.most_common() if number}

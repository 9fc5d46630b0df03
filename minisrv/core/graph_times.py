"""The measured times of graphs, and the choice of a cheaper graph by them.

Knows: which graphs hold the batches of which others. Knows nothing of how steps are timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.modes import GraphKey

MARGIN = 0.05
"""Share of its time by which another graph must be cheaper than the one that the static order
chooses; a smaller difference is noise of the measurement. The other graph's median is compared with
the chosen graph's minimum, because a disturbance makes a measurement longer."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """The duration of a step in milliseconds, from several measurements, and the work of its
    attention."""

    min_ms: float
    median_ms: float
    work: AttentionWork = NO_WORK


def cheapest(key: GraphKey, keys: list[GraphKey], times: Mapping[GraphKey, StepTime]) -> GraphKey:
    """Return the cheapest graph that holds every batch which `key` holds, if it is cheaper by the
    margin; otherwise `key` itself.

    Graphs for mixed batches hold any batch. Graphs for decode hold only decode batches, and stand
    in only for graphs that end with the same output.
    """
    size, output = key[1].num_tokens, key[1].output
    admissible = [
        (mode, other)
        for mode, other in keys
        if other.num_tokens >= size
        and (not other.uniform_decode or (key[1].uniform_decode and other.output is output))
    ]
    best = min(admissible, key=lambda other: times[other].median_ms)
    return best if times[best].median_ms < (1 - MARGIN) * times[key].min_ms else key

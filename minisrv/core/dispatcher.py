"""Dispatch: from a described batch to the graph that runs it, as a pure function.

Knows: the ladders, and how long each graph took where graphs have been timed. For every batch it
gives the runtime mode, the padded key and the reason, and it can list the whole of that function
before a model is loaded. Knows nothing of graphs, so it cannot depend on what happens to be
captured: every key of the ladders is captured, and tests prove that no other is given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from minisrv.core.ladder import Ladders, decode_descriptor, rung_of
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Epilogue, GraphKey, Reason

MARGIN = 0.05
"""By this share of its time a graph must be cheaper than the one whose turn it is: below that it
is the measurement that differs. Its median is compared with the other's least, because what
disturbs a measurement makes it longer."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of a step, measured several times."""

    least: float
    median: float


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How one step runs. NONE never pads.

    epilogue: what follows a step that ends at the hidden states; None if it does not.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    reason: Reason
    epilogue: GraphKey | None = None


class Dispatcher:
    """The order is static: a graph for pure decode, one for any batch, NONE; of each kind the
    smallest rung that holds the batch. Another graph that holds it takes its place where it has
    been measured to be cheaper."""

    def __init__(
        self, ladders: Ladders, times: Mapping[GraphKey, StepTime] = MappingProxyType({})
    ) -> None:
        """times: of a step by each graph of the ladders, or nothing."""
        self.ladders = ladders
        keys = [key for key in ladders.keys() if times and key[1].forward]  # noqa: SIM118
        self._cheaper = {
            key: better for key in keys if (better := _cheapest(key, keys, times)) != key
        }

    def dispatch(
        self,
        num_tokens: int,
        num_reqs: int,
        *,
        uniform_decode: bool,
        needs_logits: bool = False,
        masked: bool = False,
    ) -> Dispatch:
        """Choose for a batch of `num_tokens` tokens of `num_reqs` requests.

        uniform_decode: every request is in its decode phase, because its state says so: a
            prefill chunk of one token looks the same and is not.
        needs_logits: some request has its logits read or changed outside the graph.
        masked: what some request may sample is found out while the model runs.
        """
        apart = needs_logits or masked
        found = self._first(num_tokens, num_reqs, uniform_decode, apart)
        better = self._cheaper.get((found.mode, found.descriptor))
        if better is not None:
            found = Dispatch(*better, Reason.CHEAPER)
        if found.descriptor.epilogue is not Epilogue.HIDDEN:
            return found
        epilogue = self.ladders.epilogue_key(num_reqs, needs_logits=needs_logits)
        return replace(found, epilogue=epilogue)

    def _first(self, num_tokens: int, num_reqs: int, uniform_decode: bool, apart: bool) -> Dispatch:
        """By the static order. apart: the epilogue may not be in the step's graph."""
        ladders = self.ladders
        if uniform_decode and (rung := rung_of(ladders.decode, num_reqs)):
            epilogue = Epilogue.HIDDEN if apart else Epilogue.TOKENS
            return Dispatch(
                CUDAGraphMode.FULL, decode_descriptor(rung, epilogue), Reason.PURE_DECODE
            )
        if rung := rung_of(ladders.mixed, num_tokens):
            reason = Reason.NO_FULL_GRAPH if uniform_decode else Reason.HAS_PREFILL
            return Dispatch(*ladders.mixed_key(rung), reason)
        if ladders.mode is CUDAGraphMode.NONE:
            reason = Reason.GRAPHS_OFF
        elif uniform_decode or ladders.mixed:
            reason = Reason.ABOVE_LADDER
        else:
            reason = Reason.NO_MIXED_GRAPH
        return Dispatch(CUDAGraphMode.NONE, BatchDescriptor(num_tokens), reason)

    def coverage(self) -> list[CoverageRow]:
        """The dispatch of every batch size up to the limits, equal neighbours merged."""
        ladders = self.ladders
        rows: list[CoverageRow] = []
        for size in range(1, ladders.max_num_seqs + 1):
            _extend(rows, "decode", size, self.dispatch(size, size, uniform_decode=True))
        for size in range(1, ladders.max_num_batched_tokens + 1):
            _extend(rows, "mixed", size, self.dispatch(size, 1, uniform_decode=False))
        return rows


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """Batches of `first` to `last` requests (decode) or tokens (mixed) run alike.

    rung: the padded size, None where the batch runs unpadded.
    """

    kind: str
    first: int
    last: int
    mode: CUDAGraphMode
    rung: int | None
    reason: Reason


def _extend(rows: list[CoverageRow], kind: str, size: int, found: Dispatch) -> None:
    rung = None if found.mode is CUDAGraphMode.NONE else found.descriptor.num_tokens
    row = CoverageRow(kind, size, size, found.mode, rung, found.reason)
    if rows:
        last = rows[-1]
        if (last.kind, last.mode, last.rung, last.reason) == (kind, row.mode, rung, row.reason):
            row = CoverageRow(kind, last.first, size, row.mode, rung, row.reason)
            rows.pop()
    rows.append(row)


def _cheapest(key: GraphKey, keys: list[GraphKey], times: Mapping[GraphKey, StepTime]) -> GraphKey:
    """`key`, or the cheapest graph that holds whatever it holds, if the margin is kept. Those for
    mixed batches hold any batch, those for decode any decode batch of their own epilogue."""
    size, epilogue = key[1].num_tokens, key[1].epilogue
    admissible = [
        (mode, other)
        for mode, other in keys
        if other.num_tokens >= size
        and (not other.uniform_decode or (key[1].uniform_decode and other.epilogue is epilogue))
    ]
    best = min(admissible, key=lambda other: times[other].median)
    return best if times[best].median < (1 - MARGIN) * times[key].least else key

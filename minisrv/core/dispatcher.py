"""Dispatch: from a described batch to the graph that runs it, as a pure function.

Knows: the ladders (the captured sizes), and how long each graph takes if graphs have been timed.
For every batch it returns the runtime mode, the padded key and the reason, and it can list all its
answers before a model is loaded. Knows nothing of the captured graphs themselves, so an answer
cannot depend on what happens to be captured: every key of the ladders is captured, and tests prove
that no other key is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.core.ladder import Ladders, decode_descriptor, pad_to_capture_size
from minisrv.modes import (
    BatchDescriptor,
    CUDAGraphMode,
    GraphKey,
    Reason,
    Stage,
    StageOutput,
)

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


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The graphs that run one step, stage by stage. A stage in mode NONE is never padded.

    mode: the runtime mode of the model's stage.
    descriptor: its padded shape.
    reason: the reason for the mode.
    epilogue: the key of the second stage, the epilogue, which follows a model's stage that ends at
        the hidden states; None if it does not end there.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    reason: Reason
    epilogue: GraphKey | None = None

    @property
    def key(self) -> GraphKey:
        """The key of the model's stage."""
        return self.mode, self.descriptor

    @property
    def stages(self) -> tuple[GraphKey, ...]:
        """The keys of the stages, in the order in which they are launched."""
        return (self.key,) if self.epilogue is None else (self.key, self.epilogue)


class Dispatcher:
    """Chooses the graph for a batch.

    The static order is a graph for pure decode, a graph for any batch, then NONE; of each kind the
    smallest captured size that holds the batch. Another graph that holds the batch replaces that
    choice if it was measured to be cheaper.
    """

    def __init__(
        self, ladders: Ladders, times: Mapping[GraphKey, StepTime] = MappingProxyType({})
    ) -> None:
        self.ladders = ladders
        self.use_times(times)

    def use_times(self, times: Mapping[GraphKey, StepTime]) -> None:
        """Choose by these durations of a step by each graph of the ladders from the next batch on.
        They are empty if graphs were not timed."""
        keys = [key for key in self.ladders.keys() if times and key[1].stage is Stage.MODEL]  # noqa: SIM118
        self._cheaper = {
            key: better for key in keys if (better := _cheapest(key, keys, times)) != key
        }

    def dispatch(
        self,
        num_tokens: int,
        num_reqs: int,
        *,
        query_len: int | None,
        needs_logits: bool = False,
        has_structured_output_requests: bool = False,
    ) -> Dispatch:
        """Choose the graph for a batch of `num_tokens` tokens of `num_reqs` requests.

        query_len: the number of tokens of each request if every request is in its decode phase and
            has as many; None for any other batch. The caller takes it from the state of the
            requests: a prefill chunk of one token has the same shape and does not count.
        needs_logits: whether the logits of some request are read or changed outside the graph.
        has_structured_output_requests: whether a grammar restricts the next token of some request;
            the restriction becomes known while the model runs.
        """
        separate_epilogue = needs_logits or has_structured_output_requests
        found = self._static_choice(num_tokens, num_reqs, query_len, separate_epilogue)
        better = self._cheaper.get(found.key)
        if better is not None:
            found = Dispatch(*better, Reason.CHEAPER)
        if found.descriptor.output is not StageOutput.HIDDEN:
            return found
        epilogue = self.ladders.epilogue_key(num_reqs, needs_logits=needs_logits)
        return replace(found, epilogue=epilogue)

    def _static_choice(
        self, num_tokens: int, num_reqs: int, query_len: int | None, separate_epilogue: bool
    ) -> Dispatch:
        """Choose by the static order.

        separate_epilogue: whether the epilogue has to be a stage of its own.
        """
        ladders = self.ladders
        uniform_decode = query_len is not None
        if query_len == ladders.query_len and (
            padded := pad_to_capture_size(ladders.decode, num_reqs)
        ):
            output = StageOutput.HIDDEN if separate_epilogue else StageOutput.TOKENS
            key = decode_descriptor(padded, output, query_len)
            return Dispatch(CUDAGraphMode.FULL, key, Reason.PURE_DECODE)
        if padded := pad_to_capture_size(ladders.mixed, num_tokens):
            reason = Reason.NO_FULL_GRAPH if uniform_decode else Reason.HAS_PREFILL
            return Dispatch(*ladders.mixed_key(padded), reason)
        if ladders.mode is CUDAGraphMode.NONE:
            reason = Reason.GRAPHS_OFF
        elif uniform_decode or ladders.mixed:
            reason = Reason.ABOVE_LADDER
        else:
            reason = Reason.NO_MIXED_GRAPH
        return Dispatch(CUDAGraphMode.NONE, BatchDescriptor(num_tokens), reason)

    def coverage(self) -> list[CoverageRow]:
        """Return the dispatch of every batch size up to the limits, with equal neighbours
        merged."""
        ladders = self.ladders
        rows: list[CoverageRow] = []
        for size in range(1, ladders.max_num_seqs + 1):
            _extend(
                rows,
                "decode",
                size,
                self.dispatch(size * ladders.query_len, size, query_len=ladders.query_len),
            )
        for size in range(1, ladders.max_num_batched_tokens + 1):
            _extend(rows, "mixed", size, self.dispatch(size, 1, query_len=None))
        return rows


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """Batch sizes from `first` to `last` that run alike.

    kind: "decode", where sizes are numbers of requests, or "mixed", where they are numbers of
        tokens.
    padded_size: the size of the graph; None where the batch runs unpadded.
    """

    kind: str
    first: int
    last: int
    mode: CUDAGraphMode
    padded_size: int | None
    reason: Reason


def _extend(rows: list[CoverageRow], kind: str, size: int, found: Dispatch) -> None:
    padded_size = None if found.mode is CUDAGraphMode.NONE else found.descriptor.num_tokens
    row = CoverageRow(kind, size, size, found.mode, padded_size, found.reason)
    if rows:
        last = replace(rows[-1], last=size)
        if replace(row, first=last.first) == last:  # it runs like the size before it
            row = last
            rows.pop()
    rows.append(row)


def _cheapest(key: GraphKey, keys: list[GraphKey], times: Mapping[GraphKey, StepTime]) -> GraphKey:
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

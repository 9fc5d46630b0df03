"""Dispatch: from a described batch to the graph that runs it, as a pure function.

Knows: the ladders (the captured sizes), the keys of the graphs that are in service, and how long
each graph takes if graphs have been timed. For every batch it returns the runtime mode, the padded
key and the reason, before a model is loaded too. Knows nothing of the
captured graphs themselves: it is told which keys are in service, and tests prove that no other key
is returned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from minisrv.core.graph_times import StepTime, cheapest
from minisrv.core.ladder import Ladders, decode_descriptor, pad_to_capture_size
from minisrv.core.stand_ins import stand_ins, unpadded
from minisrv.modes import (
    BatchDescriptor,
    CUDAGraphMode,
    GraphKey,
    Reason,
    Stage,
    StageOutput,
)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The graphs that run one step, stage by stage. A stage in mode NONE is never padded.

    mode: the runtime mode of the model's stage.
    descriptor: its padded shape.
    reason: the reason for the mode.
    epilogue: the key of the second stage, the epilogue, which follows a model's stage that ends at
        the hidden states; None if it does not end there.
    missing: the keys of the smallest graphs that would hold the step's stages, where these are not
        in service.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    reason: Reason
    epilogue: GraphKey | None = None
    missing: tuple[GraphKey, ...] = ()

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
    smallest captured size that holds the batch. If its graph is not in service, another one takes
    its place (`stand_ins`), which is the next larger one of its kind wherever there is one. Another
    graph that holds the batch replaces that choice if it was measured to be cheaper.

    ladders: all sizes that may be captured.
    in_service: the keys of the graphs in service; None for all of the ladders.
    """

    def __init__(
        self,
        ladders: Ladders,
        times: Mapping[GraphKey, StepTime] = MappingProxyType({}),
        in_service: Collection[GraphKey] | None = None,
    ) -> None:
        self.ladders = ladders
        self._times = times
        self.use_graphs(ladders.keys() if in_service is None else in_service)

    def use_graphs(self, in_service: Collection[GraphKey]) -> None:
        """Choose among the graphs with these keys from the next batch on (see the class)."""
        self.in_service = frozenset(in_service)
        self._stand_ins = stand_ins(self.ladders.keys(), self.in_service)
        self.use_times(self._times)

    def stand_in(self, key: GraphKey) -> GraphKey:
        """Return the key itself if its graph is in service, or that of the graph that stands in."""
        return self._stand_ins.get(key, key)

    def use_times(self, times: Mapping[GraphKey, StepTime]) -> None:
        """Choose by these durations of a step by each graph from the next batch on. They are empty
        if graphs were not timed; a graph without one takes nobody's place."""
        self._times = times
        keys = [
            key
            for key in self.ladders.keys()  # noqa: SIM118  (not a mapping)
            if key in times and key in self.in_service and key[1].stage is Stage.MODEL
        ]
        self._cheaper = {
            key: better for key in keys if (better := cheapest(key, keys, times)) != key
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
        missing: tuple[GraphKey, ...] = ()
        if (stand_in := self._stand_ins.get(found.key)) is not None:
            missing = (found.key,)
            found = Dispatch(*unpadded(stand_in, num_tokens), Reason.SIZE_MISSING)
        better = self._cheaper.get(found.key)
        if better is not None:
            found = Dispatch(*better, Reason.CHEAPER)
        if found.descriptor.output is not StageOutput.HIDDEN:
            return replace(found, missing=missing) if missing else found
        epilogue = self.ladders.epilogue_key(num_reqs, needs_logits=needs_logits)
        if (stand_in := self._stand_ins.get(epilogue)) is not None:
            missing = (*missing, epilogue)
            epilogue = unpadded(stand_in, num_reqs)
        return replace(found, epilogue=epilogue, missing=missing)

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

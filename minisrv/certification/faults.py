"""Graphs that are broken on purpose, in the ways in which captured graphs have gone wrong
elsewhere: to show that certification and verification notice, and how.

A broken graph replays the right one behind a change of what it reads, as a server would make it
whose graph or whose inputs have the fault. Nothing else is changed, and eager runs are right.

Knows: how each fault comes about. Knows nothing of how it is found.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING

from minisrv.core.kv_cache import NULL_REQ_INDEX
from minisrv.modes import GraphKey, Stage

if TYPE_CHECKING:  # a command line names the faults without torch
    from torch import Tensor

    from minisrv.graph.backend import Replay
    from minisrv.runner.model_runner import ModelRunner


class Fault(enum.StrEnum):
    """A way in which a graph can be wrong."""

    STALE_TAIL = "stale-tail"
    """Padding keeps what the step before had in its place, so it reads and writes what belongs to
    another request."""
    LIVE_PADDING = "live-padding"
    """Padding belongs to a request, and not to nobody: the null index is taken for the first
    request index, and the null slot for the last one in the block of the step's first token. (A
    slot that a token of the step has too would be written twice, on a GPU in any order.)"""
    ADDRESS_DRIFT = "address-drift"
    """The graph reads an address at which the server no longer writes."""


def break_graph(runner: ModelRunner, key: GraphKey, fault: Fault) -> None:
    """Put a broken graph in the place of the installed one."""
    graph = runner.graphs[key]
    before, behind = _FAULTS[fault](runner, key)
    runner.install(key, replace(graph, calls=(before, *graph.calls, behind)))


def _padded(runner: ModelRunner, key: GraphKey) -> tuple[Tensor, int]:
    """Return the buffer that says to whom padding belongs, as far as the graph reads it, and the
    value that stands for nobody. Where tokens are padded, this is where they are written."""
    descriptor, buffers = key[1], runner.buffers
    if descriptor.uniform_decode:
        return buffers.req_indices[: descriptor.num_tokens], NULL_REQ_INDEX
    return buffers.slot_mapping[: descriptor.num_tokens], 0


def _stale_tail(runner: ModelRunner, key: GraphKey) -> tuple[Replay, Replay]:
    given, nobody = _padded(runner, key)
    kept = given.clone().fill_(nobody)

    def before() -> None:
        given.copy_(kept.where(given == nobody, given))
        kept.copy_(given)

    return before, _nothing


def _live_padding(runner: ModelRunner, key: GraphKey) -> tuple[Replay, Replay]:
    given, nobody = _padded(runner, key)
    block_size = runner.buffers.sizes.block_size

    def before() -> None:
        somebody = 1 if key[1].uniform_decode else (given[0] // block_size + 1) * block_size - 1
        given.masked_fill_(given == nobody, somebody)

    return before, _nothing


def _address_drift(runner: ModelRunner, key: GraphKey) -> tuple[Replay, Replay]:
    """Let the graph find, and write, what lay at its address when it was broken."""
    descriptor, buffers = key[1], runner.buffers
    rows = descriptor.num_tokens
    if descriptor.stage is Stage.EPILOGUE:
        moved = buffers.hidden[:rows]
    elif descriptor.uniform_decode:
        moved = runner.request_tensors.last_token
    else:
        moved = buffers.input_ids[:rows]
    old, new = moved.clone(), moved.clone()

    def before() -> None:
        new.copy_(moved)
        moved.copy_(old)

    def behind() -> None:
        old.copy_(moved)
        moved.copy_(new)

    return before, behind


def _nothing() -> None:
    """Stand where a replay has a call and nothing is to be done."""


_FAULTS = {
    Fault.STALE_TAIL: _stale_tail,
    Fault.LIVE_PADDING: _live_padding,
    Fault.ADDRESS_DRIFT: _address_drift,
}

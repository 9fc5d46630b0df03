"""The graphs that stand in for those that are not in service.

A graph may not be captured yet, may have failed its certification, or may have been taken out of
service. Its batches run by the next larger graph of its kind; those of a decode graph without a
larger one by a graph for mixed batches, which hold any batch; and where there is none, eagerly.

Knows: which graphs hold the batches of which others. Knows nothing of why one is missing.
"""

from __future__ import annotations

from collections.abc import Collection

from minisrv.core.ladder import epilogue_descriptor
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage, StageOutput


def stand_ins(
    keys: Collection[GraphKey], in_service: Collection[GraphKey]
) -> dict[GraphKey, GraphKey]:
    """Return, for each key that is not in service, the key of the graph that stands in. In mode
    NONE it is not padded yet (`unpadded`)."""
    found: dict[GraphKey, GraphKey] = {}
    next_larger: dict[tuple[Stage, bool, StageOutput], GraphKey] = {}
    for key in sorted(keys, key=lambda key: key[1].num_tokens, reverse=True):
        kind = (key[1].stage, key[1].uniform_decode, key[1].output)
        if key in in_service:
            next_larger[kind] = key
        else:
            mixed = next_larger.get((key[1].stage, False, StageOutput.HIDDEN))
            found[key] = next_larger.get(kind) or mixed or (CUDAGraphMode.NONE, key[1])
    return found


def unpadded(stand_in: GraphKey, size: int) -> GraphKey:
    """Return a stand-in for a batch of `size` tokens, or an epilogue's rows: in mode NONE a batch
    is not padded."""
    mode, key = stand_in
    if mode is not CUDAGraphMode.NONE:
        return stand_in
    if key.stage is Stage.EPILOGUE:
        return mode, epilogue_descriptor(size, key.output)
    return mode, BatchDescriptor(size)

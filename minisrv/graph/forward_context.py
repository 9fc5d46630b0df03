"""The forward context: what one step says to whatever runs below it.

It carries the runtime mode and the batch descriptor to the graph wrappers, and the attention
arguments to the attention layer. Only those two read it; the decoder in between does not, so
that one definition runs eagerly, under capture and (through replay) not at all.
Knows nothing of requests or of how a step was scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from minisrv.modes import BatchDescriptor, CUDAGraphMode


@dataclass(frozen=True)
class AttentionMetadata:
    """Arguments of the attention op that change by step. Tensors are views of static buffers.

    R rows (requests), T tokens of the padded step. Tokens beyond `query_start_loc[R]` belong to no
    request, and the op zero-fills their output. Where a graph holds attention too, rows are padded
    as well: those of a mixed batch are empty.

    qkv: [T, qkv_size] model dtype; the op's argument buffer, shared by all layers.
    out: [T, q_size] model dtype; the op's result buffer, shared by all layers.
    slot_mapping: [T] int64, the cache position (block * block_size + offset) each token writes.
    block_table: [R, max_blocks] int32, padded with the null block 0.
    seq_lens: [R] int32, tokens in the cache once the step has written its own.
    query_start_loc: [R + 1] int32, monotone; the step's tokens of row r are
        query_start_loc[r] to query_start_loc[r + 1].
    max_query_len: no row has more tokens; 1 only where every row has one and T is R. A number, so
        that a graph which holds attention keeps that of its capture.
    """

    qkv: Tensor
    out: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int


@dataclass(frozen=True)
class ForwardContext:
    """The mode, key and attention arguments of a step, or of its epilogue, which has no attention.

    break_at: set while pieces are captured. The attention layer hands it what must run between
    two pieces instead of running it.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    attn: AttentionMetadata | None
    break_at: Callable[[Callable[[], None]], None] | None = None

    @property
    def attention(self) -> AttentionMetadata:
        """`attn`, for the layer that is in every step and in no epilogue."""
        assert self.attn is not None, "an epilogue has no attention"
        return self.attn


_current: ContextVar[ForwardContext | None] = ContextVar("forward_context", default=None)


def get_forward_context() -> ForwardContext:
    """The context of the step that is running. Outside of one it is our own mistake to ask."""
    context = _current.get()
    assert context is not None, "no forward context is set"
    return context


@contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` current for the block; nests, and restores the outer one."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)

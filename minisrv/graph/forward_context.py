"""The forward context: the description of a step for the code that runs below it.

It carries the runtime mode and the batch descriptor to the graph wrappers, and the attention
arguments to the attention layer. Only those two read it; the decoder in between does not, so the
same definition of the model runs eagerly and under capture, and not at all during a replay. Knows
nothing of requests or of how a step was scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from minisrv.graph.captured import CapturedGraph
from minisrv.graph.observer import StepObserver
from minisrv.modes import BatchDescriptor, CUDAGraphMode


@dataclass(frozen=True)
class AttentionMetadata:
    """Arguments of the attention op that change with each step. Tensors are views of static
    buffers.

    There are R rows (requests) and T tokens in the padded step. Tokens beyond `query_start_loc[R]`
    belong to no request, and the op zero-fills their output. Where a graph contains attention too,
    rows are padded as well; the padding rows of a mixed batch are empty.

    qkv: [T, qkv_size] in the model's dtype; the argument buffer of the op, shared by all layers.
    out: [T, q_size] in the model's dtype; the result buffer of the op, shared by all layers.
    slot_mapping: [T] int64, the cache position (block * block_size + offset) that each token
        writes.
    block_table: [R, max_blocks] int32, padded with the null block 0.
    seq_lens: [R] int32, the number of tokens in the cache once the step has written its own.
    query_start_loc: [R + 1] int32, monotone; the step's tokens of row r are query_start_loc[r] to
        query_start_loc[r + 1].
    max_query_len: an upper bound of the number of tokens in a row; 1 only where every row has one
        token and T is R. It is a Python number, so that a graph which contains attention keeps the
        value from its capture.
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
    """The mode, key and attention arguments of a stage of a step; an epilogue has no attention.

    graph: the graph to replay instead of the installed one, because it is being certified.
    observers: those who are told of each replay.
    break_at: set while the pieces of a PIECEWISE graph are captured. Instead of running the
        attention op, the attention layer passes this function what must run between two pieces.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    attn: AttentionMetadata | None = None
    graph: CapturedGraph | None = None
    observers: Sequence[StepObserver] = ()
    break_at: Callable[[Callable[[], None]], None] | None = None

    @property
    def attention(self) -> AttentionMetadata:
        """The value of `attn`, for the attention layer, which runs in every step and in no
        epilogue."""
        assert self.attn is not None, "an epilogue has no attention"
        return self.attn


_current: ContextVar[ForwardContext | None] = ContextVar("forward_context", default=None)


def get_forward_context() -> ForwardContext:
    """Return the context of the step that is running. It is a programming error to call this
    outside of one."""
    context = _current.get()
    assert context is not None, "no forward context is set"
    return context


@contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` current for the block. Calls can be nested; the outer context is restored."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)

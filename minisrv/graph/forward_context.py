"""The forward context: the description of a step for the code that runs below it.

It carries the runtime mode and the batch descriptor to the graph wrappers, and the layers and the
metadata of attention to the attention op (`graph.attention`). Only those two read it; the model in
between does not, so the same definition of the model runs eagerly, under capture and in a compiler,
and not at all during a replay. Knows nothing of requests or of how a step was scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from minisrv.graph.captured import CapturedGraph
from minisrv.graph.observer import StepObserver
from minisrv.kernels.attention_arguments import AttentionLayer, AttentionMetadata
from minisrv.modes import BatchDescriptor, CUDAGraphMode


@dataclass(frozen=True)
class ForwardContext:
    """The mode, key and attention arguments of a stage of a step; an epilogue has no attention.

    attn_metadata: the metadata of the step; None for an epilogue.
    layers: the attention layers of the model, in the order of their indices.
    graph: the graph to replay instead of the installed one, because it is being certified.
    observers: those who are told of each replay, and of each piece of the model.
    graph_break: set while the pieces of a PIECEWISE graph are captured. Instead of computing
        attention, the op passes this function what must run between two pieces.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    attn_metadata: AttentionMetadata | None = None
    layers: Sequence[AttentionLayer] = ()
    graph: CapturedGraph | None = None
    observers: Sequence[StepObserver] = ()
    graph_break: Callable[[Callable[[], None]], None] | None = None


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

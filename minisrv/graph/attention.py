"""The attention op: the one operation of a model that differs by step, at which graphs break.

A recorder or a compiler sees a single operation with four arguments. Everything else is found below
the op's boundary, in the forward context: the layer that the op is for, the metadata of the step,
and whether a graph is being captured in pieces. So a model's forward reads no context, and can be
traced. Knows nothing of how attention is computed, nor of how a graph is recorded.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from minisrv import kernels
from minisrv.graph.forward_context import get_forward_context
from minisrv.kernels.registration import register_op


def attention(qkv: Tensor, positions: Tensor, out: Tensor, layer: int) -> None:
    """Compute the attention of a layer in the current forward context, as `kernels.attention` does.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], before norm and rotation.
    positions: [T] int64.
    out: [T, num_heads * head_dim], written.
    layer: the index of the layer in the context's `layers`.

    While the pieces of a graph are captured, nothing is computed. Instead the graph breaks here,
    and this function runs at every replay between two pieces, in the forward context of that
    replay. So the three tensors must then be static.
    """
    context = get_forward_context()
    if context.graph_break is not None:
        context.graph_break(partial(attention, qkv, positions, out, layer))
        return
    assert context.attn_metadata is not None, "an epilogue has no attention"
    kernels.attention(context.layers[layer], qkv, positions, context.attn_metadata, out)
    for observer in context.observers:
        observer.piece()


attention_op = register_op(
    "attention",
    "(Tensor qkv, Tensor positions, Tensor(a!) out, int layer) -> ()",
    every_device=attention,
)
"""The op that a model calls. It writes to the KV cache of its layer as well, which is not among its
arguments."""

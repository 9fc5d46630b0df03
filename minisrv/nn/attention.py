"""The attention of a layer: projections around the attention op.

The QKV projection writes the op's argument and the output projection reads its result. Both are
static buffers of the model, so that they connect the graph captured up to the op with the one
captured after it. Knows nothing of the step: the op finds what differs by step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minisrv.graph.attention import attention_op
from minisrv.kernels import AttentionLayer
from minisrv.model_config import ModelConfig
from minisrv.nn.layers import Destination, Projection, RMSNorm


class Attention(nn.Module):
    """The attention of one layer.

    index: the index of the layer in the model.
    """

    def __init__(self, config: ModelConfig, index: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        parts = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        self.qkv = Projection(config.hidden_size, parts, bias=config.qkv_bias, dtype=dtype)
        self.o = Projection(
            config.q_size, {"o_proj": config.hidden_size}, bias=config.output_bias, dtype=dtype
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)
        self.config = config
        self.index = index

    def add_to(
        self, residual: Tensor, norm: RMSNorm, positions: Tensor, qkv: Tensor, out: Tensor
    ) -> None:
        """Add the attention of norm(residual) to residual [T, hidden], in place.

        positions: [T] int64; it must be the static tensor, because the op may run at replay.
        qkv, out: [T, qkv_size] and [T, q_size], static buffers that are overwritten.
        """
        self.qkv.write_to(qkv, residual, norm)
        attention_op(qkv, positions, out, self.index)
        self.o.add_to(residual, out)

    def bind(self, kv_cache: Tensor, cos_sin: Tensor) -> AttentionLayer:
        """Return the description of this layer for the attention op, with its KV cache and the
        model's rotation table."""
        config = self.config
        return AttentionLayer(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=config.rms_norm_eps,
            cos_sin=cos_sin,
            kv_cache=kv_cache,
        )

    def destinations(self) -> Iterator[Destination]:
        """Yield the destinations of four checkpoint projections, and of two norms if there are
        any."""
        yield from self.qkv.destinations()
        yield from self.o.destinations()
        if self.q_norm is not None and self.k_norm is not None:
            yield "q_norm.weight", self.q_norm.weight
            yield "k_norm.weight", self.k_norm.weight

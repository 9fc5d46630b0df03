"""The attention layer: projections around the attention op. It alone reads the forward context.

The QKV projection writes the context's static `qkv` and the output projection reads its static
`out`, so that these buffers connect the graph captured up to the op with the one captured after it.
Knows nothing of what else the step or the graph contains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minisrv.graph.forward_context import AttentionMetadata, get_forward_context
from minisrv.kernels.attention import attention_op
from minisrv.model_config import ModelConfig
from minisrv.nn.layers import Destination, Projection, RMSNorm


class Attention(nn.Module):
    """The attention of one layer.

    kv_cache: [num_blocks, block_size, 2, num_kv_heads, head_dim], bound by `Decoder.bind_kv_cache`.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
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
        self.kv_cache: Tensor | None = None

    def add_to(self, residual: Tensor, norm: RMSNorm, positions: Tensor, cos_sin: Tensor) -> None:
        """Add the attention of norm(residual) to residual [T, hidden], in place.

        positions: [T] int64; it must be the static tensor, because the op may run at replay.
        """
        context = get_forward_context()
        attn = context.attention
        self.qkv.write_to(attn.qkv, residual, norm)
        if context.break_at is None:
            self._attend(attn, positions, cos_sin)
        else:  # it uses the context of the replay, because the rows change
            context.break_at(
                lambda: self._attend(get_forward_context().attention, positions, cos_sin)
            )
        self.o.add_to(residual, attn.out)

    def _attend(self, attn: AttentionMetadata, positions: Tensor, cos_sin: Tensor) -> None:
        assert self.kv_cache is not None, "no KV cache is bound"
        attention_op(
            attn.qkv,
            positions,
            self.kv_cache,
            attn.slot_mapping,
            attn.block_table,
            attn.seq_lens,
            attn.query_start_loc,
            attn.out,
            max_query_len=attn.max_query_len,
            cos_sin=cos_sin,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.config.rms_norm_eps,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
        )

    def destinations(self) -> Iterator[Destination]:
        """Yield the destinations of four checkpoint projections, and of two norms if there are
        any."""
        yield from self.qkv.destinations()
        yield from self.o.destinations()
        if self.q_norm is not None and self.k_norm is not None:
            yield "q_norm.weight", self.q_norm.weight
            yield "k_norm.weight", self.k_norm.weight

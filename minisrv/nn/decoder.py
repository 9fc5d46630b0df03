"""The decoder: one definition for Llama, Qwen2 and Qwen3, which a ModelConfig distinguishes.

Knows: how layers follow each other, and the names that a checkpoint gives their weights. Knows
nothing of requests, batches or graphs; whatever differs by step reaches the attention op through
the forward context, past this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from minisrv.compile.decorator import Compiled, support_torch_compile
from minisrv.kernels import AttentionLayer
from minisrv.kernels.linear import LINEAR_METHODS, LinearMethod
from minisrv.model_config import ModelConfig
from minisrv.nn.attention import Attention
from minisrv.nn.layers import Destination, Embedding, GatedMLP, Projection, RMSNorm
from minisrv.nn.model import tensors_of
from minisrv.nn.rope import cos_sin_table


class DecoderLayer(nn.Module):
    """Attention and MLP. The input of each is normed, and its output is added to the residual
    stream."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(hidden, eps, dtype=dtype)
        self.attention = Attention(config, index, dtype=dtype)
        self.post_norm = RMSNorm(hidden, eps, dtype=dtype)
        self.mlp = GatedMLP(hidden, config.intermediate_size, bias=config.mlp_bias, dtype=dtype)

    def forward(self, residual: Tensor, positions: Tensor, qkv: Tensor, out: Tensor) -> None:
        """Update the residual stream [T, hidden] in place; see `Attention.add_to`."""
        self.attention.add_to(residual, self.input_norm, positions, qkv, out)
        self.mlp.add_to(residual, self.post_norm)

    def destinations(self) -> Iterator[Destination]:
        """Yield the layer's destinations; their names are the same in every supported
        architecture."""
        yield from _below("input_layernorm", self.input_norm.destinations())
        yield from _below("self_attn", self.attention.destinations())
        yield from _below("post_attention_layernorm", self.post_norm.destinations())
        yield from _below("mlp", self.mlp.destinations())


@support_torch_compile(dynamic_dims={"input_ids": 0, "positions": 0, "out": 0})
class Decoder(nn.Module):
    """A decoder-only transformer. Its parameters are uninitialised; `nn.loader` fills them, and
    `prepare`, `allocate_buffers` and `bind_kv_cache` make it ready to run.

    qkv: [max_num_tokens, qkv_size], the argument of the attention op, shared by all layers.
    attn_out: [max_num_tokens, q_size], the result of the attention op, shared by all layers.
    own_attention_layers: the layers as the attention op takes them, with their KV caches.
    """

    cos_sin: Tensor
    dynamic_dims: ClassVar[Mapping[str, int]]
    compiled: Compiled | None
    attention_layers: Sequence[AttentionLayer]
    qkv: Tensor
    attn_out: Tensor

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, dtype=dtype) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head: Projection | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Projection(
                config.hidden_size, {"lm_head": config.vocab_size}, bias=False, dtype=dtype
            )
        self.head: LinearMethod
        self.bytes_read = sum(parameter.nbytes for parameter in self.parameters())
        """Number of bytes of weights that a decode step reads: all weights except an embedding that
        is not the output projection too."""
        if self.lm_head is not None:
            self.bytes_read -= self.embed.weight.nbytes
        table = torch.empty(config.max_position_embeddings, 2 * config.head_dim, dtype=dtype)
        self.register_buffer("cos_sin", table, persistent=False)
        self.register_buffer("qkv", None, persistent=False)
        self.register_buffer("attn_out", None, persistent=False)
        self.own_attention_layers: Sequence[AttentionLayer] = []

    def forward(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        """Run the model: input_ids [T] int64 and positions [T] int64 give out [T, hidden], after
        the final norm.

        It runs within a forward context, whose attention metadata are those of these T tokens and
        whose layers are the model's `attention_layers`.
        """
        tokens = len(input_ids)
        qkv, attn_out = self.qkv[:tokens], self.attn_out[:tokens]
        residual: Tensor = self.embed(input_ids)
        for layer in self.layers:
            layer(residual, positions, qkv, attn_out)
        self.norm.write_to(out, residual)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, vocab] of the hidden states [R, hidden], in the dtype of
        serving."""
        return self.head.apply(hidden)

    def allocate_buffers(self, max_num_tokens: int) -> None:
        """Allocate the static buffers for steps of at most so many tokens."""
        weight, config = self.embed.weight, self.config
        self.qkv = weight.new_zeros(max_num_tokens, config.qkv_size)
        self.attn_out = weight.new_zeros(max_num_tokens, config.q_size)

    def bind_kv_cache(self, kv_caches: Sequence[Tensor]) -> None:
        """Give each layer its KV cache, [num_blocks, block_size, 2, num_kv_heads, head_dim]."""
        layers = []
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            assert isinstance(layer, DecoderLayer)
            layers.append(layer.attention.bind(kv_cache, self.cos_sin))
        self.own_attention_layers = layers

    def unbind_kv_cache(self) -> None:
        """See `Model`."""
        self.own_attention_layers = []

    def prepare(self, *, quantization: str | None = None) -> None:
        """Make a model whose weights are filled ready to run: compute tensors that no checkpoint
        holds, and give each projection its linear method.

        quantization: the format of the weights of the projections, the output projection included;
            a key of `LINEAR_METHODS`.
        """
        config = self.config
        rope = (config.rope, config.head_dim, config.max_position_embeddings, self.dtype)
        self.cos_sin.copy_(cos_sin_table(*rope))
        for module in self.modules():
            if isinstance(module, Projection):
                module.prepare(quantization=quantization)
        if self.lm_head is None:
            # Tied embeddings are stored a second time, because a gather needs plain rows.
            self.head = LINEAR_METHODS[quantization](self.embed.weight, None)
        else:
            self.head = self.lm_head.method

    def stored_tensors(self) -> list[Tensor]:
        """See `Model`."""
        return tensors_of(self, self.head)

    def destinations(self) -> Iterator[Destination]:
        """Yield every checkpoint name and the view that it fills; together they fill every
        parameter once."""
        yield from _below("model.embed_tokens", self.embed.destinations())
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from _below(f"model.layers.{index}", layer.destinations())
        yield from _below("model.norm", self.norm.destinations())
        if self.lm_head is not None:
            yield from self.lm_head.destinations()


def _below(prefix: str, destinations: Iterator[Destination]) -> Iterator[Destination]:
    for name, tensor in destinations:
        yield f"{prefix}.{name}", tensor

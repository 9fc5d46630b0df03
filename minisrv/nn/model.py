"""The interface between a model and those who run it: the runner, certification and the engine.

Knows: how a model is made ready and run. Knows nothing of whose code computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minisrv.compile.decorator import Compilable
from minisrv.kernels.linear import LinearMethod
from minisrv.model_config import ModelConfig


class Model(Compilable, Protocol):
    """A decoder with its weights. `prepare`, `allocate_buffers` and `bind_kv_cache` make it ready
    to run, in this order; the last two are called again for another cache.

    bytes_read: the number of bytes of weights that a decode step reads at least: all weights except
        an embedding that is not the output projection too, and those of the experts of a mixture
        that a single token leaves out.
    qkv: [max_num_tokens, qkv_size], the argument of the attention op, shared by all layers.
    attn_out: [max_num_tokens, q_size], the result of the attention op, shared by all layers.
    """

    config: ModelConfig
    dtype: torch.dtype
    bytes_read: int
    qkv: Tensor
    attn_out: Tensor

    @property
    def forward(self) -> Any:
        """Run the model as its code is written: see `__call__`."""

    @property
    def __call__(self) -> Any:
        """Run the model, or in its place what it was compiled to: input_ids [T] int64 and positions
        [T] int64 give out [T, hidden], after the final norm.

        It runs within a forward context, whose attention metadata are those of these T tokens and
        whose layers are the model's `attention_layers`.
        """

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [R, vocab] of the hidden states [R, hidden], in the dtype of
        serving."""

    def prepare(self, *, quantization: str | None = None) -> None:
        """Make a model whose weights are filled ready to run: compute tensors that no checkpoint
        holds, and give each projection its linear method.

        quantization: the format of the weights of the projections, the output projection included;
            a key of `LINEAR_METHODS`.
        """

    def stored_tensors(self) -> list[Tensor]:
        """Return all tensors that a model keeps which is prepared and has no buffers yet. Their
        order, shapes and layouts are the same whenever such a model is made."""

    def allocate_buffers(self, max_num_tokens: int) -> None:
        """Allocate the static buffers for steps of at most so many tokens."""

    def bind_kv_cache(self, kv_caches: Sequence[Tensor]) -> None:
        """Give each layer its KV cache, [num_blocks, block_size, 2, num_kv_heads, head_dim]."""

    def unbind_kv_cache(self) -> None:
        """Forget the KV cache, so that its memory is free once no runner has it."""


def tensors_of(model: nn.Module, *methods: LinearMethod) -> list[Tensor]:
    """Return the parameters and the buffers of a model, and what the linear methods of its modules
    store, each once.

    methods: linear methods that belong to no module.
    """
    found = [*model.parameters(), *model.buffers()]
    of_modules = (getattr(module, "method", None) for module in model.modules())
    for method in (*of_modules, *methods):
        if isinstance(method, LinearMethod):
            found += method.tensors
    return list({id(tensor): tensor for tensor in found}.values())

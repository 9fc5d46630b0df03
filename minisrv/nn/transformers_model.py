"""A decoder that transformers' own model code computes, with the server's attention.

The code of transformers is left as it is. Its attention is the attention op, whose queries and keys
are rotated already; its linear layers multiply by linear methods; and its output projection, with
all that a model does to logits, is its own code as well, run on the hidden states of the rows that
sample. It gets T tokens of all requests in one row, their positions, and neither a mask nor a
cache.

Knows: transformers' modules and the interface of their attention. Knows nothing of architectures,
requests, batches or graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from minisrv.checkpoint.transformers_decoder import LINEARS, AttentionCall, MetaDecoder
from minisrv.compile.decorator import Compiled, support_torch_compile
from minisrv.graph.attention import attention_op
from minisrv.kernels import AttentionLayer
from minisrv.kernels.linear import LinearMethod, methods_of_one_input
from minisrv.model_config import ModelConfig
from minisrv.nn.model import tensors_of

PAGED = "minisrv"
"""The name under which the attention op is registered with transformers."""


class PagedAttention:
    """The attention op of one layer, as transformers' module of that layer calls it.

    step: the tensors of the step that runs, shared by all layers.
    index: the index of the layer in the model.
    """

    def __init__(self, step: StepTensors, index: int) -> None:
        self.step = step
        self.index = index

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention [1, T, num_heads, head_dim] of query [1, num_heads, T, head_dim]
        over the cache, to which key and value [1, num_kv_heads, T, head_dim] are added. The result
        is overwritten by the next layer."""
        step = self.step
        heads = step.qkv.view(query.shape[2], -1, query.shape[3])
        begin = 0
        for part in (query, key, value):
            heads[:, begin : begin + part.shape[1]].copy_(part[0].transpose(0, 1))
            begin += part.shape[1]
        attention_op(step.qkv, step.positions, step.out, self.index)
        return step.out.view(1, query.shape[2], query.shape[1], query.shape[3])


class StepTensors(threading.local):
    """The arguments of the attention op in the step that runs: views of static buffers. Each thread
    has its own, because a step of another one may run between two layers (`minisrv.turns`).

    qkv, out: [T, qkv_size] and [T, q_size].
    positions: [T] int64.
    """

    qkv: Tensor
    positions: Tensor
    out: Tensor


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention, as transformers calls it, by the `PagedAttention` of the module. What is
    else passed is the same at every call, and part of the layer's `AttentionLayer`."""
    attention: PagedAttention = module.paged_attention  # type: ignore[assignment]
    return attention(query, key, value), None


# No function for masks is registered under the name: transformers would make masks, and read values
# back to do so, which a graph cannot hold.
ALL_ATTENTION_FUNCTIONS.register(PAGED, paged_attention)


class Linear(nn.Module):
    """A linear layer of transformers, multiplied by a linear method."""

    def __init__(self, method: LinearMethod, out_features: int) -> None:
        super().__init__()
        self.method = method
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection [..., out] of x [..., in]."""
        product = self.method.apply(x.reshape(-1, x.shape[-1]))
        return product.view(*x.shape[:-1], self.out_features)


class GivenHidden(nn.Module):
    """Takes the place of the backbone where only the output projection is to be computed.

    output_class: the class of the backbone's result.
    """

    def __init__(self, output_class: type[Any]) -> None:
        super().__init__()
        self.output_class = output_class

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        """Return `inputs_embeds` as the hidden states that a backbone would return."""
        return self.output_class(last_hidden_state=inputs_embeds)


@support_torch_compile(dynamic_dims={"input_ids": 0, "positions": 0, "out": 0})
class TransformersModel(nn.Module):
    """A decoder of transformers as a `minisrv.nn.model.Model`. Its parameters are on the meta
    device; `nn.transformers_loader` fills them."""

    dynamic_dims: ClassVar[Mapping[str, int]]
    compiled: Compiled | None
    attention_layers: Sequence[AttentionLayer]
    qkv: Tensor
    attn_out: Tensor

    def __init__(self, config: ModelConfig, decoder: MetaDecoder, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.causal_lm = decoder.model
        self.causal_lm.config._attn_implementation = PAGED
        self.calls: Sequence[AttentionCall] = decoder.calls
        self.decoder = decoder
        self.step = StepTensors()
        for index, call in enumerate(self.calls):
            call.module.paged_attention = PagedAttention(self.step, index)  # type: ignore[assignment]
        self.backbone: nn.Module
        self.bytes_read: int
        self.register_buffer("qkv", None, persistent=False)
        self.register_buffer("attn_out", None, persistent=False)
        self.own_attention_layers: Sequence[AttentionLayer] = []

    def forward(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        """See `Model`."""
        tokens, step = len(input_ids), self.step
        step.qkv, step.out = self.qkv[:tokens], self.attn_out[:tokens]
        step.positions = positions
        output = self.backbone(input_ids[None], position_ids=positions[None], use_cache=False)
        out.copy_(output.last_hidden_state[0])

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """See `Model`."""
        logits: Tensor = self.causal_lm(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.to(self.dtype)

    def prepare(self, *, quantization: str | None = None) -> None:
        """See `Model`."""
        model = self.causal_lm
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self.bytes_read = sum(parameter.nbytes for parameter in model.parameters())
        if head.weight is not embedding.weight:
            self.bytes_read -= embedding.weight.nbytes
        self.bytes_read -= sum(call.unused(_nbytes) for call in self.decoder.experts)
        self._compute_rotations()
        for names in self.decoder.siblings:
            linears = _linears(list(map(model.get_submodule, names)), quantization)
            for name, linear in zip(names, linears, strict=True):
                model.set_submodule(name, linear)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) in LINEARS:
                    setattr(module, name, *_linears([child], quantization))
        # The output projection is computed by a model without its backbone.
        self.backbone = model.get_submodule(self.decoder.backbone)
        model.set_submodule(self.decoder.backbone, GivenHidden(self.decoder.output_class))

    def stored_tensors(self) -> list[Tensor]:
        """See `Model`."""
        return tensors_of(self)

    def _compute_rotations(self) -> None:
        """Give every text the rotary frequencies that transformers uses for one as long as the
        context, where they depend on the length: keys in the KV cache cannot be rotated again when
        a text grows."""
        for rotation in self.decoder.rotations:
            module, layer_type = rotation.module, rotation.layer_type
            prefix = "" if layer_type is None else f"{layer_type}_"
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rotation.kind](
                module.config,
                None,
                seq_len=self.config.max_position_embeddings,
                layer_type=layer_type,
            )
            getattr(module, f"{prefix}inv_freq").copy_(frequencies)
            setattr(module, f"{prefix}attention_scaling", scaling)

    def _window(self, call: AttentionCall) -> int | None:
        """Return the sliding window of a layer, None where no text is longer than it."""
        assert call.mask is not None, "checked with the config"
        window = call.mask.sliding_window
        return None if (window or 0) >= self.config.max_position_embeddings else window

    def allocate_buffers(self, max_num_tokens: int) -> None:
        """See `Model`."""
        config = self.config
        device = next(self.parameters()).device
        self.qkv = torch.zeros(max_num_tokens, config.qkv_size, dtype=self.dtype, device=device)
        self.attn_out = torch.zeros(max_num_tokens, config.q_size, dtype=self.dtype, device=device)

    def unbind_kv_cache(self) -> None:
        """See `Model`."""
        self.own_attention_layers = []

    def bind_kv_cache(self, kv_caches: Sequence[Tensor]) -> None:
        """See `Model`."""
        self.own_attention_layers = [
            AttentionLayer(
                num_heads=call.num_heads,
                num_kv_heads=call.num_kv_heads,
                head_dim=call.head_dim,
                scale=call.scale,
                q_norm=None,
                k_norm=None,
                eps=0.0,
                cos_sin=None,
                kv_cache=kv_cache,
                sliding_window=self._window(call),
                logit_soft_cap=call.logit_soft_cap,
                sinks=None if call.sinks is None else getattr(call.module, call.sinks).detach(),
            )
            for call, kv_cache in zip(self.calls, kv_caches, strict=True)
        ]


def _nbytes(weight: Tensor) -> int:
    return weight.nbytes


def _linears(modules: Sequence[Any], quantization: str | None) -> list[Linear]:
    """Return the same linear layers of transformers, which get the same input, multiplied by linear
    methods."""
    weights, biases = [], []
    for module in modules:
        weight = module.weight.detach()
        # Conv1D stores [in, out].
        weights.append(weight.t().contiguous() if isinstance(module, Conv1D) else weight)
        biases.append(None if module.bias is None else module.bias.detach())
    methods = methods_of_one_input(weights, biases, quantization)
    return [Linear(method, len(weight)) for method, weight in zip(methods, weights, strict=True)]

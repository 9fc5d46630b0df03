"""Decoders in transformers' own model code: how one is made without weights, and what its layers
ask of attention.

A decoder is made on torch's meta device, where tensors have shapes and no memory, and a step is run
there. A function registered with transformers takes the place of attention and records its
arguments, so that one way finds the heads, scale and window of each layer whatever the architecture
calls these settings. A decoder whose attention, positions or heads are not those that the attention
op computes is refused by name.

Knows: transformers' model classes and the interface of their attention. Knows nothing of weights,
files or serving.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minisrv.errors import ConfigError, UnknownArchitectureError, shown
from minisrv.model_config import ARCHITECTURES, ModelConfig, architecture_of, positive

RECORDED = "minisrv-recorded"
"""The name of the attention function that records its arguments."""

_NEUTRAL: dict[str, Any] = {
    "use_bidirectional_attention": False,
    "attention_chunk_size": None,
    "output_router_logits": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
"""Settings that change what attention sees or what a model returns, with the values that change
nothing."""

_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks of attention.

    module: the module of the layer that calls attention.
    num_heads, num_kv_heads, head_dim: the shapes of queries and keys.
    v_head_dim: the number of elements of a value.
    scale: the factor of scores before the softmax.
    sliding_window: the number of tokens that a token sees, itself included; None for all.
    logit_soft_cap: the bound of scores by tanh; None for none.
    sinks: the name of the module's parameter with a logit for each head that takes part in the
        softmax only; None if there is none.
    is_causal: whether a token sees no later ones.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    sliding_window: int | None
    logit_soft_cap: float | None
    sinks: str | None
    is_causal: bool


@dataclass(frozen=True)
class MetaDecoder:
    """A decoder on the meta device.

    model: the decoder with its output projection.
    backbone: the name of the part of it that computes hidden states.
    calls: what each layer asks of attention, in the order of the calls.
    output_class: the class of the backbone's result.
    rotations: the modules whose rotary frequencies depend on the length of the text, with their
        `rope_type`. Here they compute frequencies no more (their `rope_type` is "default"), because
        that would read positions back.
    """

    model: PreTrainedModel
    backbone: str
    calls: list[AttentionCall]
    output_class: type[Any]
    rotations: list[tuple[nn.Module, str]]


_calls: ContextVar[list[AttentionCall]] = ContextVar("calls")


def record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Stand in for attention, as transformers calls it, and record the call.

    query: [1, num_heads, T, head_dim]; key, value: [1, num_kv_heads, T, ...].

    Returns an empty result [1, T, num_heads, v_head_dim], and no weights.
    """
    parameters = module.named_parameters(recurse=False)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _calls.get().append(
        AttentionCall(
            module=module,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            v_head_dim=value.shape[3],
            scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
            sliding_window=sliding_window,
            logit_soft_cap=softcap,
            sinks=None if s_aux is None else next(n for n, p in parameters if p is s_aux),
            is_causal=bool(causal) and attention_mask is None,
        )
    )
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]), None


# No function for masks is registered under the name: transformers would make masks, and read values
# back to do so.
ALL_ATTENTION_FUNCTIONS.register(RECORDED, record_attention)


def make_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> MetaDecoder:
    """Return the decoder of a configuration on the meta device. Raises whatever transformers
    raises for a configuration that its code cannot compute."""
    config = copy.deepcopy(config)
    for name in ("output_attentions", "output_hidden_states"):
        setattr(config, name, False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=RECORDED,
            # Others read back which experts a batch uses.
            experts_implementation="batched_mm",
        ).eval()
        ids = torch.zeros(1, 2, dtype=torch.int64)
    rotations = list(_fix_rotations(model))
    backbone = model.get_decoder()
    calls: list[AttentionCall] = []
    token = _calls.set(calls)
    try:
        with torch.no_grad():
            output = backbone(ids, position_ids=ids, use_cache=False)
    finally:
        _calls.reset(token)
    name = next(name for name, module in model.named_modules() if module is backbone)
    return MetaDecoder(model, name, calls, type(output), rotations)


def _fix_rotations(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Keep the modules whose rotary frequencies depend on the length of the text from computing
    them, and yield each with its `rope_type`."""
    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            module.rope_type = "default"
            yield module, kind


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise UnknownArchitectureError if transformers has no decoder of the configuration's
    architecture."""
    architecture = architecture_of({"architectures": config.architectures})
    decoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if architecture != decoder:
        raise UnknownArchitectureError(
            f"architecture {shown(architecture)} is not implemented; implemented are: "
            f"{', '.join(sorted(ARCHITECTURES))}, and by the code of transformers "
            f"{transformers.__version__} its decoders for causal language modelling (for "
            f"model_type={shown(config.model_type)}: {decoder})."
        )


def describe(config: PreTrainedConfig, decoder: MetaDecoder) -> ModelConfig:
    """Return the shape of a decoder. Raises ConfigError, by name, for what the attention op does
    not compute."""
    calls = decoder.calls
    _check_calls(config, calls)
    parameters = {id(p): p.numel() for p in decoder.model.parameters()}
    head = decoder.model.get_output_embeddings()
    tied = set(decoder.model.all_tied_weights_keys)
    untied = sum(p.numel() for n, p in decoder.model.named_parameters() if n not in tied)
    hidden = positive(_setting(config, "hidden_size"), "hidden_size")
    return ModelConfig(
        architecture=architecture_of({"architectures": config.architectures}),
        vocab_size=positive(_setting(config, "vocab_size"), "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_intermediate_size(config, hidden),
        num_layers=len(calls),
        num_heads=calls[0].num_heads,
        num_kv_heads=calls[0].num_kv_heads,
        head_dim=calls[0].head_dim,
        rms_norm_eps=0.0,
        max_position_embeddings=positive(
            _setting(config, "max_position_embeddings"), "max_position_embeddings"
        ),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        tie_word_embeddings=bool(tied) and head is not None,
        implementation="transformers",
        counted_parameters=min(untied, sum(parameters.values())),
    )


def _check_calls(config: PreTrainedConfig, calls: Sequence[AttentionCall]) -> None:
    name = architecture_of({"architectures": config.architectures})
    for setting, neutral in _NEUTRAL.items():
        if (value := getattr(config, setting, None)) is not None and value != neutral:
            raise ConfigError(
                f"config.json: {setting}={shown(value)} is not implemented for {name}; leave it "
                "out."
            )
    layers = getattr(config, "num_hidden_layers", None)
    if len(calls) != layers:
        raise ConfigError(
            f"{name} cannot be served: {len(calls)} of its {layers} layers call the attention that "
            "transformers lets a server replace, and all must. Recurrent layers, and attention of "
            "a form of its own, are not implemented."
        )
    kinds = getattr(config, "layer_types", None) or [None] * len(calls)
    window = getattr(config, "sliding_window", None)
    for index, (call, kind) in enumerate(zip(calls, kinds, strict=True)):
        where = f"layer {index} of {name}"
        if kind is not None and kind not in _LAYER_TYPES:
            raise ConfigError(
                f"{where} is of the kind {shown(kind)}; implemented are: {', '.join(_LAYER_TYPES)}."
            )
        if kind is not None and call.sliding_window != (
            window if kind == "sliding_attention" else None
        ):
            raise ConfigError(
                f"{where} is of the kind {shown(kind)}, and its code asks for a window of "
                f"{call.sliding_window} tokens: which of them holds cannot be known."
            )
        if not call.is_causal:
            raise ConfigError(f"{where} is not causal, or has a mask; only causal attention is.")
        if call.head_dim != call.v_head_dim:
            raise ConfigError(
                f"{where} has keys of {call.head_dim} and values of {call.v_head_dim} elements; "
                "implemented is attention in which both are the same."
            )
        if call.num_heads % call.num_kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads={call.num_heads} is not a multiple of "
                f"num_key_value_heads={call.num_kv_heads}."
            )
        same = replace(
            calls[0],
            module=call.module,
            scale=call.scale,
            sliding_window=call.sliding_window,
            logit_soft_cap=call.logit_soft_cap,
            sinks=call.sinks,
        )
        if call != same:
            raise ConfigError(
                f"{where} has other heads than layer 0; all layers must have the same."
            )


def _setting(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    """Return a setting by the name that transformers gives it in every architecture."""
    return {name: getattr(config, name, None)}


def _intermediate_size(config: PreTrainedConfig, hidden: int) -> int:
    """Return the width of the MLP, by which memory for activations is planned."""
    value = getattr(config, "intermediate_size", None)
    return value if isinstance(value, int) and value > 0 else 4 * hidden

"""Decoders in transformers' own model code: how one is made without weights, and what its layers
ask of attention.

A decoder is made on torch's meta device, where tensors have shapes and no memory, and a step is run
there. A function registered with transformers takes the place of attention and records its
arguments, so that one way finds the heads, scale and window of each layer whatever the architecture
calls these settings. Another one takes the place of masks, and finds which tokens a layer's mask
lets a token see. A decoder whose attention is not what the attention op computes is refused by
name.

Knows: transformers' model classes and the interface of their attention. Knows nothing of weights,
files or serving.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from minisrv.errors import ConfigError, UnknownArchitectureError, shown
from minisrv.model_config import (
    ARCHITECTURES,
    ModelConfig,
    RopeConfig,
    architecture_of,
    dtype_of,
    positive,
    rope_of,
)

RECORDED, RECORDED_MASKS = "minisrv-recorded", "minisrv-recorded-masks"
"""The names of the attention function that records its arguments: without masks, as a decoder is
served, and with masks. Under the second one the choice of experts is recorded too."""

EXPERTS = "batched_mm"
"""The form in which transformers computes experts that has kernels for every dtype and device;
others read back which experts a batch uses."""

LINEARS = (nn.Linear, Conv1D)
"""The classes of linear layers. What is derived from them does more."""

_NEUTRAL: dict[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
"""Settings that change what a model returns or reads, with the values that change nothing."""

_UNUSED = ("dropout", "is_causal", "position_ids", "sliding_window", "use_cache")
"""What layers pass to attention besides that is not needed: no token is dropped, and the mask says
which ones are seen."""

_FAR = 1 << 30
"""A position beyond any window."""


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks of attention.

    module: the module of the layer that calls attention.
    num_heads, num_kv_heads, head_dim: the shapes of queries and keys.
    v_head_dim: the number of elements of a value.
    scale: the factor of scores before the softmax.
    logit_soft_cap: the bound of scores by tanh; None for none.
    sinks: the name of the module's parameter with a logit for each head that takes part in the
        softmax only; None if there is none.
    mask: which tokens a token sees by the mask, if masks are recorded; None if there is none. The
        mask is what holds: some layers pass a window to attention besides that their mask has not,
        and some do not pass the one that their mask has.
    others: the names of what is passed besides, and is not implemented.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    logit_soft_cap: float | None
    sinks: str | None
    mask: Mask | None
    others: tuple[str, ...]


@dataclass(frozen=True)
class Mask:
    """Which tokens a mask lets a token see, itself included.

    is_causal: whether they are earlier ones, all of them or those in a window.
    sliding_window: their number; None for all.
    """

    is_causal: bool
    sliding_window: int | None = None


@dataclass(frozen=True)
class ExpertsCall:
    """What one layer asks of a mixture of experts.

    module: the module that holds the weights of all experts, [num_experts, ...] each.
    num_experts: the number of experts.
    num_experts_per_token: the number of experts that a token uses.
    """

    module: nn.Module
    num_experts: int
    num_experts_per_token: int

    def total(self, size: Callable[[Tensor], int]) -> int:
        """Return the sum of `size` over the experts' weights."""
        return sum(size(weight) for weight in self.module.parameters(recurse=False))

    def unused(self, size: Callable[[Tensor], int]) -> int:
        """Return the part of `total` that one token does not use."""
        weights = self.total(size)
        return weights - weights * self.num_experts_per_token // self.num_experts


@dataclass(frozen=True)
class Rotation:
    """Rotary frequencies that depend on the length of the text.

    module: the module that has them.
    kind: their `rope_type`.
    layer_type: the kind of layers that they are for; None for all.
    """

    module: Any
    kind: str
    layer_type: str | None


@dataclass
class Recording:
    """The calls of a step that are recorded, each kind in its order.

    linears: the linear layers, each once, with the input of its first call.
    """

    attention: list[AttentionCall] = field(default_factory=list)
    experts: list[ExpertsCall] = field(default_factory=list)
    linears: dict[nn.Module, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MetaDecoder:
    """A decoder on the meta device.

    model: the decoder with its output projection.
    backbone: the name of the part of it that computes hidden states.
    calls: what each layer asks of attention, with its mask, in the order of the calls.
    experts: what each layer that has experts asks of them.
    hidden_size: the width of the hidden states that it returns.
    output_class: the class of its result.
    rotations: the rotary frequencies that depend on the length of the text. Their modules compute
        them no more (the `rope_type` there is "default"): that would read positions back, and take
        those of a whole batch for one text.
    siblings: the names in the model of linear layers that get the same input, in the order of
        their calls; in each group all have a bias, or none.
    """

    model: PreTrainedModel
    backbone: str
    calls: list[AttentionCall]
    experts: list[ExpertsCall]
    hidden_size: int
    output_class: type[Any]
    rotations: list[Rotation]
    siblings: list[list[str]]


_recording: ContextVar[Recording] = ContextVar("recording")


def record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Stand in for attention, as transformers calls it, and record the call.

    query: [1, num_heads, T, head_dim]; key, value: [1, num_kv_heads, T, ...].

    Returns an empty result [1, T, num_heads, v_head_dim], and no weights.
    """
    parameters = module.named_parameters(recurse=False)
    _recording.get().attention.append(
        AttentionCall(
            module=module,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            v_head_dim=value.shape[3],
            scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
            logit_soft_cap=softcap,
            sinks=None if s_aux is None else next(n for n, p in parameters if p is s_aux),
            mask=getattr(attention_mask, "minisrv_mask", None),
            others=tuple(n for n, v in others.items() if v is not None and n not in _UNUSED),
        )
    )
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]), None


def record_experts(
    module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the experts of tokens, as transformers calls it, and record the call.

    hidden: [T, hidden].
    top_k_index, top_k_weights: [T, num_experts_per_token], the experts of each token.
    """
    call = ExpertsCall(module, module.num_experts, top_k_index.shape[-1])
    _recording.get().experts.append(call)
    result: Tensor = ALL_EXPERTS_FUNCTIONS[EXPERTS](module, hidden, top_k_index, top_k_weights)
    return result


def record_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    **others: Any,
) -> Tensor:
    """Stand in for the making of a mask, as transformers calls it.

    mask_function: tells whether a token sees another, by batch, head and their two positions.
    local_size: the window, where transformers names it.

    Returns a mask [1, 1, q_length, kv_length] without values, which carries the `Mask`.
    """
    # Places around those where masks change, for one that has a window and for one that has not.
    window = local_size or 1
    near = [0, 1, 2, window - 1, window, window + 1, 2 * window + 1]
    mask = Mask(is_causal=False)
    # Places have values even where a tracer makes tensors without. The error is raised by a mask
    # that depends on data, which has none here.
    with _disable_current_modes(), torch.device("cpu"), suppress(RuntimeError):
        places = torch.tensor(sorted({*near, *(_FAR + place for place in near)}))
        zero, q, k = torch.zeros((), dtype=torch.int64), places[:, None], places[None]
        sees = mask_function(zero, zero, q, k)
        for candidate in (None, local_size):
            behind = q - (2 * _FAR if candidate is None else candidate)
            if torch.equal(sees, (behind < k) & (k <= q)):
                mask = Mask(True, candidate)
    result = torch.empty(1, 1, q_length, kv_length, device="meta")
    result.minisrv_mask = mask  # type: ignore[attr-defined]
    return result


# No function for masks is registered under the first name: transformers would make masks, and read
# values back to do so.
ALL_ATTENTION_FUNCTIONS.register(RECORDED, record_attention)
ALL_ATTENTION_FUNCTIONS.register(RECORDED_MASKS, record_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(RECORDED_MASKS, record_mask)
ALL_EXPERTS_FUNCTIONS.register(RECORDED_MASKS, record_experts)


def make_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> MetaDecoder:
    """Return the decoder of a configuration on the meta device.

    Raises ConfigError for a model of recurrent layers, and whatever transformers raises for a
    configuration that its code cannot compute.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=RECORDED_MASKS,
            experts_implementation=EXPERTS,
        ).eval()
        ids = torch.zeros(1, 2, dtype=torch.int64)
        visible = torch.ones(1, 2, dtype=torch.bool)
    _check_state(_name(config), model)
    rotations = list(_fix_rotations(model))
    backbone = model.get_decoder()
    # transformers looks at the positions for masks of its own, unless it gets one.
    model.config._experts_implementation = RECORDED_MASKS
    recorded, output = _recorded(backbone, ids, attention_mask=visible)
    model.config._experts_implementation = EXPERTS
    name = next(name for name, module in model.named_modules() if module is backbone)
    hidden_size = output.last_hidden_state.shape[-1]
    return MetaDecoder(
        model,
        name,
        recorded.attention,
        recorded.experts,
        hidden_size,
        type(output),
        rotations,
        _siblings(model, recorded),
    )


def _siblings(model: nn.Module, recorded: Recording) -> list[list[str]]:
    """Return the names of the linear layers that are recorded with the same input."""
    names = {module: name for name, module in model.named_modules()}
    groups: dict[tuple[int, bool], list[str]] = {}
    for module, x in recorded.linears.items():
        groups.setdefault((id(x), module.bias is not None), []).append(names[module])
    return [group for group in groups.values() if len(group) > 1]


def try_as_served(decoder: MetaDecoder) -> None:
    """Run a step without masks, as an engine does. Raises whatever the code of the model raises if
    it looks at data."""
    decoder.model.config._attn_implementation = RECORDED
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    recorded, _ = _recorded(decoder.model.get_submodule(decoder.backbone), ids)
    assert len(recorded.attention) == len(decoder.calls), "a mask changes no layers"


def _recorded(backbone: nn.Module, ids: Tensor, **arguments: Any) -> tuple[Recording, Any]:
    """Return what is recorded of a step, and the backbone's result."""
    recording = Recording()

    def record_linear(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        recording.linears.setdefault(module, arguments[0])

    hooks = [
        module.register_forward_pre_hook(record_linear)
        for module in backbone.modules()
        if type(module) in LINEARS
    ]
    token = _recording.set(recording)
    try:
        with torch.no_grad():
            output = backbone(ids, position_ids=ids, use_cache=False, **arguments)
    finally:
        _recording.reset(token)
        for hook in hooks:
            hook.remove()
    return recording, output


def _fix_rotations(model: nn.Module) -> Iterator[Rotation]:
    """Keep modules from computing rotary frequencies that depend on the length of the text, and
    yield these."""
    module: Any
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            if layer_type is None:
                module.rope_type = "default"
            else:
                kinds[layer_type] = "default"
            yield Rotation(module, kind, layer_type)


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise UnknownArchitectureError if transformers has no decoder of the configuration's
    architecture."""
    architecture = _name(config)
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
    name = _name(config)
    _check_settings(name, config)
    _check_calls(name, config, decoder.calls)
    if any(call.num_experts_per_token < 1 for call in decoder.experts):
        raise ConfigError(
            f"{name} has layers in which a token uses no expert; it must use one at least (the "
            "number of experts, and of those that a token uses, in config.json)."
        )
    model, layer = decoder.model, decoder.calls[0]
    head: Any = model.get_output_embeddings()
    tied = model.all_tied_weights_keys.keys()
    sizes: dict[str, Any] = {
        "vocab_size": head.weight.shape[0],
        "hidden_size": decoder.hidden_size,
        "intermediate_size": _intermediate_size(config, decoder.hidden_size),
        "num_layers": len(decoder.calls),
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
    }
    for size in sizes:
        positive(sizes, size)
    rope = RopeConfig()
    with suppress(ConfigError):  # raised for scaling that does not reach beyond the sizes above
        rope = rope_of(config.to_dict())
    return ModelConfig(
        architecture=name,
        **sizes,
        rms_norm_eps=0.0,
        rope=rope,
        dtype=dtype_of({"dtype": config.dtype}),
        tie_word_embeddings=bool(tied),
        implementation="transformers",
        counted_parameters=sum(p.numel() for n, p in model.named_parameters() if n not in tied),
        expert_parameters=sum(call.total(Tensor.numel) for call in decoder.experts),
        unused_parameters=sum(call.unused(Tensor.numel) for call in decoder.experts),
    )


def _check_settings(name: str, config: PreTrainedConfig) -> None:
    for setting, neutral in _NEUTRAL.items():
        if (value := getattr(config, setting, None)) is not None and value != neutral:
            raise ConfigError(
                f"config.json: {setting}={shown(value)} is not implemented for {name}; leave it "
                "out."
            )


def _check_state(name: str, model: PreTrainedModel) -> None:
    """Refuse a model in which a token learns of earlier ones by other means than attention."""
    stateful = any(getattr(module, "_is_stateful", False) for module in model.modules())
    if stateful or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise ConfigError(
            f"{name} cannot be served: it has recurrent layers or convolutions, whose state is not "
            "in the KV cache; decoders whose layers are attention and MLP can."
        )


def _check_calls(name: str, config: PreTrainedConfig, calls: Sequence[AttentionCall]) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if not calls or len(calls) != layers:
        raise ConfigError(
            f"{name} cannot be served: {len(calls)} of its {layers} layers call the attention that "
            "transformers lets a server replace, and all must, once each."
        )
    for index, call in enumerate(calls):
        where = f"layer {index} of {name}"
        if call.mask is None or not call.mask.is_causal:
            raise ConfigError(
                f"{where} has a mask that is not implemented; implemented are causal attention to "
                "all tokens, and to those in a sliding window."
            )
        if call.head_dim != call.v_head_dim:
            raise ConfigError(
                f"{where} has keys of {call.head_dim} and values of {call.v_head_dim} elements; "
                "implemented is attention in which both are the same."
            )
        window, cap = call.mask.sliding_window, call.logit_soft_cap
        if window is not None and window < 1:
            raise ConfigError(
                f"{where} has a sliding window of {window} tokens, in which a token does not see "
                "even itself; sliding_window in config.json must be 1 at least, or null for none."
            )
        if not math.isfinite(call.scale):
            raise ConfigError(f"{where} scales scores by {call.scale}, which is no finite number.")
        if cap is not None and not 0 < cap < math.inf:
            raise ConfigError(f"{where} has a soft cap of {shown(cap)}, and it must be positive.")
        if call.num_kv_heads < 1 or call.num_heads % call.num_kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads={call.num_heads} is not a multiple of "
                f"num_key_value_heads={call.num_kv_heads}."
            )
        same = replace(
            calls[0],
            module=call.module,
            scale=call.scale,
            logit_soft_cap=call.logit_soft_cap,
            sinks=call.sinks,
            mask=call.mask,
        )
        if call != same:
            raise ConfigError(
                f"{where} has other heads than layer 0; all layers must have the same."
            )


def _name(config: PreTrainedConfig) -> str:
    return architecture_of({"architectures": config.architectures})


def _intermediate_size(config: PreTrainedConfig, hidden: int) -> int:
    """Return the width of the MLP, by which memory for activations is planned."""
    value = getattr(config, "intermediate_size", None)
    return value if isinstance(value, int) and value > 0 else 4 * hidden

"""The shape of a decoder, as plain data.

Knows: the architectures that are implemented, and which settings of theirs are. Reads a
configuration as transformers resolves it, with every default filled in, never a raw config.json.
Knows nothing of torch, files or serving.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from minisrv.errors import ConfigError, UnknownArchitectureError, shown


class RopeScaling(enum.StrEnum):
    """How rotary frequencies are stretched; names as in a checkpoint's `rope_type`."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; names as in a checkpoint. Fields behind `factor` matter for some
    scalings only.

    factor: how many times longer the context becomes.
    low_freq_factor, high_freq_factor: llama3's.
    beta_fast, beta_slow, truncate, attention_factor: YaRN's; the last one scales cosines and sines.
    original_max_position_embeddings: the context that the model was trained with before.
    """

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling.DEFAULT
    factor: float = 1.0
    original_max_position_embeddings: float = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    The booleans are what tells the supported architectures apart; the decoder in `nn` is
    defined once and reads them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    dtype: str
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def q_size(self) -> int:
        """Width of the query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key heads together; the value heads have the same."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the packed q, k, v that the attention op takes."""
        return self.q_size + 2 * self.kv_size

    @property
    def num_parameters(self) -> int:
        """Of the weights that a checkpoint holds, biases and norms left out: they are too small to
        matter where memory is planned."""
        attention = self.hidden_size * (self.qkv_size + self.q_size)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + embeddings * self.vocab_size * self.hidden_size

    @property
    def default_context(self) -> int:
        """The tokens that a request may have unless a setting says otherwise.

        YaRN reaches `factor` times its original context, as its checkpoints often leave
        max_position_embeddings as it was before (vLLM's reading too).
        """
        rope = self.rope
        if rope.scaling is RopeScaling.YARN:
            return self._reached(rope.original_max_position_embeddings)
        return self.max_position_embeddings

    @property
    def longest_context(self) -> int:
        """The tokens that a request may have if a setting asks for as many. Dynamic scaling
        stretches its frequencies for what is asked for, up to `factor` times."""
        if self.rope.scaling is RopeScaling.DYNAMIC:
            return self._reached(self.max_position_embeddings)
        return self.default_context

    def _reached(self, context: float) -> int:
        """`factor` times a context, and never less than the model has without."""
        stretched = int(min(self.rope.factor * context, _MAX_INTEGER))
        return max(self.max_position_embeddings, stretched)

    def for_context(self, context: int) -> ModelConfig:
        """The same model with positions for `context` tokens, `longest_context` at most.

        Dynamic scaling (NTK-aware) takes the frequencies that transformers takes for a text of that
        length, for all texts: keys in a cache cannot be turned again when a text grows.
        """
        assert 0 < context <= self.longest_context, "checked where it was asked for"
        rope, stretch = self.rope, context / self.max_position_embeddings
        if rope.scaling is RopeScaling.DYNAMIC:
            grown = rope.factor * max(stretch, 1.0) - (rope.factor - 1)
            theta = rope.theta * grown ** (self.head_dim / (self.head_dim - 2))
            rope = replace(rope, scaling=RopeScaling.DEFAULT, theta=theta)
        return replace(self, max_position_embeddings=context, rope=rope)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a configuration of transformers (`to_dict()`).

        Raises UnknownArchitectureError, ConfigError (a setting that would change the
        computation and is not implemented).
        """
        check_implemented(config)
        architecture = _architecture(config)
        llama, qwen2, qwen3 = (
            architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3")
        )
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        kv_heads = _positive(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
            )
        head_dim = _positive(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ConfigError(
                f"heads of head_dim={head_dim} elements cannot be turned by RoPE, which takes them "
                "in pairs: head_dim, or hidden_size / num_attention_heads, must be even."
            )
        rope = _rope(config)
        if rope.scaling is RopeScaling.DYNAMIC and head_dim == 2:
            raise ConfigError("heads of head_dim=2 elements leave dynamic RoPE nothing to scale.")
        eps = config.get("rms_norm_eps")
        if not _is_number(eps) or eps < 0:
            raise ConfigError(
                f"config.json: rms_norm_eps={shown(eps)} must be a number, 0 at least."
            )
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(eps),
            max_position_embeddings=_positive(config, "max_position_embeddings"),
            dtype=str(config.get("dtype") or "float32").removeprefix("torch."),
            rope=rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or bias,
            output_bias=bias and not qwen2,
            mlp_bias=llama and bool(config.get("mlp_bias", False)),
            qk_norm=qwen3,
        )


ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Those that are implemented, and the `model_type` that transformers has for each."""


_OF_ANY_MODEL = {"is_causal": True, "per_layer_config": {}, "transformers_weights": None}
"""Settings that transformers takes for any architecture, at the values that change nothing."""

_MAX_NUMBER = 1e18
"""No other setting is larger; what is computed of several stays a number."""

_LISTED = {"num_hidden_layers": 10_000, "num_labels": 100_000}
"""Numbers of which transformers makes lists when it reads them, or we make modules, and what is too
many."""

_MAX_INTEGER = 2**31 - 1
"""No dimension of a model is larger; what counts bytes by it fits 64 bits."""


def check_implemented(config: Mapping[str, Any]) -> None:
    """Refuse what no default could change, be `config` raw or resolved.

    Raises UnknownArchitectureError, ConfigError.
    """
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"architecture {shown(architecture)} is not implemented; "
            f"implemented are: {', '.join(sorted(ARCHITECTURES))}."
        )
    kind = config.get("model_type")
    if kind != ARCHITECTURES[architecture]:
        raise ConfigError(
            f"config.json: model_type={shown(kind)} does not go with architecture {architecture}, "
            f"whose model_type is {ARCHITECTURES[architecture]!r}."
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act={shown(config['hidden_act'])} is not implemented; silu is.")
    if config.get("quantization_config"):
        raise ConfigError("quantized checkpoints are not implemented; load the original one.")
    for name, most in _LISTED.items():
        if isinstance(value := config.get(name), int) and value > most:
            raise ConfigError(f"config.json: {name}={shown(value)} must be {most} at most.")
    for name, neutral in _OF_ANY_MODEL.items():
        if (value := config.get(name)) is not None and value != neutral:
            raise ConfigError(
                f"config.json: {name}={shown(value)} is not implemented; leave it out."
            )
    kinds = config.get("layer_types") or ()
    if not isinstance(kinds, list | tuple):
        raise ConfigError(f"config.json: layer_types={shown(kinds)} must be a list.")
    sliding = [kind for kind in kinds if kind != "full_attention"]
    if sliding:
        raise ConfigError(
            f"layers of the kind {shown(sliding[0])} are not implemented; only full attention is "
            "(use_sliding_window and layer_types in config.json)."
        )


def _architecture(config: Mapping[str, Any]) -> str:
    """The first that is named; some write it without a list."""
    names = config.get("architectures") or [None]
    name = names[0] if isinstance(names, list | tuple) else names
    return name if isinstance(name, str) else shown(name)


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A null counts as absent."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_INTEGER:
        raise ConfigError(
            f"config.json: {key}={shown(value)} must be a positive integer, {_MAX_INTEGER} at most."
        )
    return value


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is one to compute with: JSON may spell NaN, Infinity, and integers of any size."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER
    )


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    settings: Mapping[str, Any] = config.get("rope_parameters") or {}
    kinds = config.get("layer_types") or ()
    nested = [key for key, value in settings.items() if isinstance(value, dict) or key in kinds]
    if nested:
        # All layers are of one kind, and nothing says which of two ways of settings would win.
        told = settings.get("full_attention")
        if not kinds or not isinstance(told, dict) or len(nested) < len(settings):
            raise ConfigError(
                f"config.json: RoPE settings for {', '.join(sorted(nested))} do not go with this "
                "model's layers; give one set of rope_parameters."
            )
        settings = told
    kind = settings.get("rope_type", "default")
    if kind not in tuple(RopeScaling):
        raise ConfigError(
            f"rope_type={shown(kind)} is not implemented; "
            f"implemented are: {', '.join(RopeScaling)}."
        )
    scaling = RopeScaling(kind)
    if (settings.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1.0 is not implemented.")

    def number(name: str, default: float | None = None) -> float:
        """A null counts as absent."""
        value = settings.get(name)
        value = default if value is None else value
        if value is None or not _is_number(value) or value <= 0:
            raise ConfigError(
                f"config.json: {name}={shown(value)} must be a positive number for "
                f"rope_type={kind}."
            )
        return float(value)

    longest = _positive(config, "max_position_embeddings")
    original = number("original_max_position_embeddings", longest)
    rope = RopeConfig(
        theta=number("rope_theta", 10000.0),
        scaling=scaling,
        original_max_position_embeddings=original,
    )
    match scaling:
        case RopeScaling.DEFAULT:
            return rope
        case RopeScaling.LINEAR | RopeScaling.DYNAMIC:
            return replace(rope, factor=number("factor"))
        case RopeScaling.LLAMA3:
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if low >= high:
                raise ConfigError(
                    f"config.json: low_freq_factor={low} must be below high_freq_factor={high}."
                )
            return replace(
                rope, factor=number("factor"), low_freq_factor=low, high_freq_factor=high
            )
        case RopeScaling.YARN:
            if rope.theta == 1.0:
                raise ConfigError("config.json: rope_theta=1.0 leaves YaRN nothing to scale.")
            factor = number("factor", longest / original)
            # As transformers reads them, 0 counts as absent.
            weights = [number(name, 1.0) for name in _MSCALES if settings.get(name)]
            return replace(
                rope,
                factor=factor,
                beta_fast=number("beta_fast", rope.beta_fast),
                beta_slow=number("beta_slow", rope.beta_slow),
                truncate=bool(settings.get("truncate", True)),
                attention_factor=number(
                    "attention_factor", _yarn_attention_factor(factor, weights)
                ),
            )


_MSCALES = ("mscale", "mscale_all_dim")


def _yarn_attention_factor(factor: float, mscales: Sequence[float]) -> float:
    """What YaRN scales cosines and sines by where a checkpoint does not say (the paper's section
    3.4; the quotient, where it gives both weights, is DeepSeek's)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if len(mscales) == len(_MSCALES):
        return scale(mscales[0]) / scale(mscales[1])
    return scale(1.0)

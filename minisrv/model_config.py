"""The shape of a decoder model, as plain data.

It is made from a configuration as transformers resolves it, with every default filled in, and never
from a raw config.json.

Knows: the architectures that are implemented here, which of their settings are, and whose code
computes a model. Knows nothing of torch, files or serving.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from minisrv.errors import (
    ConfigError,
    UnknownArchitectureError,
    UnsupportedSettingError,
    shown,
)


class RopeScaling(enum.StrEnum):
    """The ways to scale the frequencies of rotary embeddings; the values are those of `rope_type`
    in a checkpoint."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True)
class RopeConfig:
    """Settings of the rotary position embedding (RoPE), named as in a checkpoint. Those below
    `factor` are used by some kinds of scaling only.

    theta: the base of the frequencies (`rope_theta`).
    factor: how many times longer scaling makes the context.
    original_max_position_embeddings: the context in tokens with which the model was trained before
        scaling.
    low_freq_factor, high_freq_factor: settings of the llama3 scaling.
    beta_fast, beta_slow, truncate, attention_factor: settings of YaRN; the last one multiplies
        cosines and sines.
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
    """The shape of a decoder model.

    The boolean fields are all in which the architectures that are implemented here differ; the
    decoder in `nn` is defined once and reads them.

    implementation: whose code computes the model, one of `IMPLEMENTATIONS`. For "transformers" the
        shape describes what memory is planned by and what the attention op takes. `rms_norm_eps`
        and the boolean fields are then unused, except `tie_word_embeddings`, and `rope` says only
        how long a context may be.
    counted_parameters: the exact number of parameters, where transformers has counted them.
    expert_parameters: how many of them are those of the experts of a mixture.
    unused_parameters: how many of these a token leaves out: those of experts that are not its own.

    Raises ConfigError for heads that no attention kernel takes.
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
    implementation: str = "minisrv"
    counted_parameters: int | None = None
    expert_parameters: int = 0
    unused_parameters: int = 0

    def __post_init__(self) -> None:
        if self.head_dim > MAX_HEAD_DIM:
            raise ConfigError(
                f"heads of head_dim={self.head_dim} elements are not implemented; {MAX_HEAD_DIM} "
                "is the most (head_dim in config.json, or hidden_size / num_attention_heads)."
            )

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, which is also that of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the packed q, k and v that the attention op takes."""
        return self.q_size + 2 * self.kv_size

    @property
    def num_parameters(self) -> int:
        """Number of parameters in the weights of a checkpoint. Unless transformers has counted them
        it is without biases and norms, which are too small to matter where memory is planned."""
        if self.counted_parameters is not None:
            return self.counted_parameters
        attention = self.hidden_size * (self.qkv_size + self.q_size)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + embeddings * self.vocab_size * self.hidden_size

    @property
    def default_context(self) -> int:
        """Maximum number of tokens of a request if `max_model_len` is not set.

        With YaRN it is `factor` times the original context, as such checkpoints often leave
        max_position_embeddings as it was before scaling; vLLM reads them in the same way.
        """
        rope = self.rope
        if rope.scaling is RopeScaling.YARN:
            return self._reached(rope.original_max_position_embeddings)
        return self.max_position_embeddings

    @property
    def longest_context(self) -> int:
        """Largest value of `max_model_len` that the model allows, in tokens. With dynamic scaling
        that is `factor` times max_position_embeddings, as frequencies are scaled for the context
        that is asked for."""
        if self.rope.scaling is RopeScaling.DYNAMIC:
            return self._reached(self.max_position_embeddings)
        return self.default_context

    def _reached(self, context: float) -> int:
        """Return `factor` times a context in tokens, but at least max_position_embeddings."""
        stretched = int(min(self.rope.factor * context, _MAX_INTEGER))
        return max(self.max_position_embeddings, stretched)

    def for_context(self, context: int) -> ModelConfig:
        """Return the same model with positions for `context` tokens, at most `longest_context`.

        With dynamic (NTK-aware) scaling all texts get the frequencies that transformers uses for a
        text of that length, because keys in the KV cache cannot be rotated again when a text grows.
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
        """Make the shape from a configuration of transformers (its `to_dict()`).

        Raises UnknownArchitectureError, UnsupportedSettingError for a setting that would change the
        computation and is not implemented, and ConfigError for a value that is not allowed.
        """
        check_implemented(config)
        architecture = architecture_of(config)
        llama, qwen2, qwen3 = (
            architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3")
        )
        heads = positive(config, "num_attention_heads")
        hidden = positive(config, "hidden_size")
        kv_heads = positive(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
            )
        head_dim = positive(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ConfigError(
                f"heads of head_dim={head_dim} elements cannot be turned by RoPE, which takes them "
                "in pairs: head_dim, or hidden_size / num_attention_heads, must be even."
            )
        rope = rope_of(config)
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
            vocab_size=positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive(config, "intermediate_size"),
            num_layers=positive(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(eps),
            max_position_embeddings=positive(config, "max_position_embeddings"),
            dtype=dtype_of(config),
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
"""The architectures that are implemented here, and the `model_type` of each in transformers."""

IMPLEMENTATIONS = ("minisrv", "transformers")
"""Those whose code can compute a model: the decoder in `nn`, or transformers' own model code."""

MAX_HEAD_DIM = 256
"""Largest number of elements of a head, on every device. A tile of keys and values of larger heads
does not fit into the shared memory of most GPUs, and the CPU's kernels hold a head on the stack."""

_OF_ANY_MODEL = {"is_causal": True, "per_layer_config": {}, "transformers_weights": None}
"""Settings that transformers accepts for any architecture, with the values that change nothing."""

_DTYPES = {
    **{name: name for name in ("float16", "bfloat16", "float32", "float64")},
    **{"half": "float16", "float": "float32", "double": "float64"},
}
"""The data types that a checkpoint may say that its weights have, by torch's names for them."""

_MAX_NUMBER = 1e18
"""Largest absolute value of a setting that is not a dimension; below it results that are computed
from several settings stay finite."""

_LISTED = {"num_hidden_layers": 10_000, "num_labels": 100_000}
"""Maximum values of settings that are counts, for which transformers makes lists of that length
when it reads them, or minisrv makes that many modules."""

_MAX_INTEGER = 2**31 - 1
"""Largest dimension of a model; numbers of bytes that are computed from dimensions fit 64 bits."""


def check_implemented(config: Mapping[str, Any], implementation: str = "minisrv") -> None:
    """Refuse a configuration for settings that are wrong whatever the defaults are, so that
    `config` may be a raw config.json or one that transformers has resolved.

    implementation: whose code computes the model, one of `IMPLEMENTATIONS`. What transformers' code
        computes is checked by `checkpoint.transformers_decoder` besides.
    Raises ConfigError, and for "minisrv" UnknownArchitectureError and UnsupportedSettingError.
    """
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
    if implementation == "minisrv":
        _check_implemented_here(config)


def _check_implemented_here(config: Mapping[str, Any]) -> None:
    """Refuse what the decoder in `nn` does not compute."""
    architecture = architecture_of(config)
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
        raise UnsupportedSettingError(
            f"hidden_act={shown(config['hidden_act'])} is not implemented; silu is."
        )
    kinds = config.get("layer_types") or ()
    if not isinstance(kinds, list | tuple):
        raise ConfigError(f"config.json: layer_types={shown(kinds)} must be a list.")
    sliding = [kind for kind in kinds if kind != "full_attention"]
    if sliding:
        raise UnsupportedSettingError(
            f"layers of the kind {shown(sliding[0])} are not implemented; only full attention is "
            "(use_sliding_window and layer_types in config.json)."
        )


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the first of `architectures`, which some checkpoints write without a list."""
    names = config.get("architectures") or [None]
    name = names[0] if isinstance(names, list | tuple) else names
    return name if isinstance(name, str) else shown(name)


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer of the configuration, or `default` if it is absent or null. Raises
    ConfigError."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_INTEGER:
        raise ConfigError(
            f"config.json: {key}={shown(value)} must be a positive integer, {_MAX_INTEGER} at most."
        )
    return value


def dtype_of(config: Mapping[str, Any]) -> str:
    """Return the name of the data type of a configuration of transformers, float32 if it has none.
    Raises ConfigError for one that weights cannot be read in."""
    name = str(config.get("dtype") or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(
            f"config.json: dtype={shown(name)} is not implemented; implemented are: "
            f"{', '.join(_DTYPES)}."
        )
    return _DTYPES[name]


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is a number that can be computed with: Python's JSON reader accepts NaN,
    Infinity, and integers of any size."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER
    )


def rope_of(config: Mapping[str, Any]) -> RopeConfig:
    """Return the settings of RoPE in a configuration of transformers.

    Raises UnsupportedSettingError for a kind that is not implemented here, and ConfigError for
    values that are not allowed.
    """
    settings: Mapping[str, Any] = config.get("rope_parameters") or {}
    kinds = config.get("layer_types") or ()
    nested = [key for key, value in settings.items() if isinstance(value, dict) or key in kinds]
    if nested:
        # All layers are of one kind. Where settings for kinds of layers and settings for all stand
        # side by side, nothing says which of them would win.
        full_attention = settings.get("full_attention")
        if not kinds or not isinstance(full_attention, dict) or len(nested) < len(settings):
            raise ConfigError(
                f"config.json: RoPE settings for {shown(sorted(nested))} do not go with this "
                "model's layers; give one set of rope_parameters."
            )
        settings = full_attention
    kind = settings.get("rope_type", "default")
    if kind not in tuple(RopeScaling):
        raise UnsupportedSettingError(
            f"rope_type={shown(kind)} is not implemented; "
            f"implemented are: {', '.join(RopeScaling)}."
        )
    scaling = RopeScaling(kind)
    if (settings.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedSettingError("partial_rotary_factor other than 1.0 is not implemented.")

    def number(name: str, default: float | None = None) -> float:
        """Return a positive number of the RoPE settings, or `default` if it is absent or null.
        Raises ConfigError."""
        value = settings.get(name)
        value = default if value is None else value
        if value is None or not _is_number(value) or value <= 0:
            raise ConfigError(
                f"config.json: {name}={shown(value)} must be a positive number for "
                f"rope_type={kind}."
            )
        return float(value)

    longest = positive(config, "max_position_embeddings")
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
            # A value of 0 counts as absent, as in transformers.
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
    """Return the factor by which YaRN multiplies cosines and sines if the checkpoint has no
    `attention_factor` (section 3.4 of the paper; the quotient, for a checkpoint with both
    `_MSCALES`, is DeepSeek's)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if len(mscales) == len(_MSCALES):
        return scale(mscales[0]) / scale(mscales[1])
    return scale(1.0)

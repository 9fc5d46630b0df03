"""Settings: frozen, validated once, the same object in every process.

Knows: what can be set, the defaults, and which combinations make no sense. Derived values are
properties or come from `dataclasses.replace`; nothing is changed after construction.
Knows nothing of torch: dtypes are strings here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisrv.errors import ConfigError, UnknownArchitectureError
from minisrv.modes import CUDAGraphMode

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("int8",)
MAX_LAUNCH_US = 10_000
MAX_API_WORKERS = 64


class RopeScaling(enum.StrEnum):
    """How rotary frequencies are stretched; names as in a checkpoint's `rope_type`."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. The last four fields matter for their scaling only."""

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, read from a Hugging Face `config.json`.

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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json` (the old `rope_theta`/`rope_scaling` and the new
        `rope_parameters` spelling).

        Raises UnknownArchitectureError, ConfigError (a setting that would change the
        computation and is not implemented).
        """
        names = config.get("architectures") or [None]
        architecture = names[0]
        if architecture not in ARCHITECTURES:
            raise UnknownArchitectureError(
                f"architecture {architecture!r} is not implemented; "
                f"implemented are: {', '.join(sorted(ARCHITECTURES))}."
            )
        llama, qwen2, qwen3 = (
            architecture == f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3")
        )
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        if config.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act={config['hidden_act']!r} is not implemented; silu is.")
        if config.get("use_sliding_window"):
            raise ConfigError("use_sliding_window=true is not implemented; only full attention is.")
        if config.get("quantization_config"):
            raise ConfigError("quantized checkpoints are not implemented; load the original one.")
        bias = bool(config.get("attention_bias", False))
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
            )
        return cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.get("head_dim") or (128 if qwen3 else hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=_positive(config, "max_position_embeddings"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            rope=_rope(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or bias,
            output_bias=bias and not qwen2,
            mlp_bias=llama and bool(config.get("mlp_bias", False)),
            qk_norm=qwen3,
        )


ARCHITECTURES = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json: {key}={value!r} must be a positive integer.")
    return value


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in tuple(RopeScaling):
        raise ConfigError(
            f"rope_type={kind!r} is not implemented; implemented are: {', '.join(RopeScaling)}."
        )
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1.0 is not implemented.")
    defaults = RopeConfig()
    name = "original_max_position_embeddings"
    trained = config.get(name) or scaling.get(name) or config.get("max_position_embeddings")
    return RopeConfig(
        theta=theta,
        scaling=RopeScaling(kind),
        factor=float(scaling.get("factor", defaults.factor)),
        low_freq_factor=float(scaling.get("low_freq_factor", defaults.low_freq_factor)),
        high_freq_factor=float(scaling.get("high_freq_factor", defaults.high_freq_factor)),
        original_max_position_embeddings=int(trained or defaults.original_max_position_embeddings),
    )


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs to know. Names and meanings follow vLLM's flags.

    model: a directory with a Hugging Face checkpoint, or a hub id; None serves the default model.
    quantization: "int8" keeps the weights of the projections with 8 bits.
    max_model_len: tokens of prompt and completion together; None takes the checkpoint's.
    max_num_seqs: requests in one decode batch; always the top decode rung.
    max_num_batched_tokens: token budget of one step.
    num_kv_blocks: blocks of the KV cache, the null block included; None sizes it by
        kv_cache_memory.
    kv_cache_memory: bytes of KV cache; never more than max_num_seqs full contexts are allocated.
        None takes 1 GiB on a CPU, and on a GPU what gpu_memory_utilization leaves.
    gpu_memory_utilization: share of the GPU's memory that weights, graphs and cache may fill.
    max_waiting: requests the engine queues before it answers 429.
    async_scheduling: schedule a step before the last one's tokens are known (a lag of one); None
        does so on a GPU, which would wait for the host otherwise, and not on a CPU.
    enable_prefix_caching: a prompt that begins as an earlier one does shares its KV blocks.
    cudagraph_mode: None is full on a GPU and full-and-piecewise on a CPU, whose attention takes the
        lengths of a mixed batch from the host.
    cudagraph_capture_sizes: rungs of both ladders; None takes the default ladders.
    simulate_launch_us: microseconds that every launch takes longer than it does; 0 is off.
    Raises ConfigError.
    """

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    max_waiting: int = 1024
    seed: int = 0
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    cudagraph_mode: CUDAGraphMode | None = None
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    simulate_launch_us: float = 0.0

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        if self.quantization is not None:
            _one_of("quantization", self.quantization, QUANTIZATIONS)
            if self.dtype not in ("auto", "bfloat16"):
                raise ConfigError(
                    f"quantization=int8 multiplies with bfloat16 activations, not {self.dtype}; "
                    "leave dtype out."
                )
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _at_least(name, getattr(self, name), 1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not allowed; it must be "
                "in (0, 1]."
            )
        for name, least in (("max_model_len", 2), ("num_kv_blocks", 2), ("kv_cache_memory", 1)):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), least)
        _at_least("max_waiting", self.max_waiting, 0)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, or a full decode batch does not fit a step."
            )
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and (not sizes or min(sizes) < 1):
            raise ConfigError(
                f"cudagraph_capture_sizes={list(sizes)} must be one or more positive integers."
            )
        if not 0 <= self.simulate_launch_us <= MAX_LAUNCH_US:
            raise ConfigError(
                f"simulate_launch_us={self.simulate_launch_us} is not allowed; it must be in "
                f"[0, {MAX_LAUNCH_US}] (a GPU's launch takes about 10)."
            )

    @property
    def graph_mode(self) -> CUDAGraphMode:
        """The configured mode once `enforce_eager` has had its say; for `device` "auto" the default
        is a CPU's, until the engine knows better."""
        if self.enforce_eager:
            return CUDAGraphMode.NONE
        if self.cudagraph_mode is not None:
            return self.cudagraph_mode
        return CUDAGraphMode.FULL if self.device == "cuda" else CUDAGraphMode.FULL_AND_PIECEWISE


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP side needs to know.

    served_model_names: names the API answers to, the first one in its answers; empty takes the
        model's own.
    shutdown_timeout: seconds that open requests get to finish after SIGTERM or SIGINT.
    api_workers: processes that speak HTTP, tokenise and detokenise.
    engine_timeout: seconds that one step of the engine may take; one that takes longer is taken for
        a hang, and the engine for dead. While it loads, seconds for which its process may do
        nothing at all, and then at least two minutes.
    request_timeout: seconds from a request's arrival to its end; 0 sets no limit.
    api_keys: what clients must send, one of them; empty lets everybody in.
    max_requests_per_key: that one key may have open at once; 0 sets no limit.
    allowed_origins: web pages whose scripts may ask, as browsers have it (CORS); "*" is any.
    ssl_certfile, ssl_keyfile: PEM files, for HTTPS.
    Raises ConfigError.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    shutdown_timeout: int = 10
    api_workers: int = 1
    engine_timeout: int = 30
    request_timeout: int = 0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_requests_per_key: int = 0
    allowed_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    def __post_init__(self) -> None:
        _at_least("engine_timeout", self.engine_timeout, 1)
        _at_least("request_timeout", self.request_timeout, 0)
        _at_least("max_requests_per_key", self.max_requests_per_key, 0)
        if self.max_requests_per_key and not self.api_keys:
            raise ConfigError("max_requests_per_key counts by API key, and there is none.")
        if not all(key.isprintable() and key.isascii() and key.split() for key in self.api_keys):
            raise ConfigError("an API key is not allowed; it must be printable ASCII, not blank.")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile are only allowed together.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is not allowed; it must be in [0, 65535].")
        _at_least("shutdown_timeout", self.shutdown_timeout, 0)
        if not 1 <= self.api_workers <= MAX_API_WORKERS:
            raise ConfigError(
                f"api_workers={self.api_workers} is not allowed; it must be in "
                f"[1, {MAX_API_WORKERS}]."
            )


@dataclass(frozen=True)
class BenchConfig:
    """What `minisrv bench` measures, and what it keeps.

    batch_sizes: requests of a decode batch; empty takes every decode rung.
    context: tokens of a request in the middle of the measured steps.
    rounds: how often every mode is measured, twice each time.
    json, plot: files to write.
    Raises ConfigError.
    """

    batch_sizes: tuple[int, ...] = ()
    context: int = 128
    rounds: int = 6
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.batch_sizes):
            raise ConfigError(f"batch_sizes={list(self.batch_sizes)} must be positive integers.")
        _at_least("context", self.context, 1)
        _at_least("rounds", self.rounds, 1)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; choose from: {', '.join(allowed)}.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is not allowed; it must be at least {least}.")

"""Settings: frozen, validated once, the same object in every process.

Knows: what can be set, the defaults, and which combinations make no sense. Derived values are
properties or come from `dataclasses.replace`; nothing is changed after construction.
Knows nothing of torch: dtypes are strings here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode

DTYPES = ("auto", "float32", "bfloat16", "float16", "half", "float")
"""Names of torch's, where half is float16 and float is float32."""
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("int8",)

_WEEK = 7 * 24 * 3600
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_model_len": (2, 1 << 27),
    "max_num_seqs": (1, 8192),
    "max_num_batched_tokens": (1, 1 << 20),
    "block_size": (1, 4096),
    "num_kv_blocks": (2, 1 << 27),
    "kv_cache_memory": (1, 1 << 50),
    "max_waiting": (0, 1 << 20),
    "seed": (-1 << 63, (1 << 63) - 1),
    "cudagraph_capture_sizes": (1, 1 << 20),
    "simulate_launch_us": (0, 10_000),  # a GPU's launch takes about 10
    "port": (0, 65535),
    "api_workers": (1, 64),
    "shutdown_timeout": (0, _WEEK),
    "engine_timeout": (1, _WEEK),
    "request_timeout": (0, _WEEK),
    "max_requests_per_key": (0, 1 << 20),
    "max_grammar_seconds_per_key": (0, 1 << 20),
    "batch_sizes": (1, 8192),
    "context": (1, 1 << 27),
    "rounds": (1, 10_000),
    "temperature": (0, 2),
    "max_tokens": (1, 1 << 27),
}
"""The least and the most of every number, for any machine and model: what is beyond would be taken
at its word, and take all memory or all time. What one machine and one model allow is less
(`engine.memory`)."""

_MAX_CHARACTERS = 1 << 22
"""Of a file that a setting names."""

_HOST_NAME = re.compile(r"\*|[A-Za-z0-9._-]+|(\[)?(?:[0-9A-Fa-f.]*:){2,}[0-9A-Fa-f.]*(?(1)\])")
"""Any, a name or an IPv4 address, an IPv6 address with or without brackets."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs to know. Names and meanings follow vLLM's flags.

    model: a directory with a Hugging Face checkpoint, or a hub id; None serves the default model.
    revision: a branch, tag or commit of a hub id's repository; None takes its main branch.
    tokenizer: a directory or hub id with another tokenizer than the checkpoint's.
    chat_template: a file with another template than the checkpoint's.
    dtype: what weights and activations are served in; auto keeps what the device is fast with, and
        the log says why. half is float16, float is float32.
    device: auto is the GPU where there is one.
    load_format: auto reads safetensors; dummy draws weights at random, from config.json alone.
    quantization: int8 keeps the weights of the projections with 8 bits.
    max_model_len: tokens of prompt and completion together; None takes the checkpoint's, or as many
        as the KV cache holds.
    max_num_seqs: requests in one decode batch; the largest decode graph is of this size.
    max_num_batched_tokens: token budget of one step.
    block_size: tokens in a block of the KV cache.
    num_kv_blocks: blocks of the KV cache, of which one is kept free for padding; None sizes it by
        kv_cache_memory.
    kv_cache_memory: bytes of KV cache; never more than max_num_seqs full contexts are allocated.
        None takes half of the memory that weights leave on a CPU, and on a GPU what
        gpu_memory_utilization leaves.
    gpu_memory_utilization: share of the GPU's memory that weights, graphs and cache may fill.
    max_waiting: requests the engine queues before it answers 429.
    seed: of the seeds that requests do not give.
    async_scheduling: schedule a step before the last one's tokens are known; None does so on a GPU,
        which would wait for the host otherwise, and not on a CPU.
    enable_prefix_caching: a prompt that begins as an earlier one does shares its KV blocks; on
        unless it is turned off.
    enforce_eager: no graphs at all, whatever cudagraph_mode says.
    cudagraph_mode: which batches run by which graphs: none, piecewise, full-decode-only,
        full-and-piecewise or full. None is full on a GPU and full-and-piecewise on a CPU, whose
        attention takes the lengths of a mixed batch from the host.
    cudagraph_capture_sizes: sizes to capture graphs for, of requests in decode and of tokens
        otherwise. None takes those that `minisrv plan` prints.
    simulate_launch_us: microseconds that every launch takes longer than it does, to see on a CPU
        what graphs save where a launch is dear; figures are then labelled simulated. 0 is off.
    Raises ConfigError.
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: Path | None = None
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
            if self.device == "cuda":
                raise ConfigError("quantization=int8 is for CPUs; leave it out, or use device=cpu.")
            _one_of("quantization", self.quantization, QUANTIZATIONS)
            if self.dtype not in ("auto", "bfloat16"):
                raise ConfigError(
                    f"quantization=int8 multiplies with bfloat16 activations, not {self.dtype}; "
                    "leave dtype out."
                )
        _check_numbers(self)
        if not 0 < _number("gpu_memory_utilization", self.gpu_memory_utilization) <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not allowed; it must be "
                "in (0, 1]."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, or a full decode batch does not fit a step."
            )
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and not sizes:
            raise ConfigError("cudagraph_capture_sizes is empty; name a size, or leave it out.")
        if sizes is not None and max(sizes) > self.max_num_batched_tokens:
            raise ConfigError(
                f"cudagraph_capture_sizes name {max(sizes)}, and no step has more than "
                f"max_num_batched_tokens={self.max_num_batched_tokens} tokens; leave out what is "
                "larger, or raise that."
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

    host: the address on which it listens.
    port: the port on which it listens; 0 takes a free one.
    served_model_names: names the API answers to, the first one in its answers; empty takes the
        model's own.
    shutdown_timeout: seconds that open requests get to finish after SIGTERM or SIGINT.
    api_workers: processes that speak HTTP, tokenise and detokenise, behind one port; more than one
        where clients are many and steps are short.
    engine_timeout: seconds that one step of the engine may take; one that takes longer is taken for
        a hang, and the engine for dead. While it loads, seconds for which its process may do
        nothing at all, and then at least two minutes.
    request_timeout: seconds from a request's arrival to its end; 0 sets no limit.
    api_keys: what clients must send, one of them; none lets everybody in. Others see those of a
        command line in the list of processes: a file or the environment is better.
    max_requests_per_key: that one key may have open at once, each choice of a request counted as
        one, and a call of /tokenize or /detokenize too; 0 sets no limit.
    max_grammar_seconds_per_key: processor time that new grammars of one API key may take in a
        minute, in each API worker; those that it has seen before cost nothing. 0 sets no limit.
    share_prefix_cache: let keys find what other keys have had computed. Each then sees, from the
        time of an answer and from cached_tokens, whether another's prompt began as its own.
    allowed_hosts: names besides localhost and loopback addresses that clients may call the server
        by, at any port; "*" is any. Without it any name will do, but for a server on a loopback
        address that asks for no key: there a web page could ask by a name of its own, which it
        lets mean this machine.
    allowed_origins: web pages whose scripts may ask, as browsers have it (CORS); "*" is any.
    ssl_certfile: a PEM file with the certificate, for HTTPS.
    ssl_keyfile: a PEM file with its key.
    disable_log_stats: leave out the lines that tell throughput and queue while there is work.
    disable_uvicorn_access_log: leave out the line of each request.
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
    max_grammar_seconds_per_key: int = 30
    share_prefix_cache: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    disable_log_stats: bool = False
    disable_uvicorn_access_log: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.max_requests_per_key and not self.api_keys:
            raise ConfigError("max_requests_per_key counts by API key, and there is none.")
        if not all(key.isprintable() and key.isascii() and key.split() for key in self.api_keys):
            raise ConfigError("an API key is not allowed; it must be printable ASCII, not blank.")
        for name in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"allowed_hosts={name!r} is not allowed; write a name such as "
                    "models.example.org, without scheme and port, an IP address, or * for any."
                )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile are only allowed together.")
        if not self.host:
            # It would be all addresses, and comes of a variable that was not set.
            raise ConfigError("host is empty; write 0.0.0.0 to listen on all addresses.")


@dataclass(frozen=True)
class BenchConfig:
    """What `minisrv bench` measures, and what it keeps.

    batch_sizes: requests of a decode batch; none takes every decode rung.
    context: tokens of a request in the middle of the measured steps.
    rounds: how often every mode is measured, twice each time.
    json: a file for everything, raw medians included.
    plot: a file for a drawing of it; needs matplotlib.
    Raises ConfigError.
    """

    batch_sizes: tuple[int, ...] = ()
    context: int = 128
    rounds: int = 6
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclass(frozen=True)
class ChatConfig:
    """What `minisrv chat` says, and to whom.

    url: a server with OpenAI's API, such as http://127.0.0.1:8000/v1, which is sent the key in
        $MINISRV_API_KEY; None runs the model in this process.
    quick: a message to answer, and no more after it.
    system_prompt: what the model is told before the first message.
    temperature: 0 takes the most likely token; None is the checkpoint's, or the server's.
    max_tokens: of an answer; None takes as many as fit.
    Raises ConfigError.
    """

    url: str | None = None
    quick: str | None = None
    system_prompt: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)


def read_text(flag: str, path: Path) -> str:
    """The text of a file that a flag names, which may be a pipe. Raises ConfigError, also for one
    that is longer than any such file, or has no end."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}.") from error
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{flag} {path} cannot be read: it has more than {_MAX_CHARACTERS} characters."
        )
    return text


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; choose from: {', '.join(allowed)}.")


def _check_numbers(settings: object) -> None:
    """Raise ConfigError for a number of a settings object that is out of its bounds, or is none."""
    for setting in fields(settings):  # type: ignore[arg-type]
        if setting.name not in _BOUNDS:
            continue
        name, value = setting.name, getattr(settings, setting.name)
        least, most = _BOUNDS[name]
        for one in value if isinstance(value, tuple) else (value,):
            if one is None and setting.default is None:
                continue
            if "float" not in setting.type and not _is_whole(one):
                raise ConfigError(f"{name}={one!r} is not allowed; it must be an integer.")
            if not least <= _number(name, one) <= most:
                raise ConfigError(f"{name}={one} is not allowed; it must be in [{least}, {most}].")


def _number(name: str, value: object) -> float:
    if not (isinstance(value, float) or _is_whole(value)):
        raise ConfigError(f"{name}={value!r} is not allowed; it must be a number.")
    return value  # type: ignore[return-value]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""Settings: frozen, validated once, the same object in every process.

Knows: what can be set, the defaults, and which combinations make no sense. Derived values are
properties or come from `dataclasses.replace`; nothing is changed after construction.
Knows nothing of torch: dtypes are strings here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from minisrv.compile.modes import CompilationMode
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode

DTYPES = ("auto", "float32", "bfloat16", "float16", "half", "float")
"""torch's names of dtypes; half is float16, and float is float32."""
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
MODEL_IMPLS = ("auto", "minisrv", "transformers")
QUANTIZATIONS = ("int8",)
METRICS_NAMES = ("minisrv", "vllm", "both")
GRAPH_CAPTURES = ("covering", "whole")
GRAPH_REFITS = ("off", "propose", "apply")

_T = TypeVar("_T")
_WEEK = 7 * 24 * 3600
_MAX_CHARACTERS = 1 << 22
"""Maximum number of characters in a file that a setting names."""

_HOST_NAME = re.compile(r"\*|[A-Za-z0-9._-]+|(\[)?(?:[0-9A-Fa-f.]*:){2,}[0-9A-Fa-f.]*(?(1)\])")
"""Matches "*", a name or IPv4 address, or an IPv6 address with or without brackets."""
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")
"""Matches the beginning of a path up to a slash."""


def _setting(
    default: _T,
    *,
    bounds: tuple[float, float] | None = None,
    choices: tuple[str, ...] | None = None,
) -> _T:
    """Return a dataclass field that says which values are allowed. `_check_fields` refuses others,
    and the flags of `minisrv.flags` list the choices. A field whose default is None may always be
    None.

    bounds: minimum and maximum of a number, or of each number in a tuple, whatever the machine and
        the model. Without bounds, a value that is far too large would be obeyed, and take all
        memory or all time. One machine and one model allow less (`engine.platforms`).
    choices: the allowed strings.
    """
    return field(default=default, metadata={"bounds": bounds, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """The settings of the engine. Where vLLM has such a flag, name and meaning are the same.

    model: the model to serve: a directory with a Hugging Face checkpoint, or a repository id on the
        Hugging Face Hub. By default the model that comes with minisrv.
    revision: branch, tag or commit of the repository on the Hub. By default its main branch.
    tokenizer: a directory or Hub id with a tokenizer to use in place of the checkpoint's.
    chat_template: a file with a chat template to use in place of the checkpoint's.
    dtype: data type of weights and activations. auto keeps the checkpoint's if the device is fast
        with it, and otherwise takes float32 on a CPU and bfloat16 on a GPU; the log says why. half
        is float16, float is float32.
    device: the device to run on. auto is the GPU if there is one, else the CPU.
    model_impl: whose code computes the model. minisrv has faster code of its own for some
        architectures, which auto takes where it computes what the checkpoint asks for; transformers
        has code for most others.
    load_format: where the weights come from. auto reads safetensors files; dummy draws random
        weights and needs no file but config.json.
    quantization: int8 stores the weights of the projections with 8 bits each, on a CPU; those of
        the embedding and of the experts of a mixture stay as they are. By default weights are not
        quantized.
    max_model_len: maximum number of tokens of a request, prompt and completion together. By default
        the context length of the checkpoint, or as many tokens as the KV cache holds if those are
        fewer.
    max_num_seqs: maximum number of requests that run at the same time, and so in one decode batch.
        Unless capture sizes are given, the largest decode graph has this size too.
    max_num_batched_tokens: maximum number of tokens in one step, over all requests. Steps in which
        requests decode have fewer if itl_target_ms asks for it. By default 8192 on a GPU, and 512
        on a CPU.
    itl_target_ms: milliseconds that a request which decodes should at most wait from one token to
        the next while the prompts of others are computed. A step gets as many prompt tokens as use
        the device well and are predicted to fit that time. 0 is no target, which is the default on
        a CPU: a step gets as many as it may have, whatever they cost, and nothing is predicted. The
        default on a GPU is 32 times the step in which max_num_seqs requests decode, as it is
        measured.
    block_size: number of tokens in a block of the KV cache.
    num_kv_blocks: number of blocks in the KV cache, one of which is reserved for padding. By
        default as many as kv_cache_memory allows.
    kv_cache_memory: size of the KV cache in bytes. No more is allocated than max_num_seqs requests
        of maximum length need. The default on a CPU is half of the memory that the weights leave,
        and on a GPU what gpu_memory_utilization leaves.
    gpu_memory_utilization: fraction of the GPU's memory that weights, activations, graphs and KV
        cache may take together; what other processes use counts as well.
    max_waiting: maximum number of requests that wait for their turn; further ones are refused with
        status 429.
    seed: seed of the generator that draws a seed for each request without one.
    async_scheduling: schedule a step before the tokens of the previous one are known. On by default
        on a GPU, which would otherwise wait for the host, and off on a CPU.
    enable_prefix_caching: let prompts that begin alike share the KV cache blocks of their common
        beginning. On by default.
    enforce_eager: run every step eagerly, without graphs and uncompiled, whatever cudagraph_mode
        and compilation_mode say.
    cudagraph_mode: which batches run as which graphs, in vLLM's terms: none, piecewise,
        full-decode-only, full-and-piecewise or full. The default is full on a GPU, and
        full-and-piecewise on a CPU, where attention needs the lengths of a mixed batch on the host;
        it is none on a CPU if compilation_mode is 1 or 2.
    cudagraph_capture_sizes: the batch sizes to capture graphs for. They count requests in a decode
        batch, and tokens in any other. By default those that `minisrv plan` prints.
    cudagraph_capture: which graphs are captured before the engine is ready: covering, those of a
        few sizes that hold every batch with more padding, and all others while it serves, those
        first for which there are batches; or whole, all of them.
    cudagraph_refit: whether the capture sizes follow the batches that come. propose: the engine
        counts them, and says in the log and its metrics if as many graphs of other sizes would save
        time. apply: it captures and certifies these graphs while it serves, and puts them in the
        place of the others as a whole; on a GPU, memory is kept for both.
    verify_graphs: share of the steps by graphs that are run again eagerly while the server serves,
        from 0 to 1. A graph that disagrees is taken out of service, and the requests that it may
        have spoilt end with an error. 0, the default, verifies none.
    compilation_mode: how the model is compiled by torch.compile, as a number or in vLLM's terms:
        0 or none; 1 or stock-torch-compile, as a whole, and again for a step unlike all before; 2
        or dynamo-trace-once, as a whole and once; 3, minisrv-compile or vllm-compile, in pieces, by
        a process of its own. The default is that of optimization_level, or else 3 for models in
        transformers' code, if there is a C++ compiler (and on a GPU a CUDA toolkit), and 0 for all
        others.
    optimization_level: 0 stands for compilation_mode 0 and cudagraph_mode none; 1 for
        compilation_mode 3 and cudagraph_mode piecewise; 2 and 3 for compilation_mode 3 and the
        default cudagraph_mode. Either mode, if it is given too, goes before. By default no level is
        chosen.
    compile_wait: be ready only when compiled code serves or has been refused, also if an earlier
        start has refused it because it was slower. Without it, steps run by the model's own code
        until then if compilation_mode is 3.
    enable_sleep_mode: let the engine be put to sleep, in which the memory of its weights and its KV
        cache is released: by POST /sleep of a server, or LLM.sleep.
    step_trace: number of the last steps that are kept, each with its graph, its requests and its
        times, for `minisrv trace` and GET /debug/steps; 0 keeps none.
    simulate_launch_us: microseconds to add to the time of every launch, which shows on a CPU what
        graphs save where launches are expensive. Results are then labelled as simulated. 0 adds
        nothing.
    Raises ConfigError.
    """

    model: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    chat_template: Path | None = None
    dtype: str = _setting("auto", choices=DTYPES)
    device: str = _setting("auto", choices=DEVICES)
    model_impl: str = _setting("auto", choices=MODEL_IMPLS)
    load_format: str = _setting("auto", choices=LOAD_FORMATS)
    quantization: str | None = _setting(None, choices=QUANTIZATIONS)
    max_model_len: int | None = _setting(None, bounds=(2, 1 << 27))
    max_num_seqs: int = _setting(64, bounds=(1, 8192))
    max_num_batched_tokens: int | None = _setting(None, bounds=(1, 1 << 20))
    itl_target_ms: float | None = _setting(None, bounds=(0, 3_600_000))
    block_size: int = _setting(16, bounds=(1, 4096))
    num_kv_blocks: int | None = _setting(None, bounds=(2, 1 << 27))
    kv_cache_memory: int | None = _setting(None, bounds=(1, 1 << 50))
    gpu_memory_utilization: float = 0.9
    max_waiting: int = _setting(1024, bounds=(0, 1 << 20))
    seed: int = _setting(0, bounds=(-1 << 63, (1 << 63) - 1))
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    cudagraph_mode: CUDAGraphMode | None = None
    cudagraph_capture_sizes: tuple[int, ...] | None = _setting(None, bounds=(1, 1 << 20))
    cudagraph_capture: str = _setting("covering", choices=GRAPH_CAPTURES)
    cudagraph_refit: str = _setting("off", choices=GRAPH_REFITS)
    verify_graphs: float = _setting(0.0, bounds=(0, 1))
    compilation_mode: CompilationMode | None = None
    optimization_level: int | None = _setting(None, bounds=(0, 3))
    compile_wait: bool = False
    enable_sleep_mode: bool = False
    step_trace: int = _setting(4096, bounds=(0, 1 << 20))
    simulate_launch_us: float = _setting(0.0, bounds=(0, 10_000))  # a GPU's launch takes about 10

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.quantization is not None and self.dtype not in ("auto", "bfloat16"):
            raise ConfigError(
                f"quantization=int8 multiplies with bfloat16 activations, not {self.dtype}; "
                "leave dtype out."
            )
        if not 0 < _number("gpu_memory_utilization", self.gpu_memory_utilization) <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not allowed; it must be "
                "in (0, 1]."
            )
        sizes, most = self.cudagraph_capture_sizes, self.max_num_batched_tokens
        if sizes is not None and not sizes:
            raise ConfigError("cudagraph_capture_sizes is empty; name a size, or leave it out.")
        if most is None:  # the device says (`ResolvedConfig`)
            return
        if most < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={most} must be at least max_num_seqs={self.max_num_seqs}, "
                "or a full decode batch does not fit a step."
            )
        if sizes is not None and max(sizes) > most:
            raise ConfigError(
                f"cudagraph_capture_sizes name {max(sizes)}, and no step has more than "
                f"max_num_batched_tokens={most} tokens; leave out what is larger, or raise that."
            )


@dataclass(frozen=True)
class KVEventsConfig:
    """Where the events of the prefix cache are published; see `ServerConfig`."""

    endpoint: str
    replay_endpoint: str | None
    topic: str


@dataclass(frozen=True)
class ServerConfig:
    """The settings of the HTTP server.

    host: the address to listen on.
    port: the port to listen on; 0 takes a free one.
    served_model_names: the names by which requests may ask for the model. Responses to requests
        that name no model report the first. By default the model's path or id as it was given.
    shutdown_timeout: seconds that open requests get to finish after SIGTERM or SIGINT.
    api_workers: number of processes that handle HTTP, tokenization and detokenization, all behind
        one port. More than one helps if clients are many and steps are short.
    engine_timeout: seconds that one step of the engine may take. An engine that takes longer is
        assumed to hang, and is killed. While the engine loads, seconds for which it may show no
        sign of life, but at least 120.
    request_timeout: seconds that a request may take from its arrival to its end; 0 sets no limit.
    api_keys: API keys, one of which clients must send. Without any, everybody has access. Other
        users of the machine can see keys on a command line in the list of processes, so a file or
        the environment is safer.
    max_requests_per_key: maximum number of requests that one API key may have open at the same
        time. Each choice of a request counts as one, and so does a call of /tokenize or
        /detokenize. 0 sets no limit.
    max_grammar_seconds_per_key: seconds of processor time that new grammars of one API key may take
        per minute, in each API worker. Grammars that it has seen before cost nothing. 0 sets no
        limit.
    share_prefix_cache: let all API keys share one prefix cache. Each key can then learn, from the
        time of a response and from cached_tokens, whether another key's prompt began like its own.
    root_path: the prefix under which a proxy in front of the server serves it, e.g. /models/a,
        whether the proxy strips it from paths or not.
    enable_force_include_usage: end every stream with a chunk that contains the usage, as if its
        request had asked for it.
    pooling: how /v1/embeddings makes a vector of a prompt: last takes the hidden state of its last
        token, mean averages those of all tokens.
    allowed_hosts: host names by which clients may call the server, besides localhost and loopback
        addresses, at any port; "*" allows any name. If none are given, any name is allowed, except
        on a server that listens on a loopback address and needs no API key: a web page could reach
        it by making its own host name resolve to this machine.
    allowed_origins: origins of web pages whose scripts may send requests (CORS); "*" allows any.
    ui: serve the web page at /, which shows what the engine does; without it, / is plain text.
    ssl_certfile: a PEM file with the certificate for HTTPS.
    ssl_keyfile: a PEM file with the private key of the certificate.
    disable_log_stats: do not log throughput and queue length at intervals while there is work.
    disable_uvicorn_access_log: do not log a line for each request.
    metrics_names: whose names the metrics at /metrics have: minisrv's, those of vLLM, for
        dashboards, autoscalers and routers that read a vLLM server, or both.
    kv_events_endpoint: publish what enters and leaves the prefix cache, with its token ids, over
        zmq in vLLM's format: tcp://*:5557 waits at that port for subscribers, tcp://host:5557
        connects to one. Whoever can reach the port can read the prompts. By default nothing is
        published.
    kv_events_replay_endpoint: a zmq endpoint such as tcp://*:5558 at which subscribers can ask for
        events that they have missed.
    kv_events_topic: the topic under which these events are published.
    Raises ConfigError.
    """

    host: str = "127.0.0.1"
    port: int = _setting(8000, bounds=(0, 65535))
    served_model_names: tuple[str, ...] = ()
    shutdown_timeout: int = _setting(10, bounds=(0, _WEEK))
    api_workers: int = _setting(1, bounds=(1, 64))
    engine_timeout: int = _setting(30, bounds=(1, _WEEK))
    request_timeout: int = _setting(0, bounds=(0, _WEEK))
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_requests_per_key: int = _setting(0, bounds=(0, 1 << 20))
    max_grammar_seconds_per_key: int = _setting(30, bounds=(0, 1 << 20))
    share_prefix_cache: bool = False
    root_path: str = ""
    enable_force_include_usage: bool = False
    pooling: str = _setting("last", choices=("last", "mean"))
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    ui: bool = True
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    disable_log_stats: bool = False
    disable_uvicorn_access_log: bool = False
    metrics_names: str = _setting("minisrv", choices=METRICS_NAMES)
    kv_events_endpoint: str | None = None
    kv_events_replay_endpoint: str | None = None
    kv_events_topic: str = ""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.max_requests_per_key and not self.api_keys:
            raise ConfigError("max_requests_per_key counts by API key, and there is none.")
        if not all(key.isprintable() and key.isascii() and key.split() for key in self.api_keys):
            raise ConfigError("an API key is not allowed; it must be printable ASCII, not blank.")
        if not _PREFIX.fullmatch(self.root_path):
            raise ConfigError(
                f"root_path={self.root_path!r} is not allowed; write a path such as /models/a, "
                "with a slash at its beginning and none at its end."
            )
        for name in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"allowed_hosts={name!r} is not allowed; write a name such as "
                    "models.example.org, without scheme and port, an IP address, or * for any."
                )
        if self.kv_events_endpoint is None and (
            self.kv_events_replay_endpoint is not None or self.kv_events_topic
        ):
            raise ConfigError(
                "kv_events_replay_endpoint and kv_events_topic are only allowed with "
                "kv_events_endpoint."
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile are only allowed together.")
        if not self.host:
            # An empty host would mean all addresses, and comes from a variable that is not set.
            raise ConfigError("host is empty; write 0.0.0.0 to listen on all addresses.")

    @property
    def kv_events(self) -> KVEventsConfig | None:
        """Where the events of the prefix cache are published; None if they are not."""
        if self.kv_events_endpoint is None:
            return None
        return KVEventsConfig(
            self.kv_events_endpoint, self.kv_events_replay_endpoint, self.kv_events_topic
        )


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `minisrv bench` and `minisrv launch-cost`: what they measure, and which files
    they write.

    batch_sizes: numbers of requests in the decode batches to measure. By default every captured
        size.
    context: number of tokens of each request halfway through the measured steps.
    rounds: number of rounds, each of which measures every mode twice.
    json: a file to write all results to, raw medians included.
    plot: a file to write a plot of the results to; needs matplotlib.
    Raises ConfigError.
    """

    batch_sizes: tuple[int, ...] = _setting((), bounds=(1, 8192))
    context: int = _setting(128, bounds=(1, 1 << 27))
    rounds: int = _setting(6, bounds=(1, 10_000))
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class LadderConfig:
    """The settings of `minisrv ladder`: the batches to which capture sizes are fitted, how many
    there may be, and which files it writes.

    trace: a step trace with the batches, as `minisrv trace` records it.
    url: the base URL of a server that has counted the batches, which its /metrics show.
    assume: the batches to imagine if neither is given: uniform, every size equally often, or
        streams:N, about N requests that decode and now and then a prompt.
    num_graphs: maximum number of graphs. By default as many as there are now.
    num_sizes: maximum number of capture sizes, in place of num_graphs.
    graph_memory: maximum number of bytes that graphs may take, in place of num_graphs; it needs the
        memory that measure finds.
    measure: start the engine as `serve` does, and let costs be the times of its graphs. Without it
        they are those of a trace, or else the numbers of computed tokens.
    json: a file to write all results to.
    plot: a file to write a plot of the results to; needs matplotlib.
    Raises ConfigError.
    """

    trace: Path | None = None
    url: str | None = None
    assume: str = "uniform"
    num_graphs: int | None = _setting(None, bounds=(1, 100_000))
    num_sizes: int | None = _setting(None, bounds=(1, 10_000))
    graph_memory: int | None = _setting(None, bounds=(1 << 20, 1 << 50))
    measure: bool = False
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        sources = [self.trace, self.url, None if self.assume == "uniform" else self.assume]
        if sum(source is not None for source in sources) > 1:
            raise ConfigError("trace, url and assume each say which batches there are; give one.")
        budgets = (self.num_graphs, self.num_sizes, self.graph_memory)
        if sum(budget is not None for budget in budgets) > 1:
            raise ConfigError("num_graphs, num_sizes and graph_memory exclude each other.")
        if self.graph_memory is not None and not self.measure:
            raise ConfigError("graph_memory needs the memory of graphs; give measure as well.")


@dataclass(frozen=True)
class ChatConfig:
    """The settings of `minisrv chat`.

    url: base URL of a server with OpenAI's API, such as http://127.0.0.1:8000/v1. The key in
        $MINISRV_API_KEY is sent to it. By default the model runs in this process.
    quick: a single message to answer, after which the program ends.
    system_prompt: a system message to send before the first message.
    temperature: sampling temperature; 0 always takes the most likely token. By default the
        checkpoint's, or the server's.
    max_tokens: maximum number of tokens in an answer. By default as many as fit.
    Raises ConfigError.
    """

    url: str | None = None
    quick: str | None = None
    system_prompt: str | None = None
    temperature: float | None = _setting(None, bounds=(0, 2))
    max_tokens: int | None = _setting(None, bounds=(1, 1 << 27))

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class TraceConfig:
    """The settings of `minisrv trace`.

    url: address of the server, with or without /v1. The key in $MINISRV_API_KEY is sent to it.
    last: number of the last steps that the server has kept with which the file begins.
    seconds: seconds to record. By default until Ctrl-C.
    steps: number of steps after which the recording ends, the last ones included. By default there
        is no limit.
    Raises ConfigError.
    """

    url: str = "http://127.0.0.1:8000"
    last: int = _setting(0, bounds=(0, 1 << 20))
    seconds: float | None = _setting(None, bounds=(0, _WEEK))
    steps: int | None = _setting(None, bounds=(1, 1 << 40))

    def __post_init__(self) -> None:
        _check_fields(self)


def read_text(flag: str, path: Path) -> str:
    """Return the text of a file that a flag names, which may be a pipe. Raises ConfigError if it
    cannot be read, or has more than `_MAX_CHARACTERS`, as a file without end has."""
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


def _check_fields(settings: object) -> None:
    """Raise ConfigError if a field of a settings object has a value that `_setting` excludes."""
    for setting in fields(settings):  # type: ignore[arg-type]
        name, value = setting.name, getattr(settings, setting.name)
        if value is None and setting.default is None:
            continue
        if (choices := setting.metadata.get("choices")) and value not in choices:
            raise ConfigError(
                f"{name}={value!r} is not allowed; choose from: {', '.join(choices)}."
            )
        if bounds := setting.metadata.get("bounds"):
            least, most = bounds
            for one in value if isinstance(value, tuple) else (value,):
                if "float" not in setting.type and not _is_whole(one):
                    raise ConfigError(f"{name}={one!r} is not allowed; it must be an integer.")
                if not least <= _number(name, one) <= most:
                    raise ConfigError(
                        f"{name}={one} is not allowed; it must be in [{least}, {most}]."
                    )


def _number(name: str, value: object) -> float:
    if not (isinstance(value, float) or _is_whole(value)):
        raise ConfigError(f"{name}={value!r} is not allowed; it must be a number.")
    return value  # type: ignore[return-value]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

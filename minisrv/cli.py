"""The `minisrv` command: flags to settings, errors to exit status.

Knows: the flags, whose names are vLLM's where vLLM has them. Imports what a command needs when the
command runs, so that `minisrv plan` needs no torch.
Exit status: 0 done or stopped by a signal, 1 it cannot be served (a wrong setting, a bad
checkpoint, an engine that has died), 2 the command line cannot be parsed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from minisrv import __version__, logs
from minisrv.config import (
    DEVICES,
    DTYPES,
    LOAD_FORMATS,
    QUANTIZATIONS,
    BenchConfig,
    EngineConfig,
    ServerConfig,
)
from minisrv.errors import ConfigError, GraphError, MinisrvError
from minisrv.modes import CUDAGraphMode

_T = TypeVar("_T")
API_KEY_VARIABLE = "MINISRV_API_KEY"
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logs.configure()
    try:
        options = _parser().parse_args(arguments)
        if options.model and options.model_flag:
            raise ConfigError("the model is named twice; give MODEL or --model MODEL, not both.")
        options.model = options.model or options.model_flag
        if getattr(options, "log_format", None):
            os.environ[logs.VARIABLE] = options.log_format
            logs.configure()
        status: int = options.run(options)
        return status
    except MinisrvError as error:
        print(f"minisrv: error: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _serve(options: argparse.Namespace) -> int:
    from minisrv.server.launcher import serve

    options.api_keys = (*(options.api_keys or ()), *_more_keys(options.api_key_file))
    return serve(_settings(EngineConfig, options), _settings(ServerConfig, options))


def _more_keys(file: Path | None) -> list[str]:
    """Keys that are not on the command line. Raises ConfigError."""
    keys = []
    if (key := os.environ.get(API_KEY_VARIABLE)) is not None:
        if not key.strip():  # or a secret that was not filled in would let everybody in
            raise ConfigError(f"{API_KEY_VARIABLE} is set and empty; give it a key, or unset it.")
        keys.append(key)
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file} cannot be read: {error}.") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {file} holds no key; put one in each line.")
        keys += found
    return keys


def _plan(options: argparse.Namespace) -> int:
    from minisrv.plan import print_measured_plan, print_plan

    show = print_measured_plan if options.measure else print_plan
    show(_settings(EngineConfig, options))
    return 0


def _certify(options: argparse.Namespace) -> int:
    try:
        from minisrv.certify import run_certify

        return run_certify(_settings(EngineConfig, options), options.json)
    except KeyboardInterrupt:
        raise GraphError("interrupted: not every graph has been certified.") from None


def _bench(options: argparse.Namespace) -> int:
    from minisrv.bench import bench

    bench(_settings(EngineConfig, options), _settings(BenchConfig, options))
    return 0


def engine_config(arguments: Sequence[str]) -> EngineConfig:
    """The settings that `minisrv serve` would take from these engine flags, MODEL included. For
    programs that pass them on. Raises ConfigError; exits with 2 for what is no flag."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_engine_flags(parser)
    return _settings(EngineConfig, parser.parse_args(arguments))


def _settings(kind: type[_T], options: argparse.Namespace) -> _T:
    """The settings of `kind` that were given; its own defaults stand for the rest."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in vars(options).items() if k in names and v is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisrv", description="A small LLM inference server with graph-aware batching."
    )
    parser.add_argument("--version", action="version", version=f"minisrv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve", help="serve a model over an OpenAI-compatible endpoint", description=_serve_help
    )
    _add_engine_flags(serve)
    http = serve.add_argument_group("HTTP")
    defaults = ServerConfig()
    http.add_argument("--host", help=f"address to listen on (default {defaults.host})")
    http.add_argument(
        "--port", type=int, help=f"port; 0 takes a free one (default {defaults.port})"
    )
    http.add_argument(
        "--served-model-name",
        dest="served_model_names",
        type=_names,
        nargs="+",
        action=_Flatten,
        metavar="NAME",
        help="names that the API answers to, separated by spaces or commas (default: the model)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=int,
        metavar="SECONDS",
        help="what open requests get to finish after SIGTERM or Ctrl-C "
        f"(default {defaults.shutdown_timeout})",
    )
    http.add_argument(
        "--api-workers",
        type=int,
        metavar="N",
        help="processes that speak HTTP, tokenise and detokenise, behind one port "
        f"(default {defaults.api_workers}; more where clients are many and steps are short)",
    )
    http.add_argument(
        "--engine-timeout",
        type=int,
        metavar="S",
        help="seconds that one step of the engine may take before it is taken for dead "
        f"(default {defaults.engine_timeout})",
    )
    http.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"json: an object in a line (default ${logs.VARIABLE}, else {logs.FORMATS[0]})",
    )
    http.add_argument(
        "--request-timeout",
        type=int,
        metavar="S",
        help="seconds from a request's arrival to its end, or it ends with an error (default: any)",
    )
    access = serve.add_argument_group("access")
    access.add_argument(
        "--api-key",
        dest="api_keys",
        nargs="+",
        action=_Flatten,
        type=lambda text: (text,),
        metavar="KEY",
        help="keys of which clients must send one; others see them in the list of processes, so "
        f"--api-key-file or ${API_KEY_VARIABLE} is better (default: none is needed)",
    )
    access.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="a file with a key in each line"
    )
    access.add_argument(
        "--max-requests-per-key",
        type=int,
        metavar="N",
        help="requests that one key may have open (default: any number)",
    )
    access.add_argument(
        "--allowed-origins",
        nargs="+",
        action=_Flatten,
        type=lambda text: (text,),
        metavar="ORIGIN",
        help="web pages whose scripts may ask (CORS); * is any (default: none)",
    )
    access.add_argument("--ssl-certfile", type=Path, metavar="FILE", help="for HTTPS, PEM")
    access.add_argument("--ssl-keyfile", type=Path, metavar="FILE", help="its key, PEM")
    serve.set_defaults(run=_serve)

    plan = commands.add_parser(
        "plan",
        help="print which batch runs by which graph, without loading a model",
        description="Print, for every batch size up to the limits, the mode, the padded size and "
        "the reason. Exits 1 if a decode batch is left without its graph.",
    )
    _add_engine_flags(plan)
    plan.add_argument(
        "--measure",
        action="store_true",
        help="start the engine as `serve` does, and print the milliseconds and MiB of each graph",
    )
    plan.set_defaults(run=_plan)

    certify = commands.add_parser(
        "certify",
        help="compare every graph with eager runs, on every kind of batch",
        description="Start the engine as `serve` does, then replay every graph on short, "
        "block-edge and maximal lengths, on every composition of a batch, with poisoned padding "
        "and behind stale tails. Exits 1 if a graph differs from the eager run.",
    )
    _add_engine_flags(certify)
    certify.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    certify.set_defaults(run=_certify)

    bench = commands.add_parser(
        "bench",
        help="measure engine steps eagerly, by PIECEWISE and by FULL graphs, by turns",
        description=_bench_help,
    )
    _add_engine_flags(bench)
    add = bench.add_argument_group("measurement").add_argument
    d = BenchConfig()
    add(
        "--batch-sizes",
        type=_sizes,
        nargs="+",
        action=_Flatten,
        metavar="N",
        help="requests of the decode batches, separated by spaces or commas (default: every rung)",
    )
    add("--context", type=int, metavar="N", help=f"tokens of each request ({d.context})")
    add("--rounds", type=int, metavar="N", help=f"of two blocks of each mode ({d.rounds})")
    add("--json", type=Path, metavar="FILE", help="write everything, raw medians included")
    add("--plot", type=Path, metavar="FILE", help="draw it (pip install 'minisrv[plot]')")
    bench.set_defaults(run=_bench)
    return parser


_serve_help = "Serve a Hugging Face checkpoint. Without a model, the embedded default one."


_bench_help = (
    "Load a model once and time whole engine steps in this process, with the same weights, the "
    "modes by turns (ABCCBA). All engine flags apply; FULL and PIECEWISE graphs are compared with "
    "eager steps, for steady decode by batch and for prefill."
)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of EngineConfig. A flag that is not given stays None: the default is EngineConfig's."""
    d = EngineConfig()
    add = parser.add_argument_group("model").add_argument
    # vLLM takes the model as an argument or as a flag; so it is here.
    add("model", nargs="?", metavar="MODEL", help="directory or Hugging Face hub id")
    add("--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    add("--dtype", choices=DTYPES, help=f"serving dtype (default {d.dtype}: see the log)")
    add("--device", choices=DEVICES, help=f"default {d.device}")
    add("--load-format", choices=LOAD_FORMATS, help="dummy: random weights from config.json alone")
    add("--quantization", choices=QUANTIZATIONS, help="int8: weights of 8 bits, activations as is")
    add("--max-model-len", type=int, metavar="N", help="context length (default: the model's)")
    add("--seed", type=int, metavar="N", help=f"of seeds that requests do not give ({d.seed})")

    add = parser.add_argument_group("batching").add_argument
    add("--max-num-seqs", type=int, metavar="N", help=f"requests in a batch ({d.max_num_seqs})")
    add(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help=f"tokens in a step ({d.max_num_batched_tokens})",
    )
    add("--max-waiting", type=int, metavar="N", help=f"queue length before 429 ({d.max_waiting})")
    add("--block-size", type=int, metavar="N", help=f"tokens in a KV block ({d.block_size})")
    add(
        "--kv-cache-memory",
        type=_size,
        metavar="SIZE",
        help="bytes of KV cache at most, with K, M or G for the powers of 1024 (CPU: 1G)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help=f"of the GPU's memory, for weights, graphs and cache ({d.gpu_memory_utilization})",
    )
    add("--num-kv-blocks", type=int, metavar="N", help="KV blocks, instead of --kv-cache-memory")
    add(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="schedule a step before the last one's tokens are known (default: on a GPU)",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="share the KV blocks of prompts that begin alike (default: on)",
    )

    add = parser.add_argument_group("graphs").add_argument
    add("--enforce-eager", action="store_true", default=None, help="no graphs at all")
    add(
        "--cudagraph-mode",
        type=CUDAGraphMode.parse,
        metavar="MODE",
        help=f"{', '.join(m.value for m in CUDAGraphMode)} (default full on a GPU, "
        f"{d.graph_mode.value} on a CPU)",
    )
    add(
        "--cudagraph-capture-sizes",
        type=_sizes,
        nargs="+",
        action=_Flatten,
        metavar="N",
        help="sizes of both ladders, separated by spaces or commas (default: see `minisrv plan`)",
    )
    add(
        "--simulate-launch-us",
        type=float,
        metavar="N",
        help="let every launch take N microseconds longer, to see on a CPU what graphs save "
        "where a launch is dear; all figures are then labelled simulated (default: off)",
    )


class _Flatten(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(value for group in values for value in group))


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kmg]?)(i?b)?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M or 2G")
    return int(match[1]) * _UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(main())

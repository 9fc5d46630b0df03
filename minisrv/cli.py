"""The `minisrv` command: turns flags into settings, and errors into the exit status.

Knows: the commands. Flags have vLLM's names where vLLM has them (`flags`). The modules that a
command needs are imported when it runs, so that `minisrv plan` needs no torch.
The exit status is 0 if the command is done or was stopped by a signal, 1 if the model cannot be
served (a wrong setting, a bad checkpoint, an engine that has died), and 2 if the command line
cannot be parsed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from minisrv import __version__, logs
from minisrv.certification.faults import Fault
from minisrv.config import (
    BenchConfig,
    ChatConfig,
    EngineConfig,
    LadderConfig,
    ServerConfig,
    TraceConfig,
    read_text,
)
from minisrv.errors import CompilationError, ConfigError, GraphError, MinisrvError
from minisrv.flags import (
    CommandParser,
    SettingsFlags,
    add_engine_flags,
    add_server_flags,
    flag_name,
    size,
)

if TYPE_CHECKING:
    from minisrv.chat import Model

logger = logging.getLogger("minisrv")  # the name also where this module runs as __main__
_T = TypeVar("_T")
API_KEY_VARIABLE = "MINISRV_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    logs.configure()
    try:
        options = _parser().parse_args(arguments)
        _name_model(options)
        if getattr(options, "log_format", None):
            os.environ[logs.VARIABLE] = options.log_format
            logs.configure()
        status: int = options.run(options)
        return status
    except MinisrvError as error:
        if logs.is_json():
            logger.error("%s", error.message)
        else:
            print(f"minisrv: error: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _name_model(options: argparse.Namespace) -> None:
    """Set `options.model` from MODEL or --model. Raises ConfigError if both are given."""
    if None not in (options.model, options.model_flag):
        raise ConfigError("the model is named twice; give MODEL or --model MODEL, not both.")
    if options.model is None:
        options.model = options.model_flag


def _serve(options: argparse.Namespace) -> int:
    engine, server = _serve_settings(options)
    logs.take_stderr()
    _announce(engine)
    from minisrv.processes import process_began
    from minisrv.progress import StartupClock
    from minisrv.server.launcher import serve

    return serve(engine, server, StartupClock(process_began()))


def _serve_settings(options: argparse.Namespace) -> tuple[EngineConfig, ServerConfig]:
    options.api_keys = (*(options.api_keys or ()), *_more_keys(options.api_key_file))
    return _settings(EngineConfig, options), _settings(ServerConfig, options)


def _announce(config: EngineConfig) -> None:
    """Log the first line, before any import that takes long."""
    model = config.model or "the default model"
    logger.info("minisrv %s: %s, device %s", __version__, model, config.device)


def _more_keys(file: Path | None) -> list[str]:
    """Return the API keys that are not on the command line: those of the environment variable and
    of `file`. Raises ConfigError if one of the two holds no key or cannot be read."""
    keys = []
    if (key := os.environ.get(API_KEY_VARIABLE)) is not None:
        if not key.strip():  # without this, a secret that was not filled in would let everybody in
            raise ConfigError(f"{API_KEY_VARIABLE} is set and empty; give it a key, or unset it.")
        keys.append(key)
    if file is not None:
        lines = read_text("--api-key-file", file).splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {file} holds no key; put one in each line.")
        keys += found
    return keys


def _plan(options: argparse.Namespace) -> int:
    config = _settings(EngineConfig, options)
    if options.measure:
        _announce(config)
    from minisrv.tools.batch_answers import Batch
    from minisrv.tools.plan import print_measured_plan, print_plan

    batches = [Batch.parse(text) for text in options.batch or ()]
    show = print_measured_plan if options.measure else print_plan
    show(config, batches)
    return 0


def _ladder(options: argparse.Namespace) -> int:
    ladder = _settings(LadderConfig, options)
    from minisrv.tools.batch_answers import Batch
    from minisrv.tools.batch_sources import read_server, read_trace
    from minisrv.tools.ladder import run_ladder

    batches = [Batch.parse(text) for text in options.batch or ()]
    source = None
    if ladder.trace is not None:
        source = read_trace(ladder.trace)
    elif ladder.url is not None:
        source = read_server(ladder.url, os.environ.get(API_KEY_VARIABLE))
    for name, value in (source.settings if source is not None else {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    config = _settings(EngineConfig, options)
    if ladder.measure:
        _announce(config)
    run_ladder(config, ladder, source, batches)
    return 0


def _certify(options: argparse.Namespace) -> int:
    config = _settings(EngineConfig, options)
    _announce(config)
    try:
        from minisrv.tools.certify import run_certify

        return run_certify(config, options.json, options.break_graph)
    except KeyboardInterrupt:
        raise GraphError("interrupted: not every graph has been certified.") from None


def _compile(options: argparse.Namespace) -> int:
    config = _settings(EngineConfig, options)
    _announce(config)
    try:
        from minisrv.tools.compile import run_compile

        return run_compile(config)
    except KeyboardInterrupt:
        raise CompilationError("interrupted: the model has not been compiled.") from None


def _bench(options: argparse.Namespace) -> int:
    engine, measurement = _settings(EngineConfig, options), _settings(BenchConfig, options)
    _announce(engine)
    from minisrv.tools.bench import bench

    bench(engine, measurement)
    return 0


def _launch_cost(options: argparse.Namespace) -> int:
    engine, measurement = _settings(EngineConfig, options), _settings(BenchConfig, options)
    _announce(engine)
    from minisrv.tools.launch_cost import launch_cost

    launch_cost(engine, measurement)
    return 0


def _trace(options: argparse.Namespace) -> int:
    config = _settings(TraceConfig, options)
    if options.view:
        if config != TraceConfig():
            raise ConfigError("--view shows files, and the other flags are for recording one.")
        from minisrv.tools.view import view

        return view(options.files)
    if len(options.files) > 1:
        raise ConfigError("one file is recorded at a time; --view shows two.")
    from minisrv.tools.trace import record

    try:
        record(config, options.files[0], os.environ.get(API_KEY_VARIABLE))
    except BrokenPipeError:  # the process that reads the lines has closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _chat(options: argparse.Namespace) -> int:
    chat = _settings(ChatConfig, options)
    if len((options.model or "").split()) > 1 and not Path(options.model).exists():
        raise ConfigError(f"MODEL {options.model!r} looks like a message; ask it with --quick.")
    if chat.url is not None:
        _refuse_engine_flags(options)
    from minisrv.chat.terminal import Terminal, single_message

    message = single_message(chat)
    model = _model_of_chat(chat, options)
    try:
        terminal = Terminal(model, chat)
        terminal.converse() if message is None else terminal.answer(message)
        sys.stdout.flush()
    except BrokenPipeError:  # the process that reads the answer has closed its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _model_of_chat(chat: ChatConfig, options: argparse.Namespace) -> Model:
    if chat.url is not None:
        from minisrv.chat.remote import RemoteModel

        return RemoteModel(chat.url, options.model, os.environ.get(API_KEY_VARIABLE), chat)
    if options.max_num_seqs is None:
        options.max_num_seqs = 1  # so that few graphs are captured
    config = _settings(EngineConfig, options)
    _announce(config)
    from minisrv.chat.local import LocalModel

    return LocalModel(config, chat)


def _refuse_engine_flags(options: argparse.Namespace) -> None:
    names = [field.name for field in fields(EngineConfig) if field.name != "model"]
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        flags = ", ".join(map(flag_name, given))
        raise ConfigError(f"{flags}: the server at --url runs the model; give it the flag.")


def engine_config(arguments: Sequence[str]) -> EngineConfig:
    """Return the settings that `minisrv serve` would have with these engine flags, MODEL included.
    For programs that pass such flags on. Raises ConfigError; exits with status 2 for a flag that
    does not exist."""
    parser = CommandParser(add_help=False)
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    _name_model(options)
    return _settings(EngineConfig, options)


def serve_settings(arguments: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """Return the settings that `minisrv serve` would have with these flags, MODEL included, and the
    API keys of the environment. For programs that serve in another way. Raises ConfigError, also
    for a flag that does not exist."""
    parser = _RaisingParser(add_help=False)
    _add_serve_flags(parser)
    options = parser.parse_args(arguments)
    _name_model(options)
    return _serve_settings(options)


class _RaisingParser(CommandParser):
    """A parser for programs, which raises ConfigError where a command would end."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _settings(kind: type[_T], options: argparse.Namespace) -> _T:
    """Return an instance of the settings class `kind` with the flags that were given; the other
    fields have the defaults of the class."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in vars(options).items() if k in names and v is not None})


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="minisrv", description="A small LLM inference server with graph-aware batching."
    )
    parser.add_argument("--version", action="version", version=f"minisrv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible endpoint",
        description="Serve a Hugging Face checkpoint. Without a model, the embedded default one.",
    )
    _add_serve_flags(serve)
    serve.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help=f"json: an object in a line (default ${logs.VARIABLE}, else {logs.FORMATS[0]})",
    )
    serve.set_defaults(run=_serve)

    plan = commands.add_parser(
        "plan",
        help="print which batch runs by which graph, without loading a model",
        description="Print, for every batch size up to the limits, the mode, the padded size and "
        "the reason. Exits 1 if a decode batch is left without its graph.",
    )
    add_engine_flags(plan)
    plan.add_argument(
        "--measure",
        action="store_true",
        help="start the engine as `serve` does, and print the milliseconds and MiB of each graph",
    )
    _add_batch(plan)
    plan.set_defaults(run=_plan)

    ladder = commands.add_parser(
        "ladder",
        help="find the capture sizes that fit the batches of a server best",
        description="Read which batches a server has had, from a step trace or from its metrics, "
        "or assume some; print what they cost by the ladders there are and by the best ones for a "
        "number of graphs, which is found exactly, what more or fewer graphs would change, and the "
        "flag that sets the sizes.",
    )
    add_engine_flags(ladder)
    flags = SettingsFlags(ladder, LadderConfig)
    flags.group("ladder")
    flags.add("trace")
    flags.add_as("url", metavar="URL")
    flags.add_as("assume", metavar="BATCHES")
    flags.add("num_graphs", "num_sizes")
    flags.add_as("graph_memory", type=size, metavar="BYTES[K|M|G]")
    flags.add("measure", "json", "plot")
    _add_batch(ladder)
    ladder.set_defaults(run=_ladder)

    certify = commands.add_parser(
        "certify",
        help="compare every graph with eager runs, on every kind of batch",
        description="Start the engine as `serve` does, then replay every graph on short, "
        "block-edge and maximal lengths, on every composition of a batch, with poisoned padding "
        "and behind stale tails. Exits 1 if a graph differs from the eager run.",
    )
    add_engine_flags(certify)
    certify.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    certify.add_argument(
        "--break-graph",
        type=Fault,
        choices=tuple(Fault),
        metavar="|".join(Fault),
        help="break one graph in memory on purpose before it is certified, to see how the fault "
        "is found; the exit status is 1 if it is",
    )
    certify.set_defaults(run=_certify)

    compile_ = commands.add_parser(
        "compile",
        help="compile a model, and on a GPU its kernels, before it is served",
        description="Compile a model as `serve` does with --compilation-mode 3, unless the cache "
        "has it, certify the compiled code, and end. Give it the flags of `serve`: some of them "
        "are part of what is compiled. Exits 1 if the compiled code would not serve. On a GPU the "
        "kernels are compiled as well, and for code that `serve` would not compile only they are.",
    )
    add_engine_flags(compile_)
    compile_.set_defaults(run=_compile)

    bench = commands.add_parser(
        "bench",
        help="measure engine steps eagerly, by PIECEWISE and by FULL graphs, by turns",
        description="Load a model once and time whole engine steps in this process, with the same "
        "weights, the modes by turns in the order A B C C B A. All engine flags apply; FULL and "
        "PIECEWISE graphs are compared with eager steps, for decode by batch and for prefill. With "
        "a --compilation-mode, each of them is measured by compiled code too.",
    )
    add_engine_flags(bench)
    _add_measurement(bench)
    bench.set_defaults(run=_bench)

    launch_cost = commands.add_parser(
        "launch-cost",
        help="measure what launches cost, and where eager steps meet graphs",
        description="Measure as `bench` does what the host needs for the launches of a step, "
        "predict from it and from the time of graphs how long eager steps take, and print and plot "
        "that beside their measured times: why a graph helps small decode batches, and hardly "
        "helps long prompts. On a CPU, --simulate-launch-us shows a GPU's launches.",
    )
    add_engine_flags(launch_cost)
    _add_measurement(launch_cost)
    launch_cost.set_defaults(run=_launch_cost)

    chat = commands.add_parser(
        "chat",
        help="chat in the terminal, with a server or with a model in this process",
        description="Chat with a model in this process, or with --url behind a server; MODEL is "
        "then one of the server's names. A message on stdin, or of --quick, is answered and no "
        "other.",
    )
    flags = SettingsFlags(chat, ChatConfig)
    flags.group("chat")
    flags.add_as("url", metavar="URL")
    flags.add_as("quick", "-q", "--quick", metavar="MESSAGE")
    flags.add("system_prompt", "temperature", "max_tokens")
    add_engine_flags(chat)
    chat.set_defaults(run=_chat)

    trace = commands.add_parser(
        "trace",
        help="record the steps of a running server to a file, or show such files",
        description="Record by which graph each step of a server ran and why, which requests took "
        "part, what was padding and how long it took, as lines of JSON (docs/trace.md). Ctrl-C "
        "ends the recording with a whole line.",
    )
    trace.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="the file to write; - is stdout"
    )
    trace.add_argument(
        "--view",
        action="store_true",
        help="show FILE in a browser, or two of them side by side, until Ctrl-C",
    )
    flags = SettingsFlags(trace, TraceConfig)
    flags.group("recording")
    flags.add_as("url", metavar="URL")
    flags.add("last", "seconds", "steps")
    trace.set_defaults(run=_trace, model=None, model_flag=None)

    for command in commands.choices.values():
        command.commands = commands.choices
    return parser


def _add_serve_flags(parser: CommandParser) -> None:
    """Add the flags that `_serve_settings` reads."""
    add_engine_flags(parser)
    add_server_flags(parser)
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"a file with an API key in each line; ${API_KEY_VARIABLE} may hold one too",
    )


def _add_batch(command: CommandParser) -> None:
    """Add the flag that asks about single batches."""
    command.add_argument(
        "--batch",
        action="append",
        metavar="BATCH",
        help="say in one line by which graph this batch runs, and nothing else: decode:33 for 33 "
        "requests, mixed:100+8 for 100 prompt tokens beside 8 requests that decode; :logprobs or "
        ":grammar behind it for a batch in which a request has these. May be given several times",
    )


def _add_measurement(command: CommandParser) -> None:
    """Add the flags that are fields of `BenchConfig`."""
    measurement = SettingsFlags(command, BenchConfig)
    measurement.group("measurement")
    measurement.add("batch_sizes", "context", "rounds", "json", "plot")


if __name__ == "__main__":
    sys.exit(main())

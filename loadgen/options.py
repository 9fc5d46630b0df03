"""The options of the `loadgen` command.

Knows: argparse, how each option is written, and which go together. Knows nothing of what is done
with them.
"""

import argparse
import secrets
from collections.abc import Callable
from importlib.util import find_spec
from math import inf
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeVar

import msgspec

from loadgen import ab, lengths
from loadgen.errors import ConfigError
from loadgen.lengths import MAX_LENGTH
from loadgen.records import (
    DEFAULT_CONCURRENCIES,
    DEFAULT_MAX_CONCURRENCY,
    DEFAULT_OPEN_S,
    MAX_DURATION_S,
    MAX_REQUESTS,
    MIN_DEFAULT_REQUESTS,
    OPEN_PROCESSES,
    OPEN_WARMUP,
    STREAMS_PER_PROCESS,
    Objective,
    PromptKind,
)
from loadgen.slo import LATENCIES

_MAX_CONCURRENCY = 10_000
_MAX_ID = 2**31
_MAX_REPEATS = 100
_MAX_PROCESSES = 256
_MAX_SERVERS = len(ascii_uppercase)
_MAX_RATE = 100_000
_SEEDS = 2**32

T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="loadgen",
        description="Load an OpenAI-compatible server and measure how it answers.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = (
        "Exit status: 0; 1 if a request failed, warm-up included, or too few met --slo{}; 2 if a "
        "server or an option cannot be used; 130 if interrupted."
    )
    run = commands.add_parser(
        "run",
        help="load one server: closed loops, open loops, or a trace",
        description="For each concurrency in turn, keep that many streaming requests in flight; "
        "for each request rate in turn, send requests when they are due; or replay a trace. Print "
        "TTFT, ITL, TPOT, E2E and throughput, and their formulas.",
        epilog=status.format(""),
    )
    run.add_argument("url", metavar="URL", help="http://host:port, with or without /v1")
    _add_options(run)

    compare = commands.add_parser(
        "ab",
        help="servers beside each other",
        description="Send the same requests to several servers in turn, and print their ITL, TTFT "
        "and throughput, the ratios to the first with bootstrap intervals, whether the answers are "
        "the same, and which server won by how much. All are up all the time and one at a time is "
        "asked, so they must fit the machine together and rest when idle.",
        epilog=status.format(", or answers differ under --require-identical"),
    )
    text = (
        "URL of a server, or the command line of one to start, one word to the shell; {port} in it "
        "stands for the port it is given, else --host and --port are appended"
    )
    compare.add_argument("servers", metavar="SERVER", nargs="+", help=text)
    option = compare.add_argument_group("comparison").add_argument
    text = "what to call the servers (default: A B ...)"
    option("--labels", nargs="+", metavar="LABEL", help=text)
    text = f"runs of each server at each level, at least {ab.MIN_REPEATS} (default: %(default)s)"
    repeats = _integer(ab.MIN_REPEATS, _MAX_REPEATS)
    option("--repeats", type=repeats, default=6, metavar="N", help=text)
    text = "seconds that a server may take to be ready (default: %(default)g)"
    option(
        "--ready-timeout", type=_number(0, MAX_DURATION_S), default=900.0, metavar="S", help=text
    )
    option("--require-identical", action="store_true", help="exit with 1 if answers differ")
    _add_options(compare)
    return parser


def settle(arguments: argparse.Namespace) -> None:
    """Fill in the seed, the concurrencies and the servers' labels if they were not given, once for
    all servers. Raises ConfigError for options that cannot go together."""
    if arguments.command == "ab":
        _settle_servers(arguments)
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(_SEEDS)
    requests = MAX_REQUESTS if arguments.requests is None else arguments.requests
    is_open = arguments.request_rate is not None or arguments.trace is not None
    if arguments.concurrency is None:
        default = () if is_open else DEFAULT_CONCURRENCIES
        arguments.concurrency = [[value for value in default if value <= requests]]
    if arguments.trace is not None:
        _check_trace(arguments)
    _check_needs(arguments)
    most = max((value for group in arguments.concurrency for value in group), default=0)
    if most > requests:
        raise ConfigError(
            f"--concurrency {most} is out of reach with --requests {requests}: each request in "
            f"flight is one of them; ask for --requests {most} or more, or a lower --concurrency"
        )


def _settle_servers(arguments: argparse.Namespace) -> None:
    count = len(arguments.servers)
    if not 2 <= count <= _MAX_SERVERS:
        raise ConfigError(f"ab compares 2 to {_MAX_SERVERS} servers, not {count}")
    if arguments.labels is None:
        arguments.labels = list(ascii_uppercase[:count])
    if len(arguments.labels) != count:
        raise ConfigError(f"{len(arguments.labels)} --labels for {count} servers")


def _check_needs(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if an option is given that would do nothing without another."""
    rate, trace = arguments.request_rate is not None, arguments.trace is not None
    needs = (
        ("--burstiness", arguments.burstiness != 1.0, "--request-rate", rate),
        ("--ramp-up", arguments.ramp_up != 0.0, "--request-rate", rate),
        (
            "--max-concurrency",
            arguments.max_concurrency != DEFAULT_MAX_CONCURRENCY,
            "--request-rate or --trace",
            rate or trace,
        ),
        ("--trace-speedup", arguments.trace_speedup != 1.0, "--trace", trace),
        ("--num-prefixes", arguments.num_prefixes != 1, "--prefix-tokens", arguments.prefix_tokens),
        (
            "--turns",
            arguments.turns != 1,
            "--prompt-kind chat",
            arguments.prompt_kind == PromptKind.CHAT,
        ),
        (
            "--capture-sizes",
            arguments.capture_sizes,
            "--plot or --html",
            arguments.plot or arguments.html,
        ),
    )
    for name, given, needed, there in needs:
        if given and not there:
            raise ConfigError(f"{name} does nothing without {needed}")


def _check_trace(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if options say what the trace says already."""
    given = {
        "--concurrency": arguments.concurrency != [[]],
        "--request-rate": arguments.request_rate is not None,
        "--prefix-tokens": arguments.prefix_tokens != 0,
        "--turns": arguments.turns != 1,
    }
    if clash := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"--trace says what {' and '.join(clash)} would: give one of them")


def _add_options(command: argparse.ArgumentParser) -> None:
    """Add the options on the load, the requests and the output."""
    count = _integer(1, MAX_REQUESTS)
    kinds = [str(kind) for kind in PromptKind]

    load = command.add_argument_group("load").add_argument
    text = (
        "requests in flight; values separated by spaces or commas, none above --requests "
        f"(default: {','.join(map(str, DEFAULT_CONCURRENCIES))}, as far as --requests goes)"
    )
    several = _several(_integer(1, _MAX_CONCURRENCY))
    load("--concurrency", type=several, nargs="+", metavar="N", help=text)
    text = (
        "requests per second of an open loop; values separated by spaces or commas, each a level. "
        "Requests are sent when they are due, and latencies count from then"
    )
    rates = _several(_number(0, _MAX_RATE))
    load("--request-rate", type=rates, nargs="+", metavar="RPS", help=text)
    text = (
        "shape of the gamma distribution of the gaps between requests: 1 is a Poisson process, "
        "less is burstier, inf gives equal gaps (default: %(default)g)"
    )
    load("--burstiness", type=_number(0, inf), default=1.0, metavar="SHAPE", help=text)
    text = "seconds in which the request rate grows linearly from 0 (default: none)"
    load("--ramp-up", type=_number(0, MAX_DURATION_S), default=0.0, metavar="S", help=text)
    text = "requests in flight at most in an open loop; more are sent late (default: %(default)s)"
    most = _integer(1, _MAX_CONCURRENCY)
    default_most = DEFAULT_MAX_CONCURRENCY
    load("--max-concurrency", type=most, default=default_most, metavar="N", help=text)
    text = (
        "replay the arrivals and lengths of FILE: JSONL with Mooncake's fields timestamp (ms), "
        "input_length, output_length and hash_ids, or Azure's .csv"
    )
    load("--trace", type=_existing, metavar="FILE", help=text)
    text = "replay the trace so many times as fast (default: %(default)g)"
    load("--trace-speedup", type=_number(0, 1e6), default=1.0, metavar="X", help=text)
    text = (
        "requests measured at each level, or chats if they have several turns (default: 4 for "
        f"each in flight, at least {MIN_DEFAULT_REQUESTS}; {DEFAULT_OPEN_S:g} s of an open loop; "
        "the whole trace; no limit of its own if --duration is given)"
    )
    load("--requests", type=count, metavar="N", help=text)
    text = (
        "start no request after S seconds of one level, and in an open loop none that is due "
        "later; what is in flight may end "
        f"(default: {MAX_DURATION_S:.0f})"
    )
    load("--duration", type=_number(0, MAX_DURATION_S), metavar="S", help=text)
    text = (
        "requests sent first at each level, not measured (default: the concurrency, or "
        f"{OPEN_WARMUP} for an open loop)"
    )
    load("--warmup", type=_integer(0, MAX_REQUESTS), metavar="N", help=text)
    text = (
        "client processes that share the requests in flight, at most one for each (default: one "
        f"for each {STREAMS_PER_PROCESS} in flight, or {OPEN_PROCESSES} in an open loop, at most "
        "the cores)"
    )
    load("--processes", type=_integer(1, _MAX_PROCESSES), metavar="N", help=text)
    text = "seconds that one request may take (default: %(default)g)"
    load("--timeout", type=_number(0, MAX_DURATION_S), default=300.0, metavar="S", help=text)

    request = command.add_argument_group("requests").add_argument
    request("--model", help="default: the first that the server lists")
    text = (
        "random token ids or random words to /completions, or words to /chat/completions "
        "(default: the first of these that the server takes)"
    )
    request("--prompt-kind", choices=kinds, help=text)
    text = (
        "token ids, or words, in each prompt: N, or drawn from uniform:LOW:HIGH, "
        "normal:MEAN:STDDEV[:MAX] or lognormal:MEAN:STDDEV[:MAX] (default: %(default)s)"
    )
    request("--input-tokens", type=_length, default=128, metavar="N", help=text)
    text = "token ids are drawn from LOW up to but not including HIGH (default: 100:1000)"
    default = (100, 1000)
    request("--token-range", type=_token_range, default=default, metavar="LOW:HIGH", help=text)
    text = "max_tokens of each request, written as --input-tokens (default: %(default)s)"
    request("--output-tokens", type=_length, default=64, metavar="N", help=text)
    text = "tokens, or words, of a prefix that prompts share, before --input-tokens (default: none)"
    request("--prefix-tokens", type=_integer(0, MAX_LENGTH), default=0, metavar="N", help=text)
    text = "such prefixes, of which each prompt has one (default: %(default)s)"
    request("--num-prefixes", type=_integer(1, MAX_REQUESTS), default=1, metavar="N", help=text)
    text = (
        "requests of each chat, written as --input-tokens: each holds those before it and their "
        "answers (default: %(default)s)"
    )
    request("--turns", type=_length, default=1, metavar="N", help=text)
    text = (
        "send ignore_eos, an extension; without it answers may be shorter than --output-tokens "
        "(default: send it unless the server refuses it)"
    )
    request("--ignore-eos", action=argparse.BooleanOptionalAction, help=text)
    text = (
        "ask for token ids, an extension that some servers refuse: tokens without text are then "
        "timed too, and `ab` compares answers by tokens (default: in `ab`, unless a server refuses "
        "it)"
    )
    request("--return-token-ids", action=argparse.BooleanOptionalAction, help=text)
    text = (
        "of the prompts: the seed that a report names sends the same again, which the server may "
        "have in its prefix cache by then (default: drawn anew)"
    )
    request("--seed", type=_integer(0, _SEEDS - 1), metavar="N", help=text)
    request("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY, if set")

    text = "a JSON object whose fields are added to each request"
    request("--extra-body", type=_json_object, default={}, metavar="JSON", help=text)

    output = command.add_argument_group("output").add_argument
    text = (
        "limits in ms that a request must meet to count for goodput, of "
        f"{', '.join(LATENCIES)}; for example ttft:200 itl:50. The exit status is 1 if too few do"
    )
    limits = _several(_objective)
    output("--slo", type=limits, nargs="+", metavar="LATENCY:MS", help=text)
    text = "share of the requests that must meet the limits of --slo (default: %(default)g)"
    output("--slo-attainment", type=_number(0, 1), default=0.99, metavar="SHARE", help=text)
    text = "write a line of JSON for each request, with the time of each token, to FILE"
    output("--jsonl", type=_file, metavar="FILE", help=text)
    output("--json", type=_file, metavar="FILE", help="write everything to FILE")
    text = "draw latencies by load, and ITL by batch, to FILE, .svg or .png; needs matplotlib"
    output("--plot", type=_picture, metavar="FILE", help=text)
    text = "write the tables and the picture to FILE, an HTML page that stands alone"
    output("--html", type=_page, metavar="FILE", help=text)
    text = "batch sizes of captured graphs, to be marked in the picture"
    sizes = _several(count)
    output("--capture-sizes", type=sizes, nargs="+", default=[], metavar="N", help=text)
    output("--label", default="", metavar="TEXT", help="a name for this run")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low}..{high}")
        return value

    return parse


def _several(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a parser of comma-separated values, at least one."""
    return lambda text: [parse(part) for part in text.rstrip(",").split(",")]


def _number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers above `low` and up to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in ({low:g}, {high:g}]")
        return value

    return parse


def _length(text: str) -> lengths.Length:
    try:
        return lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _objective(text: str) -> Objective:
    latency, _, limit = text.partition(":")
    if latency not in LATENCIES:
        raise argparse.ArgumentTypeError(f"{latency!r} is none of {', '.join(LATENCIES)}")
    return Objective(latency, _number(0, MAX_DURATION_S * 1e3)(limit))


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"no JSON object: {error}") from None


def _existing(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def _file(text: str) -> Path:
    """Parse the path of a file to write. One that cannot be written is refused before the run, not
    after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a file in an existing directory")
    return path


def _picture(text: str) -> Path:
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"{text}: neither .svg nor .png")
    return _page(text)


def _page(text: str) -> Path:
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return _file(text)


def _token_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    parse = _integer(0, _MAX_ID)
    bounds = parse(low), parse(high)
    if bounds[0] >= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range")
    return bounds

"""The `loadgen` command: turns options into a run, and its outcome into the exit status.

Knows: argparse and the order of a run. Does not measure, compute or print results itself.
"""

import argparse
import asyncio
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from math import inf
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from loadgen import ab, lengths, traces
from loadgen.client import find_model, simulated_launch_us
from loadgen.errors import ConfigError, LoadgenError
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
    Leg,
    Objective,
    PromptKind,
    RunConfig,
    Trace,
)
from loadgen.report import (
    ComparisonReport,
    Environment,
    LevelReport,
    ProgressBar,
    Report,
    print_comparison,
    print_report,
    write_json,
)
from loadgen.rows import MAX_RAW_ROWS, RawRows, RequestLines
from loadgen.runner import run_legs
from loadgen.servers import Server
from loadgen.slo import LATENCIES
from loadgen.stats import LevelSummary, simulated, summarize

EXIT_OK = 0
EXIT_FAILED_REQUESTS = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130

_MAX_CONCURRENCY = 10_000
_MAX_ID = 2**31
_MAX_REPEATS = 100
_MAX_SERVERS = len(ascii_uppercase)
_MAX_PROCESSES = 256
_MAX_RATE = 100_000
_SEEDS = 2**32

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    _open_standard_descriptors()
    arguments = _parser().parse_args(argv)
    try:
        _settle(arguments)
        return _run(arguments) if arguments.command == "run" else _ab(arguments)
    except LoadgenError as error:
        _say(str(error))
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        _say("interrupted; what was measured until then is shown")
        return EXIT_INTERRUPTED


def _open_standard_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0 to 2 that is closed. Otherwise a connection or a
    file would get its number, and with it the output of this process or of a client process."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def _say(text: str) -> None:
    """Print a message about the run to stderr. A run does not end if stderr cannot be written."""
    try:
        print(f"loadgen: {text}", file=sys.stderr, flush=True)
    except OSError:  # at exit Python would flush again, fail, and change the exit status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _settle(arguments: argparse.Namespace) -> None:
    """Fill in the seed and the concurrencies if they were not given, once for all servers. Raises
    ConfigError for options that cannot go together."""
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(_SEEDS)
    requests = MAX_REQUESTS if arguments.requests is None else arguments.requests
    is_open = arguments.request_rate is not None or arguments.trace is not None
    if arguments.concurrency is None:
        default = () if is_open else DEFAULT_CONCURRENCIES
        arguments.concurrency = [[value for value in default if value <= requests]]
    if arguments.trace is not None:
        _check_trace(arguments)
    if arguments.request_rate is None and (arguments.burstiness, arguments.ramp_up) != (1.0, 0.0):
        raise ConfigError("--burstiness and --ramp-up need --request-rate")
    if arguments.turns != 1 and arguments.prompt_kind != PromptKind.CHAT:
        raise ConfigError("--turns needs --prompt-kind chat: answers become part of later requests")
    most = max((value for group in arguments.concurrency for value in group), default=0)
    if most > requests:
        raise ConfigError(
            f"--concurrency {most} is out of reach with --requests {requests}: each request in "
            f"flight is one of them; ask for --requests {most} or more, or a lower --concurrency"
        )


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


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments, normalize_url(arguments.url), arguments.label)
    config = replace(config, return_token_ids=bool(arguments.return_token_ids))
    launch_us = asyncio.run(simulated_launch_us(config.base_url, _api_key(arguments)))
    environment = Environment.here()
    levels: list[LevelReport] = []
    stopped: LoadgenError | KeyboardInterrupt | None = None
    try:
        legs = Leg.of(config)
        with ProgressBar() as bar, RequestLines(arguments.jsonl) as lines:
            for level in lines.written(legs, run_legs(legs, _api_key(arguments), bar)):
                raw = RawRows.of(level, max(1, MAX_RAW_ROWS // len(config.loads)))
                levels.append(LevelReport(summarize(level), raw))
    except (LoadgenError, KeyboardInterrupt) as error:
        if not levels:
            raise
        stopped = error
    report = Report(
        complete=stopped is None,
        simulated=simulated(launch_us),
        config=config,
        environment=environment,
        levels=levels,
    )
    print_report(report)
    _write(arguments, report)
    if stopped is not None:
        raise stopped
    return _status([level.summary for level in levels], arguments.slo_attainment)


def _write(arguments: argparse.Namespace, report: Report | ComparisonReport) -> None:
    """Write the files of a report that are asked for."""
    if arguments.json is not None:
        write_json(report, arguments.json)
    if arguments.plot is None and arguments.html is None:
        return
    from loadgen import plot
    from loadgen.page import write_page

    sizes = [value for group in arguments.capture_sizes for value in group]
    figure = plot.draw(report, sizes)
    if arguments.plot is not None:
        plot.save(figure, arguments.plot)
    if arguments.html is not None:
        write_page(report, plot.svg(figure), arguments.html)


def _ab(arguments: argparse.Namespace) -> int:
    labels = arguments.labels or list(ascii_uppercase)
    if not 2 <= len(arguments.servers) <= _MAX_SERVERS:
        raise ConfigError(f"ab compares 2 to {_MAX_SERVERS} servers, not {len(arguments.servers)}")
    if arguments.labels and len(labels) != len(arguments.servers):
        raise ConfigError(f"{len(labels)} --labels for {len(arguments.servers)} servers")
    # NOTE: these signals must raise KeyboardInterrupt, so that the servers, which are children of
    # this process, are ended with it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, e.g., has SIGHUP ignored
            signal.signal(number, signal.default_int_handler)
    environment = Environment.here()
    try:
        logs = Path(tempfile.mkdtemp(prefix="loadgen-ab-"))
    except OSError as error:
        raise ConfigError(f"no place for the servers' logs: {error}; set TMPDIR to one") from None
    with ExitStack() as stack:
        servers: list[Server] = []
        sides: list[ab.Side] = []
        for at, (label, given) in enumerate(zip(labels, arguments.servers, strict=False)):
            if given.startswith(("http://", "https://")):
                sides.append(_side(arguments, label, given, None))
                continue
            server = Server(label, given, logs / f"{at}.log")
            servers.append(stack.enter_context(server))
            sides.append(_side(arguments, label, server.url, server))
        lines = stack.enter_context(RequestLines(arguments.jsonl))
        levels, stopped = _compare(sides, servers, lines, _api_key(arguments))
    if not levels and stopped is not None:
        raise stopped
    report = ComparisonReport(
        complete=stopped is None,
        label=arguments.label,
        simulated=simulated(*(side.simulated_launch_us for side in sides)),
        verdict=ab.verdict([side.label for side in sides], levels),
        sides=sides,
        environment=environment,
        levels=levels,
    )
    print_comparison(report)
    _write(arguments, report)
    if stopped is not None:
        raise stopped
    same = [level.agreement(side) for level in levels for side in range(1, len(sides))]
    if arguments.require_identical and any(x != y for x, y in same):
        _say("answers differ, so the exit status is 1")
        return EXIT_FAILED_REQUESTS
    runs = [run for level in levels for repeat in level.repeats for run in repeat.runs]
    return _status(runs, arguments.slo_attainment)


def _side(arguments: argparse.Namespace, label: str, url: str, server: Server | None) -> ab.Side:
    """Return one side of the comparison, with the configuration of its runs, once the server is
    ready and has all its graphs if it was started here."""
    ready_s = None
    if server is not None:
        _say(f"starting {label}; its log is {server.log}")
        ready_s = server.wait_ready(arguments.ready_timeout)
        _say(f"{label} is ready after {ready_s:.1f} s")
        server.wait_whole(arguments.ready_timeout)
    config = _config(arguments, normalize_url(url), label)
    config = replace(
        config,
        repeats=arguments.repeats,
        keep_answers=True,
        return_token_ids=arguments.return_token_ids is not False,
    )
    launch_us = asyncio.run(simulated_launch_us(config.base_url, _api_key(arguments)))
    return ab.Side(label, server.command if server else None, ready_s, launch_us, config)


def _compare(
    sides: Sequence[ab.Side], servers: Sequence[Server], lines: RequestLines, api_key: str | None
) -> tuple[list[ab.Level], LoadgenError | KeyboardInterrupt | None]:
    """Run all repeats, and return their results by concurrency, and None; or, if an error or an
    interrupt stopped them, the results until then, and that exception."""

    class WatchingBar(ProgressBar):
        """A progress bar that ends the runs once a server has ended, so that requests which nobody
        answers are not counted as failures."""

        def update(self, done: int, failed: int, share: float) -> None:
            super().update(done, failed, share)
            for server in servers:
                server.check()

    repeats: list[ab.Repeat] = []
    stopped: LoadgenError | KeyboardInterrupt | None = None
    try:
        legs = ab.order(*(side.config for side in sides))
        with WatchingBar() as bar, closing(run_legs(legs, api_key, bar)) as runs:
            for repeat in ab.repeats(lines.written(legs, runs), len(sides)):
                repeats.append(repeat)  # noqa: PERF402  (repeats before an error are kept)
        for server in servers:
            server.check()
    except (LoadgenError, KeyboardInterrupt) as error:
        stopped = error
    return ab.Level.of(repeats), stopped


def _status(runs: Sequence[LevelSummary], attainment: float) -> int:
    """Return the exit status of complete runs.

    attainment: the share of the requests of each run that must meet all limits.
    """
    status = EXIT_OK
    if any(run.any_failed for run in runs):
        _say("requests failed, so the exit status is 1")
        status = EXIT_FAILED_REQUESTS
    missing = [run for run in runs if run.goodput and run.goodput.attainment < attainment]
    if missing:
        loads = ", ".join(dict.fromkeys(str(run.load) for run in missing))
        _say(
            f"fewer than {attainment:.6g} of the requests met the limits of --slo at {loads}, so "
            "the exit status is 1"
        )
        status = EXIT_FAILED_REQUESTS
    return status


def _config(arguments: argparse.Namespace, base_url: str, label: str) -> RunConfig:
    """Return the configuration of the runs that the options ask for, against the server at
    `base_url`; the name of its model is looked up there."""
    trace = None
    if arguments.trace is not None:
        path = str(arguments.trace)
        trace = Trace(path, len(traces.read(path)), arguments.trace_speedup)
    model = find_model(base_url, _api_key(arguments), arguments.model, arguments.timeout)
    return RunConfig(
        base_url=base_url,
        model=asyncio.run(model),
        concurrencies=tuple(value for group in arguments.concurrency for value in group),
        prompt_kind=PromptKind(arguments.prompt_kind),
        input_tokens=arguments.input_tokens,
        token_range=arguments.token_range,
        output_tokens=arguments.output_tokens,
        ignore_eos=arguments.ignore_eos,
        requests=arguments.requests,
        duration_s=arguments.duration,
        warmup=arguments.warmup,
        processes=arguments.processes,
        seed=arguments.seed,
        timeout_s=arguments.timeout,
        label=label,
        request_rates=tuple(value for group in arguments.request_rate or () for value in group),
        burstiness=arguments.burstiness,
        ramp_up_s=arguments.ramp_up,
        max_concurrency=arguments.max_concurrency,
        trace=trace,
        prefix_tokens=arguments.prefix_tokens,
        num_prefixes=arguments.num_prefixes,
        turns=arguments.turns,
        objectives=tuple(value for group in arguments.slo or () for value in group),
        extra_body=arguments.extra_body,
    )


def _api_key(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key or os.environ.get("OPENAI_API_KEY")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError(
            "the API key has characters that no header can carry: check --api-key or "
            "$OPENAI_API_KEY for line ends and letters outside ASCII"
        )
    return key


def normalize_url(url: str) -> str:
    """Return the base URL, ending in /v1, for http://host:port, http://host:port/v1 or host:port.
    Raises ConfigError."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        parts.port  # noqa: B018  (reading this property raises for a bad port)
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no http or https URL")
    if not url.isascii():
        raise ConfigError(f"{url!r} is not ASCII: write the host in punycode and quote the path")
    if parts.query or parts.fragment:
        raise ConfigError("the URL may not have a query or a fragment")
    if parts.username is not None:
        raise ConfigError("the URL may not hold credentials; see --api-key")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _parser() -> argparse.ArgumentParser:
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
        "(default: %(default)s)"
    )
    request("--prompt-kind", choices=kinds, default=kinds[0], help=text)
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
        "do not send ignore_eos, an extension that some servers refuse; answers may then be "
        "shorter than --output-tokens"
    )
    request("--no-ignore-eos", dest="ignore_eos", action="store_false", help=text)
    text = (
        "ask for token ids, an extension that some servers refuse: tokens without text are then "
        "timed too, and `ab` compares answers by tokens (default: in `ab` only)"
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

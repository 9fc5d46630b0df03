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
from pathlib import Path
from urllib.parse import urlsplit

from msgspec.structs import replace

from loadgen import ab
from loadgen.client import find_model, simulated_launch_us
from loadgen.errors import ConfigError, LoadgenError
from loadgen.records import (
    DEFAULT_CONCURRENCIES,
    MAX_DURATION_S,
    MAX_REQUESTS,
    STREAMS_PER_PROCESS,
    Leg,
    PromptKind,
    RunConfig,
)
from loadgen.report import (
    MAX_RAW_ROWS,
    ComparisonReport,
    Environment,
    LevelReport,
    ProgressBar,
    RawRows,
    Report,
    print_comparison,
    print_report,
    write_json,
)
from loadgen.runner import run_legs
from loadgen.servers import Server
from loadgen.stats import LevelSummary, simulated, summarize

EXIT_OK = 0
EXIT_FAILED_REQUESTS = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130

_MAX_CONCURRENCY = 10_000
_MAX_TOKENS = 1_000_000
_MAX_ID = 2**31
_MAX_ROUNDS = 50
_MAX_PROCESSES = 256
_SEEDS = 2**32


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
    ConfigError for a concurrency that cannot be reached."""
    if arguments.seed is None:
        arguments.seed = secrets.randbelow(_SEEDS)
    requests = MAX_REQUESTS if arguments.requests is None else arguments.requests
    if arguments.concurrency is None:
        arguments.concurrency = [[value for value in DEFAULT_CONCURRENCIES if value <= requests]]
    most = max(value for group in arguments.concurrency for value in group)
    if most > requests:
        raise ConfigError(
            f"--concurrency {most} is out of reach with --requests {requests}: each request in "
            f"flight is one of them; ask for --requests {most} or more, or a lower --concurrency"
        )


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments, normalize_url(arguments.url), arguments.label)
    config = replace(config, return_token_ids=bool(arguments.return_token_ids))
    launch_us = asyncio.run(simulated_launch_us(config.base_url, _api_key(arguments)))
    environment = Environment.here()
    levels: list[LevelReport] = []
    stopped: LoadgenError | KeyboardInterrupt | None = None
    try:
        with ProgressBar() as bar:
            for level in run_legs(Leg.of(config), _api_key(arguments), bar):
                raw = RawRows.of(level, max(1, MAX_RAW_ROWS // len(config.concurrencies)))
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
    if arguments.json is not None:
        write_json(report, arguments.json)
    if stopped is not None:
        raise stopped
    return _status([level.summary for level in levels])


def _ab(arguments: argparse.Namespace) -> int:
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
        for label, command in zip(arguments.labels, (arguments.a, arguments.b), strict=True):
            server = Server(label, command, logs / f"{'ab'[len(servers)]}.log")
            servers.append(stack.enter_context(server))
            sides.append(_ready_side(arguments, server))
        a, b = sides
        levels, stopped = _compare(a, b, servers, _api_key(arguments))
    if not levels and stopped is not None:
        raise stopped
    report = ComparisonReport(
        complete=stopped is None,
        label=arguments.label,
        simulated=simulated(a.simulated_launch_us, b.simulated_launch_us),
        a=a,
        b=b,
        environment=environment,
        levels=levels,
    )
    print_comparison(report)
    if arguments.json is not None:
        write_json(report, arguments.json)
    if arguments.plot is not None:
        from loadgen.plot import draw

        draw(report, arguments.plot)
    if stopped is not None:
        raise stopped
    if arguments.require_identical and any(x.answers != x.same_answers for x in levels):
        _say("answers differ, so the exit status is 1")
        return EXIT_FAILED_REQUESTS
    return _status([run for level in levels for pair in level.pairs for run in (pair.a, pair.b)])


def _ready_side(arguments: argparse.Namespace, server: Server) -> ab.Side:
    """Wait until a server that was started is ready, and return its side of the comparison, with
    the configuration of its runs."""
    _say(f"starting {server.name}; its log is {server.log}")
    ready_s = server.wait_ready(arguments.ready_timeout)
    _say(f"{server.name} is ready after {ready_s:.1f} s")
    config = _config(arguments, normalize_url(server.url), server.name)
    config = replace(
        config,
        concurrencies=tuple(x for x in config.concurrencies for _ in range(2 * arguments.rounds)),
        keep_answers=True,
        return_token_ids=arguments.return_token_ids is not False,
    )
    launch_us = asyncio.run(simulated_launch_us(config.base_url, _api_key(arguments)))
    return ab.Side(server.name, server.command, ready_s, launch_us, config)


def _compare(
    a: ab.Side, b: ab.Side, servers: Sequence[Server], api_key: str | None
) -> tuple[list[ab.Level], LoadgenError | KeyboardInterrupt | None]:
    """Run all pairs, and return their results by concurrency, and None; or, if an error or an
    interrupt stopped them, the results until then, and that exception."""

    class WatchingBar(ProgressBar):
        """A progress bar that ends the runs once a server has ended, so that requests which nobody
        answers are not counted as failures."""

        def update(self, done: int, failed: int, share: float) -> None:
            super().update(done, failed, share)
            for server in servers:
                server.check()

    pairs: list[ab.Pair] = []
    stopped: LoadgenError | KeyboardInterrupt | None = None
    try:
        legs = ab.order(a.config, b.config)
        with WatchingBar() as bar, closing(run_legs(legs, api_key, bar)) as runs:
            for pair in ab.pairs(runs):
                pairs.append(pair)  # noqa: PERF402  (pairs before an error are kept)
        for server in servers:
            server.check()
    except (LoadgenError, KeyboardInterrupt) as error:
        stopped = error
    return ab.Level.of(pairs), stopped


def _status(runs: Sequence[LevelSummary]) -> int:
    if any(run.any_failed for run in runs):
        _say("requests failed, so the exit status is 1")
        return EXIT_FAILED_REQUESTS
    return EXIT_OK


def _config(arguments: argparse.Namespace, base_url: str, label: str) -> RunConfig:
    """Return the configuration of the runs that the options ask for, against the server at
    `base_url`; the name of its model is looked up there."""
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
        "Exit status: 0; 1 if a request failed, warm-up included{}; 2 if a server or an option "
        "cannot be used; 130 if interrupted."
    )
    run = commands.add_parser(
        "run",
        help="closed loop over a list of concurrencies",
        description="For each concurrency in turn, keep that many streaming requests in flight; "
        "print TTFT, ITL, TPOT, E2E and throughput, and their formulas.",
        epilog=status.format(""),
    )
    run.add_argument("url", metavar="URL", help="http://host:port, with or without /v1")
    _add_options(run)

    compare = commands.add_parser(
        "ab",
        help="two servers beside each other",
        description="Start two servers, send both the same requests in the order A B B A, and "
        "print their ITL, TTFT and throughput, the ratios B / A with their spread, and whether "
        "the answers are the same. Both are up all the time and one at a time is asked, so they "
        "must fit the machine together and rest when idle.",
        epilog=status.format(", or answers differ under --require-identical"),
    )
    text = (
        "command line of server {}, one word to the shell; {{port}} in it stands for the port it "
        "is given, else --host and --port are appended"
    )
    for name in "ab":
        compare.add_argument(name, metavar=name.upper(), help=text.format(name.upper()))
    option = compare.add_argument_group("comparison").add_argument
    text = "what to call the servers (default: A B)"
    option("--labels", nargs=2, default=["A", "B"], metavar=("A", "B"), help=text)
    text = "runs A B B A at each concurrency (default: %(default)s)"
    option("--rounds", type=_integer(1, _MAX_ROUNDS), default=3, metavar="N", help=text)
    text = "seconds that a server may take to be ready (default: %(default)g)"
    option("--ready-timeout", type=_seconds, default=900.0, metavar="S", help=text)
    option("--require-identical", action="store_true", help="exit with 1 if answers differ")
    text = "draw ITL by concurrency to FILE, .svg or .png; needs matplotlib"
    option("--plot", type=_picture, metavar="FILE", help=text)
    _add_options(compare)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    """Add the options on the load, the requests and the output."""
    count, tokens = _integer(1, MAX_REQUESTS), _integer(1, _MAX_TOKENS)
    kinds = [str(kind) for kind in PromptKind]

    load = command.add_argument_group("load").add_argument
    text = (
        "requests in flight; values separated by spaces or commas, none above --requests "
        f"(default: {','.join(map(str, DEFAULT_CONCURRENCIES))}, as far as --requests goes)"
    )
    several = _integers(1, _MAX_CONCURRENCY)
    load("--concurrency", type=several, nargs="+", metavar="N", help=text)
    text = (
        "requests measured at each concurrency (default: 4 for each in flight, at least 20; "
        "no limit of its own if --duration is given)"
    )
    load("--requests", type=count, metavar="N", help=text)
    text = (
        "start no request after S seconds at one concurrency; what is in flight may end "
        f"(default: {MAX_DURATION_S:.0f})"
    )
    load("--duration", type=_seconds, metavar="S", help=text)
    text = "requests sent first at each concurrency, not measured (default: the concurrency)"
    load("--warmup", type=_integer(0, MAX_REQUESTS), metavar="N", help=text)
    text = (
        "client processes that share the requests in flight, at most one for each (default: one "
        f"for each {STREAMS_PER_PROCESS} in flight, at most the cores)"
    )
    load("--processes", type=_integer(1, _MAX_PROCESSES), metavar="N", help=text)
    text = "seconds that one request may take (default: %(default)g)"
    load("--timeout", type=_seconds, default=300.0, metavar="S", help=text)

    request = command.add_argument_group("requests").add_argument
    request("--model", help="default: the first that the server lists")
    text = (
        "random token ids or random words to /completions, or words to /chat/completions "
        "(default: %(default)s)"
    )
    request("--prompt-kind", choices=kinds, default=kinds[0], help=text)
    text = "token ids, or words, in each prompt (default: %(default)s)"
    request("--input-tokens", type=tokens, default=128, metavar="N", help=text)
    text = "token ids are drawn from LOW up to but not including HIGH (default: 100:1000)"
    default = (100, 1000)
    request("--token-range", type=_token_range, default=default, metavar="LOW:HIGH", help=text)
    text = "max_tokens of each request (default: %(default)s)"
    request("--output-tokens", type=tokens, default=64, metavar="N", help=text)
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

    output = command.add_argument_group("output").add_argument
    output("--json", type=_file, metavar="FILE", help="write everything to FILE")
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


def _integers(low: int, high: int) -> Callable[[str], list[int]]:
    """Return a parser of comma-separated integers, at least one, each from `low` to `high`."""
    parse = _integer(low, high)
    return lambda text: [parse(part) for part in text.rstrip(",").split(",")]


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
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return _file(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value <= MAX_DURATION_S:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, {MAX_DURATION_S:.0f}] seconds")
    return value


def _token_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    parse = _integer(0, _MAX_ID)
    bounds = parse(low), parse(high)
    if bounds[0] >= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range")
    return bounds

"""The `loadgen` command: options in, exit status out.

Knows argparse and the order of a run. Does not measure, compute or lay out anything itself.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from loadgen.client import find_model
from loadgen.errors import ConfigError, LoadgenError
from loadgen.records import MAX_DURATION_S, MAX_REQUESTS, PromptKind, RunConfig
from loadgen.report import (
    MAX_RAW_ROWS,
    Environment,
    LevelReport,
    ProgressBar,
    RawRows,
    Report,
    check_writable,
    print_report,
    write_json,
)
from loadgen.runner import run_levels
from loadgen.stats import summarize

EXIT_OK = 0
EXIT_FAILED_REQUESTS = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130

_MAX_CONCURRENCY = 10_000
_MAX_TOKENS = 1_000_000
_MAX_ID = 2**31


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except LoadgenError as error:
        print(f"loadgen: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        print("loadgen: interrupted before anything was measured", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    json_path: Path | None = arguments.json
    if json_path is not None:
        check_writable(json_path)
    concurrencies = tuple(value for group in arguments.concurrency for value in group)
    if not concurrencies:
        raise ConfigError("--concurrency names no value")
    api_key: str | None = arguments.api_key or os.environ.get("OPENAI_API_KEY")
    base_url = normalize_url(arguments.url)
    model = asyncio.run(find_model(base_url, api_key, arguments.model, arguments.timeout))
    config = RunConfig(
        base_url=base_url,
        model=model,
        concurrencies=concurrencies,
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
        label=arguments.label,
    )
    environment = Environment.here()
    levels: list[LevelReport] = []
    complete = True
    try:
        with ProgressBar() as bar:
            for level in run_levels(config, api_key, bar):
                raw = RawRows.of(level, max(1, MAX_RAW_ROWS // len(config.concurrencies)))
                levels.append(LevelReport(summarize(level), raw))
    except KeyboardInterrupt:
        if not levels:
            raise
        complete = False
    summaries = [level.summary for level in levels]
    print_report(config, summaries)
    if json_path is not None:
        report = Report(complete=complete, config=config, environment=environment, levels=levels)
        write_json(report, json_path)
    if not complete:
        print("loadgen: interrupted; the table shows what was measured so far", file=sys.stderr)
        return EXIT_INTERRUPTED
    if any(summary.any_failed for summary in summaries):
        print("loadgen: requests failed, so the exit status is 1", file=sys.stderr)
        return EXIT_FAILED_REQUESTS
    return EXIT_OK


def normalize_url(url: str) -> str:
    """The base URL ending in /v1, of http://host:port, http://host:port/v1 or host:port."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        parts.port  # noqa: B018  (a property that raises)
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no http or https URL")
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
    run = commands.add_parser(
        "run",
        help="closed loop over a list of concurrencies",
        description="For each concurrency in turn, keep that many streaming requests in flight; "
        "print TTFT, ITL, TPOT, E2E and throughput, and their formulas.",
        epilog="Exit status: 0; 1 if a request failed, warm-up included; 2 if the server or an "
        "option cannot be used; 130 if interrupted.",
    )
    run.add_argument("url", metavar="URL", help="http://host:port, with or without /v1")
    count, tokens = _integer(1, MAX_REQUESTS), _integer(1, _MAX_TOKENS)
    kinds = [str(kind) for kind in PromptKind]

    load = run.add_argument_group("load").add_argument
    text = "requests in flight; values separated by spaces or commas (default: 1,4,16)"
    several = _integers(1, _MAX_CONCURRENCY)
    load("--concurrency", type=several, nargs="+", default=[[1, 4, 16]], metavar="N", help=text)
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
    text = "client processes that share the requests in flight (default: %(default)s)"
    load("--processes", type=_integer(1, 64), default=1, metavar="N", help=text)
    text = "seconds that one request may take (default: %(default)g)"
    load("--timeout", type=_seconds, default=300.0, metavar="S", help=text)

    request = run.add_argument_group("requests").add_argument
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
    text = "of the prompts (default: %(default)s)"
    request("--seed", type=_integer(0, 2**32 - 1), default=0, metavar="N", help=text)
    request("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY, if set")

    output = run.add_argument_group("output").add_argument
    output("--json", type=Path, metavar="FILE", help="write everything to FILE")
    output("--label", default="", metavar="TEXT", help="a name for this run")
    return parser


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
    """Comma-separated integers."""
    parse = _integer(low, high)
    return lambda text: [parse(part) for part in text.split(",") if part.strip()]


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

"""The `loadgen` command: turns options into a run, and its outcome into the exit status.

Knows: the order of a run, and what ends it. Knows nothing of how options are written (options), and
does not measure, compute or print results itself.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec.structs import replace

from loadgen import ab, options, traces
from loadgen.client import find_model, simulated_launch_us
from loadgen.errors import ConfigError, LoadgenError, RefusedError
from loadgen.fitting import fitting
from loadgen.records import Leg, PromptKind, RunConfig, Trace
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
from loadgen.stats import LevelSummary, simulated, summarize

EXIT_OK = 0
EXIT_FAILED_REQUESTS = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    _open_standard_descriptors()
    arguments = options.parser().parse_args(argv)
    try:
        options.settle(arguments)
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


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments, normalize_url(arguments.url), arguments.label)
    config = replace(config, return_token_ids=bool(arguments.return_token_ids))
    launch_us = asyncio.run(simulated_launch_us(config.base_url, _api_key(arguments)))
    environment = Environment.here()
    levels: list[LevelReport] = []
    stopped: LoadgenError | KeyboardInterrupt | None = None
    try:
        try:
            _measure(arguments, config, levels)
        except RefusedError as refused:
            config = replace(config, **_other_requests(arguments, [config], refused))
            _measure(arguments, config, levels)
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


def _measure(arguments: argparse.Namespace, config: RunConfig, levels: list[LevelReport]) -> None:
    """Run all levels, and add a report of each to `levels`."""
    legs = Leg.of(config)
    with ProgressBar() as bar, RequestLines(arguments.jsonl) as lines:
        for level in lines.written(legs, run_legs(legs, _api_key(arguments), bar)):
            raw = RawRows.of(level, max(1, MAX_RAW_ROWS // len(config.loads)))
            levels.append(LevelReport(summarize(level), raw))


def _other_requests(
    arguments: argparse.Namespace, configs: Sequence[RunConfig], refused: RefusedError
) -> dict[str, Any]:
    """Return what to send to the servers of `configs` instead of requests that one of them refuses,
    as fields of their configurations. Raises `refused` if they take nothing that the options
    allow."""
    open_fields: dict[str, Sequence[Any]] = {}
    if arguments.prompt_kind is None:
        open_fields["prompt_kind"] = tuple(PromptKind)
    if arguments.ignore_eos is None:
        open_fields["ignore_eos"] = (True, False)
    if arguments.return_token_ids is None and configs[0].return_token_ids:
        open_fields["return_token_ids"] = (True, False)
    found = asyncio.run(fitting(configs, open_fields, _api_key(arguments))) if open_fields else None
    if found is None:
        raise refused
    kind = found.get("prompt_kind", configs[0].prompt_kind)
    flags = [f"--prompt-kind {kind}"] if kind is not configs[0].prompt_kind else []
    flags += [f"--no-{name.replace('_', '-')}" for name in found if found[name] is False]
    _say(f"{refused}; going on with {' '.join(flags) or 'the same, which it takes one by one'}")
    return found


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
        for label, given in zip(arguments.labels, arguments.servers, strict=True):
            if given.startswith(("http://", "https://")):
                sides.append(_side(arguments, label, given, None))
                continue
            server = Server(label, given, logs / f"{len(sides)}.log")
            servers.append(stack.enter_context(server))
            sides.append(_side(arguments, label, server.url, server))
        levels, stopped = _compare(arguments, sides, servers)
        if isinstance(stopped, RefusedError) and not levels:
            fields = _other_requests(arguments, [side.config for side in sides], stopped)
            sides = [replace(side, config=replace(side.config, **fields)) for side in sides]
            levels, stopped = _compare(arguments, sides, servers)
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
    arguments: argparse.Namespace, sides: Sequence[ab.Side], servers: Sequence[Server]
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
        with (
            WatchingBar() as bar,
            RequestLines(arguments.jsonl) as lines,
            closing(run_legs(legs, _api_key(arguments), bar)) as runs,
        ):
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
        prompt_kind=PromptKind(arguments.prompt_kind or PromptKind.TOKENS),
        input_tokens=arguments.input_tokens,
        token_range=arguments.token_range,
        output_tokens=arguments.output_tokens,
        ignore_eos=arguments.ignore_eos is not False,
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

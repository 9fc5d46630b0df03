"""Prints and saves results: the progress bar, the tables, and the JSON file.

Knows: rich and the layout of the JSON file. Computes no results: every number comes from stats, and
the formulas are printed as stats states them.
"""

import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadgen import ab
from loadgen.errors import ConfigError
from loadgen.records import ClientLoad, Leg, LevelResult, RunConfig, usable_cores
from loadgen.stats import FORMULAS, Distribution, LevelSummary, most

SCHEMA = 1
MAX_RAW_ROWS = 1500
"""Maximum number of rows of requests in the JSON file, over all levels."""

_WIDE = 140  # console width in columns from which three percentiles stand side by side
_FEW = 8  # how many are shown of bars, or of answers that differ


class Environment(msgspec.Struct, frozen=True):
    """The machine on which the client ran, and the versions with which it ran."""

    date: str
    python: str
    platform: str
    cpus: int
    """Number of CPUs that the client could use."""
    packages: dict[str, str]

    @classmethod
    def here(cls) -> Self:
        """Return the environment of this process, at this moment."""
        packages = {}
        for name in ("httptools", "uvloop"):
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                packages[name] = "absent"
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            python=platform.python_version(),
            platform=platform.platform(),
            cpus=usable_cores(),
            packages=packages,
        )


class RawRow(msgspec.Struct, frozen=True, array_like=True):
    """One request, written as an array in the JSON file, which has the names of the fields as
    `raw_fields`."""

    index: int
    start_ms: float
    """Milliseconds from the first send of its level."""
    ttft_ms: float | None
    e2e_ms: float
    tokens: int
    chunks: int
    failure: str | None


class RawRows(msgspec.Struct, frozen=True):
    """The rows of every `every`-th request of a level, in the order of their start. Not all
    requests have rows, so that the file stays small."""

    every: int
    rows: list[RawRow]

    @classmethod
    def of(cls, level: LevelResult, limit: int) -> Self:
        """Return at most `limit` rows of `level`."""
        every = max(1, -(-len(level.records) // limit))
        first_s = level.records[0].start_s if level.records else 0.0
        rows = [
            RawRow(
                index=record.index,
                start_ms=round((record.start_s - first_s) * 1e3, 3),
                ttft_ms=None if record.ttft_s is None else round(record.ttft_s * 1e3, 3),
                e2e_ms=round(record.e2e_s * 1e3, 3),
                tokens=record.tokens,
                chunks=len(record.chunk_times_s),
                failure=None if record.failure is None else record.failure.key,
            )
            for record in level.records[::every]
        ]
        return cls(every, rows)


class LevelReport(msgspec.Struct, frozen=True):
    """The results of one concurrency in the JSON file."""

    summary: LevelSummary
    raw: RawRows


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file of `loadgen run`."""

    schema: int = SCHEMA
    complete: bool
    """Whether the run was completed; if not, `levels` has the concurrencies until its end."""
    simulated: str
    """The text of `stats.simulated`, which must be shown with every figure of this file."""
    config: RunConfig
    environment: Environment
    formulas: dict[str, str] = msgspec.field(default_factory=lambda: dict(FORMULAS))
    raw_fields: tuple[str, ...] = RawRow.__struct_fields__
    levels: list[LevelReport]

    @property
    def title(self) -> str:
        """A line to show above figures of this report."""
        what = f"{self.config.model} at {self.config.base_url}"
        return _title(self.config.label, self.simulated, what)


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file of `loadgen ab`."""

    schema: int = SCHEMA
    complete: bool
    """Whether the comparison was completed; if not, `levels` has the pairs until its end."""
    label: str
    simulated: str
    """The text of `stats.simulated`, which must be shown with every figure of this file."""
    a: ab.Side
    b: ab.Side
    environment: Environment
    formulas: dict[str, str] = msgspec.field(default_factory=lambda: FORMULAS | ab.FORMULAS)
    levels: list[ab.Level]

    @property
    def title(self) -> str:
        """A line to show above figures of this report."""
        what = f"{self.a.label} and {self.b.label}, {self.a.config.model}"
        return _title(self.label, self.simulated, what)


def _title(*parts: str) -> str:
    return ": ".join(part for part in parts if part)


def write_json(report: Report | ComparisonReport, path: Path) -> None:
    """Write `report` to `path`, and replace what is there. Raises ConfigError."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None


def print_report(report: Report) -> None:
    """Print the table to stdout, then the failures, the warnings and the formulas."""
    levels = [level.summary for level in report.levels]
    console = _stdout()
    between = " / " if console.width >= _WIDE else "\n"
    _print(console, ["", f"{report.title}: {_requests(report.config)}"])
    latencies = ("TTFT", "ITL", "TPOT", "E2E")
    names = ("conc", "ok", "fail", "req/s", "tok/s", *latencies, "tok/chunk", "cached")
    table = _table(names, _title(report.simulated, "latencies in ms: p50, p90, p99"))
    for level in levels:
        found = (level.ttft_ms, level.itl_ms, level.tpot_ms, level.e2e_ms)
        table.add_row(
            str(level.concurrency),
            str(level.ok),
            f"[red]{level.failed}[/red]" if level.failed else "0",
            _number(level.requests_per_s),
            _number(level.output_tokens_per_s),
            *(_cell(distribution, between) for distribution in found),
            "-" if level.tokens_per_chunk is None else f"{level.tokens_per_chunk:.2f}",
            _cached(level),
        )
    console.print(table)
    lines = [
        f"concurrency {level.concurrency}: {remark}"
        for level in levels
        for remark in (_steadiness(level), *_remarks(level))
    ]
    lines += ["", "formulas (mean, min, max and in flight are in the JSON):", *_formulas(FORMULAS)]
    _print(console, lines)


def print_comparison(report: ComparisonReport) -> None:
    """Print the results of two servers to stdout: the table, answers that differ, failures, and the
    formulas."""
    console = _stdout()
    a, b = report.a, report.b
    lines = ["", report.title]
    lines += [
        f"{side.label}: {shlex.join(side.command)} (ready in {side.ready_s:.1f} s)"
        for side in (a, b)
    ]
    _print(console, [*lines, _requests(a.config)])
    names = ("conc", "metric", a.label, b.label, f"{b.label} / {a.label}", "same answers")
    caption = "median (min..max); the formulas say of what"
    table = _table(names, _title(report.simulated, caption))
    for level in report.levels:
        head, tail = str(level.concurrency), f"{level.same_answers} of {level.answers}"
        for name in ab.METRICS:
            found = level.metrics.get(name)
            spreads = (found.a, found.b, found.ratio) if found else (None,) * 3
            table.add_row(head, name, *(_spread(spread) for spread in spreads), tail)
            head = tail = ""
    console.print(table)
    lines = [
        f"concurrency {level.concurrency}: {remark}"
        for level in report.levels
        for remark in _pair_remarks(level, a.label, b.label)
    ]
    _print(console, [*lines, "", "formulas:", *_formulas(report.formulas)])


def _pair_remarks(level: ab.Level, a: str, b: str) -> list[str]:
    lines = []
    differences = [found for pair in level.pairs for found in pair.differences]
    if differences:
        starts = [f"{found.unit} {found.position}" for found in differences[:_FEW]]
        starts += ["..."] * (len(differences) > _FEW)
        number = level.answers - level.same_answers
        lines.append(f"{number} of {level.answers} answers differ, from {', '.join(starts)} on")
    sides = ((a, [p.a for p in level.pairs]), (b, [p.b for p in level.pairs]))
    for label, runs in sides:
        lines.append(f"{label}, worst run: {_client([run.clients for run in runs])}")
    for label, runs in sides:
        worst_first = sorted(runs, key=lambda run: not run.any_failed)
        remarks = [found for run in worst_first if (found := _remarks(run))]
        share = f"{label}, {len(remarks)} of {len(runs)} runs"
        lines += [f"{share}, for example: {remark}" for remark in (remarks or [[]])[0]]
    return lines


def _stdout() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    return console


def _print(console: Console, lines: Sequence[str]) -> None:
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _table(columns: Sequence[str], caption: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for name in columns:
        table.add_column(escape(name), justify="right", no_wrap=True)
    return table


def _requests(config: RunConfig) -> str:
    limit = "exactly" if config.ignore_eos else "at most"
    return (
        f"{config.input_tokens} {config.prompt_kind} in, {limit} {config.output_tokens} tokens "
        f"out, seed {config.seed}"
    )


def _formulas(formulas: dict[str, str]) -> list[str]:
    return [f"  {name}: {text}" for name, text in formulas.items()]


def _steadiness(level: LevelSummary) -> str:
    jitter = "-" if level.itl_jitter is None else _number(level.itl_jitter)
    return f"ITL jitter {jitter}; {_client([level.clients])}"


def _client(runs: Sequence[Sequence[ClientLoad]]) -> str:
    worst = most([load for clients in runs for load in clients])
    processes = max(map(len, runs))
    return (
        f"client: {processes} process{'es' * (processes > 1)}, {worst.cpu_share:.0%} of a core, "
        f"up to {worst.lag_p99_s * 1e3:.1f} ms late (p99)"
    )


def _remarks(level: LevelSummary) -> list[str]:
    lines = []
    if level.stopped_by != "requests":
        lines.append(f"ended by {level.stopped_by}")
    for title, counts in (("failed", level.failures), ("warm-up failed", level.warmup_failures)):
        lines += [
            f"{title}: {count} x {key}, for example: {level.failure_examples[key]}"
            for key, count in counts.items()
        ]
    return lines + [f"warning: {text}" for text in level.warnings]


def _cached(level: LevelSummary) -> str:
    if level.cached_tokens is None or not level.prompt_tokens:
        return "-"
    share = 100 * level.cached_tokens / level.prompt_tokens
    return f"{share:.2g}%" if share < 10 else f"{share:.0f}%"


def _cell(distribution: Distribution | None, between: str) -> str:
    if distribution is None:
        return "-"
    return between.join(_number(x) for x in (distribution.p50, distribution.p90, distribution.p99))


def _spread(spread: ab.Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{_number(spread.median)} ({_number(spread.min)}..{_number(spread.max)})"


def _number(value: float) -> str:
    """Format a number with about three digits, and never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class ProgressBar:
    """A `runner.Observer` that draws a bar for each phase on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, leg: Leg, warmup: bool) -> None:
        """Start a new bar; only the last few bars stay."""
        for old in self._progress.task_ids[:-_FEW]:
            self._progress.remove_task(old)
        label = f"{leg.config.label}: " if leg.config.label else ""
        title = f"{label}concurrency {leg.concurrency}" + (" (warm-up)" if warmup else "")
        self._task = self._progress.add_task(title, total=1.0, count="")

    def update(self, done: int, failed: int, share: float) -> None:
        """Move the bar of the current phase; see `runner.Observer`."""
        assert self._task is not None, "begin comes first"
        count = f"{done} requests" + (f", {failed} failed" if failed else "")
        self._progress.update(self._task, completed=share, count=count)

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
from loadgen.bootstrap import Ratio
from loadgen.errors import ConfigError
from loadgen.records import ClientLoad, Leg, RunConfig, usable_cores
from loadgen.rows import RawRow, RawRows
from loadgen.samples import Distribution
from loadgen.server_metrics import Beside
from loadgen.stats import FORMULAS, LevelSummary, most

SCHEMA = 2
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
    """Whether the comparison was completed; if not, `levels` has the repeats until its end."""
    label: str
    simulated: str
    """The text of `stats.simulated`, which must be shown with every figure of this file."""
    verdict: str
    """One sentence that says which server won by how much; empty if there is nothing to compare."""
    sides: list[ab.Side]
    environment: Environment
    formulas: dict[str, str] = msgspec.field(default_factory=lambda: FORMULAS | ab.FORMULAS)
    levels: list[ab.Level]

    @property
    def title(self) -> str:
        """A line to show above figures of this report."""
        labels = [side.label for side in self.sides]
        what = f"{', '.join(labels[:-1])} and {labels[-1]}, {self.sides[0].config.model}"
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
    console = _stdout()
    between = " / " if console.width >= _WIDE else "\n"
    _print(console, ["", f"{report.title}: {requests_text(report.config)}"])
    table = _table(RUN_COLUMNS, _title(report.simulated, "latencies in ms: p50, p90, p99"))
    for row in run_rows(report, between):
        table.add_row(*map(escape, row))
    console.print(table)
    lines = [*run_remarks(report), "", "formulas (mean, min, max and in flight are in the JSON):"]
    _print(console, [*lines, *_formulas(FORMULAS)])


RUN_COLUMNS = (
    *("load", "ok", "fail", "req/s", "tok/s"),
    *("TTFT", "ITL", "TPOT", "E2E", "tok/chunk", "cached"),
)
"""The heads of the columns of `run_rows`."""


def run_rows(report: Report, between: str) -> list[list[str]]:
    """Return the rows of the table of a run: one for each level.

    between: the text between the percentiles of a latency.
    """
    return [
        [
            level.load.short,
            str(level.ok),
            str(level.failed),
            _number(level.requests_per_s),
            _number(level.output_tokens_per_s),
            *(
                _cell(distribution, between)
                for distribution in (level.ttft_ms, level.itl_ms, level.tpot_ms, level.e2e_ms)
            ),
            "-" if level.tokens_per_chunk is None else f"{level.tokens_per_chunk:.2f}",
            _cached(level),
        ]
        for level in (found.summary for found in report.levels)
    ]


def run_remarks(report: Report) -> list[str]:
    """Return the lines below the table of a run."""
    return [
        f"{level.load}: {remark}"
        for level in (found.summary for found in report.levels)
        for remark in (_steadiness(level), *_server(level), *_remarks(level))
    ]


def print_comparison(report: ComparisonReport) -> None:
    """Print the results of several servers to stdout: the table, answers that differ, failures, the
    formulas, and which server won."""
    console = _stdout()
    _print(console, ["", report.title, *map(describe, report.sides)])
    _print(console, [requests_text(report.sides[0].config)])
    table = _table(
        comparison_columns(report),
        _title(report.simulated, "median (min..max); ratios with their 95% interval"),
    )
    for row in comparison_rows(report):
        table.add_row(*map(escape, row))
    console.print(table)
    lines = [*comparison_remarks(report), "", "formulas:", *_formulas(report.formulas)]
    _print(console, [*lines, "", report.verdict] if report.verdict else lines)


def describe(side: ab.Side) -> str:
    """Return a line that says what a server of a comparison is."""
    if side.command is None:
        return f"{side.label}: {side.config.base_url}"
    return f"{side.label}: {shlex.join(side.command)} (ready in {side.ready_s:.1f} s)"


def comparison_columns(report: ComparisonReport) -> list[str]:
    """Return the heads of the columns of `comparison_rows`."""
    first, *others = [side.label for side in report.sides]
    ratios = [f"{other} / {first}" for other in others]
    return ["load", "metric", first, *others, *ratios, "same answers"]


def comparison_rows(report: ComparisonReport) -> list[list[str]]:
    """Return the rows of the table of a comparison: one for each metric at each level."""
    rows = []
    count = len(report.sides)
    for level in report.levels:
        same = [level.agreement(side) for side in range(1, count)]
        head, tail = level.load.short, ", ".join(f"{x} of {y}" for x, y in same)
        for name in ab.METRICS:
            cells = ["-"] * (2 * count - 1)
            if (found := level.metrics.get(name)) is not None:
                cells = [*map(_spread, found.spreads), *map(_ratio, found.ratios)]
            rows.append([head, name, *cells, tail])
            head = tail = ""
    return rows


def comparison_remarks(report: ComparisonReport) -> list[str]:
    """Return the lines below the table of a comparison."""
    return [
        f"{level.load}: {remark}"
        for level in report.levels
        for remark in _level_remarks(level, [side.label for side in report.sides])
    ]


def _level_remarks(level: ab.Level, labels: Sequence[str]) -> list[str]:
    lines = []
    for side, label in enumerate(labels[1:], 1):
        agreements = [repeat.agreements[side - 1] for repeat in level.repeats]
        differences = [found for agreement in agreements for found in agreement.differences]
        if differences:
            starts = [f"{found.unit} {found.position}" for found in differences[:_FEW]]
            starts += ["..."] * (len(differences) > _FEW)
            same, number = level.agreement(side)
            whose = f"{label}: " if len(labels) > 2 else ""
            lines.append(
                f"{whose}{number - same} of {number} answers differ, from {', '.join(starts)} on"
            )
    sides = [
        (label, [repeat.runs[side] for repeat in level.repeats])
        for side, label in enumerate(labels)
    ]
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


def requests_text(config: RunConfig) -> str:
    """Return a line that says which requests are sent."""
    limit = "exactly" if config.ignore_eos else "at most"
    lengths = (
        f"{config.input_tokens} {config.prompt_kind} in, {limit} {config.output_tokens} tokens out"
    )
    if config.trace is not None:
        lengths = f"{config.trace.requests} requests of {config.trace.path}"
    parts = [lengths]
    if config.prefix_tokens:
        parts.append(f"behind {config.num_prefixes} shared prefixes of {config.prefix_tokens}")
    if config.turns != 1:
        parts.append(f"chats of {config.turns} turns")
    return ", ".join([*parts, f"seed {config.seed}"])


def _formulas(formulas: dict[str, str]) -> list[str]:
    return [f"  {name}: {text}" for name, text in formulas.items()]


def _steadiness(level: LevelSummary) -> str:
    jitter = "-" if level.itl_jitter is None else _number(level.itl_jitter)
    late = ""
    if (delay := level.send_delay_ms) is not None:
        late = f"; send delay p50 {_number(delay.p50)}, p99 {_number(delay.p99)} ms"
    return f"ITL jitter {jitter}{late}; {_client([level.clients])}"


def _server(level: LevelSummary) -> list[str]:
    """Return a line with the figures of the client, each with the server's own, if it has any."""

    def show(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0f}" if value.is_integer() else _number(value)

    def both(found: Beside) -> str:
        return f"{found.name} {show(found.client)} and {show(found.server)}"

    found = ", ".join(map(both, level.server))
    return [f"client and server count: {found}"] if found else []


def _client(runs: Sequence[Sequence[ClientLoad]]) -> str:
    worst = most([load for clients in runs for load in clients])
    processes = max(map(len, runs))
    return (
        f"client: {processes} process{'es' * (processes > 1)}, {worst.cpu_share:.0%} of a core, "
        f"up to {worst.lag_p99_s * 1e3:.1f} ms late (p99)"
    )


def _remarks(level: LevelSummary) -> list[str]:
    lines = []
    if (goodput := level.goodput) is not None:
        missed = ", ".join(f"{count} missed {name}" for name, count in goodput.missed.items())
        lines.append(
            f"goodput {_number(goodput.requests_per_s)} req/s: {goodput.attained} of "
            f"{goodput.requests} requests met every limit ({goodput.attainment:.1%}); {missed}"
        )
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


def _spread(spread: ab.Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.min)}..{_number(spread.max)})"


def _ratio(ratio: Ratio) -> str:
    return f"{_number(ratio.mean)} ({_number(ratio.low)}..{_number(ratio.high)})"


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
        title = f"{label}{leg.load}" + (" (warm-up)" if warmup else "")
        self._task = self._progress.add_task(title, total=1.0, count="")

    def update(self, done: int, failed: int, share: float) -> None:
        """Move the bar of the current phase; see `runner.Observer`."""
        assert self._task is not None, "begin comes first"
        count = f"{done} requests" + (f", {failed} failed" if failed else "")
        self._progress.update(self._task, completed=share, count=count)

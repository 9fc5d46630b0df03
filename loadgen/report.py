"""What the user sees and keeps: progress, the table, the JSON.

Knows rich and the layout of the JSON file. Computes nothing: every number comes from stats, and
the formulas are printed as stats states them.
"""

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import cpu_count
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadgen.errors import ConfigError
from loadgen.records import LevelResult, RunConfig
from loadgen.stats import FORMULAS, Distribution, LevelSummary

SCHEMA = 1
MAX_RAW_ROWS = 1500
"""Request rows kept in the JSON, over all levels."""

_WIDE = 130  # columns from which three percentiles stand side by side


class Environment(msgspec.Struct, frozen=True):
    """Where and with what the client ran."""

    date: str
    python: str
    platform: str
    cpus: int | None
    packages: dict[str, str]

    @classmethod
    def here(cls) -> Self:
        """This machine, now."""
        packages = {}
        for name in ("aiohttp", "uvloop"):
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                packages[name] = "absent"
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            python=platform.python_version(),
            platform=platform.platform(),
            cpus=cpu_count(),
            packages=packages,
        )


class RawRow(msgspec.Struct, frozen=True, array_like=True):
    """One request, as an array in the JSON. Its field names are in the file as `raw_fields`."""

    index: int
    start_ms: float
    """From the first send of its level."""
    ttft_ms: float | None
    e2e_ms: float
    tokens: int
    chunks: int
    failure: str | None


class RawRows(msgspec.Struct, frozen=True):
    """Every `every`-th request of a level in order of start, so that the file stays small."""

    every: int
    rows: list[RawRow]

    @classmethod
    def of(cls, level: LevelResult, limit: int) -> Self:
        """At most `limit` rows of `level`."""
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
    """One concurrency in the JSON."""

    summary: LevelSummary
    raw: RawRows


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file."""

    schema: int = SCHEMA
    complete: bool
    """False if the run was interrupted."""
    config: RunConfig
    environment: Environment
    formulas: dict[str, str] = msgspec.field(default_factory=lambda: dict(FORMULAS))
    raw_fields: tuple[str, ...] = RawRow.__struct_fields__
    levels: list[LevelReport]


def check_writable(path: Path) -> None:
    """Raise ConfigError if a file cannot be written at `path`; better now than after the run."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--json {path}: not a file in an existing directory")


def write_json(report: Report, path: Path) -> None:
    """Write `report` to `path`, replacing what is there."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None


def print_report(config: RunConfig, levels: Sequence[LevelSummary]) -> None:
    """Print the table to stdout, then what failed, the warnings and the formulas."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    between = " / " if console.width >= _WIDE else "\n"
    limit = "exactly" if config.ignore_eos else "at most"
    lines = [
        "",
        f"{config.label + ': ' if config.label else ''}{config.model} at {config.base_url}: "
        f"{config.input_tokens} {config.prompt_kind} in, {limit} {config.output_tokens} tokens "
        f"out, client processes {config.processes}, seed {config.seed}",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    caption = "latencies in ms: p50, p90, p99"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    for name in ("conc", "ok", "fail", "req/s", "tok/s", "TTFT", "ITL", "TPOT", "E2E", "tok/chunk"):
        table.add_column(name, justify="right", no_wrap=True)
    for level in levels:
        latencies = (level.ttft_ms, level.itl_ms, level.tpot_ms, level.e2e_ms)
        table.add_row(
            str(level.concurrency),
            str(level.ok),
            f"[red]{level.failed}[/red]" if level.failed else "0",
            _number(level.requests_per_s),
            _number(level.output_tokens_per_s),
            *(_cell(distribution, between) for distribution in latencies),
            "-" if level.tokens_per_chunk is None else f"{level.tokens_per_chunk:.2f}",
        )
    console.print(table)
    lines = [f"concurrency {level.concurrency}: {x}" for level in levels for x in _remarks(level)]
    lines += ["", "formulas (mean, min, max and in flight are in the JSON):"]
    lines += [f"  {name}: {text}" for name, text in FORMULAS.items()]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


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


def _cell(distribution: Distribution | None, between: str) -> str:
    if distribution is None:
        return "-"
    return between.join(_number(x) for x in (distribution.p50, distribution.p90, distribution.p99))


def _number(value: float) -> str:
    """About three digits, never in exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class ProgressBar:
    """A `runner.Observer` that draws a bar for each phase on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
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

    def begin(self, concurrency: int, warmup: bool) -> None:
        """Start a new bar."""
        title = f"concurrency {concurrency}" + (" (warm-up)" if warmup else "")
        self._task = self._progress.add_task(title, total=1.0, count="")

    def update(self, done: int, failed: int, share: float) -> None:
        """Move the bar."""
        assert self._task is not None, "begin comes first"
        count = f"{done} requests" + (f", {failed} failed" if failed else "")
        self._progress.update(self._task, completed=share, count=count)

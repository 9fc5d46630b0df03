"""Requests as rows of files: some of them in the report, all of them as lines of JSON.

Knows: the layout of both. Computes nothing beyond differences of times.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec

from loadgen.errors import ConfigError
from loadgen.records import Leg, LevelResult, RequestRecord

MAX_RAW_ROWS = 1500
"""Maximum number of rows of requests in the JSON file, over all levels."""


class RawRow(msgspec.Struct, frozen=True, array_like=True):
    """One request, written as an array in the JSON file, which has the names of the fields as
    `raw_fields`."""

    index: int
    start_ms: float
    """Milliseconds at which it was due, from the first that was due in its level."""
    send_delay_ms: float
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
        first_s = level.records[0].due_s if level.records else 0.0
        rows = [
            RawRow(
                index=record.index,
                start_ms=_ms(record.due_s - first_s),
                send_delay_ms=_ms(record.send_delay_s),
                ttft_ms=None if record.ttft_s is None else _ms(record.ttft_s),
                e2e_ms=_ms(record.e2e_s),
                tokens=record.tokens,
                chunks=len(record.chunk_times_s),
                failure=None if record.failure is None else record.failure.key,
            )
            for record in level.records[::every]
        ]
        return cls(every, rows)


class RequestLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request in the file of lines. Milliseconds count from when the first request of the level
    was due."""

    label: str
    load: str
    level: int
    index: int
    turn: int
    due_ms: float
    send_delay_ms: float
    ttft_ms: float | None
    e2e_ms: float
    chunk_ms: list[float]
    """The time of each chunk with tokens."""
    chunk_tokens: tuple[float, ...]
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int
    failure: str | None
    message: str | None
    """What is known of the failure."""
    extra: dict[str, Any]
    """The fields of the choice that ended the answer which are no part of OpenAI's API."""

    @classmethod
    def of(cls, leg: Leg, record: RequestRecord, first_s: float) -> Self:
        """Return the line of a request."""
        return cls(
            label=leg.config.label,
            load=str(leg.load),
            level=leg.level,
            index=record.index,
            turn=record.turn,
            due_ms=_ms(record.due_s - first_s),
            send_delay_ms=_ms(record.send_delay_s),
            ttft_ms=None if record.ttft_s is None else _ms(record.ttft_s),
            e2e_ms=_ms(record.e2e_s),
            chunk_ms=[_ms(time_s - first_s) for time_s in record.chunk_times_s],
            chunk_tokens=record.chunk_tokens,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            output_tokens=record.tokens,
            failure=None if record.failure is None else record.failure.key,
            message=None if record.failure is None else record.failure.message,
            extra=record.extra,
        )


class RequestLines:
    """A file that gets a line of JSON for each request, level by level. Without a path it is
    none."""

    def __init__(self, path: Path | None) -> None:
        """Open the file. Raises ConfigError."""
        self._path = path
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                self._file = path.open("wb")
            except OSError as error:
                raise ConfigError(f"--jsonl {path}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def written(self, legs: Iterable[Leg], results: Iterable[LevelResult]) -> Iterator[LevelResult]:
        """Yield the results of `legs` as they come, after their lines are written. Raises
        ConfigError."""
        for result, leg in zip(results, legs, strict=True):  # in this order `results` is exhausted
            self._write(leg, result)
            yield result

    def _write(self, leg: Leg, result: LevelResult) -> None:
        if self._file is None or not result.records:
            return
        first_s = result.records[0].due_s
        lines = [RequestLine.of(leg, record, first_s) for record in result.records]
        try:
            self._file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"--jsonl {self._path}: {error.strerror}") from None


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)

"""Reads recorded traffic: when each request arrived, and how long its prompt and its answer were.

Two formats of published traces are read. A JSONL file has the fields of Mooncake's traces:
`timestamp` in milliseconds, `input_length`, `output_length` and, if prefixes are shared,
`hash_ids`, of which each stands for `BLOCK_TOKENS` tokens of the prompt. A CSV file has the columns
of Azure's: TIMESTAMP (a date), ContextTokens and GeneratedTokens.

Knows: these formats. Knows nothing of how the requests are sent.
"""

import csv
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Annotated

import msgspec

from loadgen.errors import ConfigError
from loadgen.lengths import MAX_LENGTH

BLOCK_TOKENS = 512
"""Number of tokens for which a hash id stands, as in Mooncake's traces."""

_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]


class Arrival(msgspec.Struct, frozen=True):
    """One request of a trace."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    """Milliseconds from any origin."""
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()


@lru_cache(maxsize=1)
def read(path: str) -> tuple[Arrival, ...]:
    """Return the requests of a trace in the order of their arrival. Raises ConfigError."""
    try:
        with open(path, newline="") as file:
            arrivals = list(_azure(file) if path.endswith(".csv") else _mooncake(file))
    except (OSError, UnicodeDecodeError, KeyError, ValueError) as error:
        reason = f"there is no column {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"--trace {path}: {reason}") from None
    if not arrivals:
        raise ConfigError(f"--trace {path}: there are no requests")
    return tuple(sorted(arrivals, key=lambda arrival: arrival.timestamp))


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield msgspec.json.decode(line, type=Arrival)
            except msgspec.DecodeError as error:
                raise ValueError(f"line {number}: {error}") from None


def _azure(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(lines), 1):
        try:
            # Seconds have seven digits there, and fromisoformat reads the first six.
            seconds = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            fields = {
                "timestamp": seconds * 1e3,
                "input_length": int(row["ContextTokens"]),
                "output_length": int(row["GeneratedTokens"]),
            }
            yield msgspec.convert(fields, Arrival)
        except (msgspec.ValidationError, ValueError) as error:
            raise ValueError(f"request {number}: {error}") from None

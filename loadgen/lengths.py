"""Lengths of prompts, of answers and of chats: fixed, or drawn from a distribution.

Knows: distributions of whole numbers, and how they are written. Knows nothing of what has a length.
"""

from math import log, sqrt

import msgspec
import numpy as np

MAX_LENGTH = 1_000_000


class Uniform(msgspec.Struct, frozen=True, tag=True):
    """Every whole number from `low` to `high`, both included, with the same probability."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))

    def __str__(self) -> str:
        return f"uniform:{self.low}:{self.high}"


class Normal(msgspec.Struct, frozen=True, tag=True):
    """A normal distribution, rounded and clipped to [1, `high`]."""

    mean: float
    stddev: float
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return _clip(rng.normal(self.mean, self.stddev), self.high)

    def __str__(self) -> str:
        return f"normal:{self.mean:g}:{self.stddev:g}:{self.high}"


class LogNormal(msgspec.Struct, frozen=True, tag=True):
    """A log-normal distribution with this mean and standard deviation before it is rounded and
    clipped to [1, `high`]. Lengths in recorded traffic have such long tails."""

    mean: float
    stddev: float
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        variance = log(1 + (self.stddev / self.mean) ** 2)
        location = log(self.mean) - variance / 2
        return _clip(rng.lognormal(location, sqrt(variance)), self.high)

    def __str__(self) -> str:
        return f"lognormal:{self.mean:g}:{self.stddev:g}:{self.high}"


Length = int | Uniform | Normal | LogNormal
"""A length; an int is a fixed one."""


def _clip(value: float, high: int) -> int:
    return max(1, min(high, round(value)))


def draw(length: Length, rng: np.random.Generator) -> int:
    """Return one length. A fixed length draws nothing from `rng`."""
    return length if isinstance(length, int) else length.draw(rng)


def parse(text: str) -> Length:
    """Parse `N`, `uniform:LOW:HIGH`, `normal:MEAN:STDDEV[:MAX]` or `lognormal:MEAN:STDDEV[:MAX]`.
    Raises ValueError."""
    kind, *parts = text.split(":")
    if not parts:
        return _whole(kind)
    if kind == "uniform" and len(parts) == 2:
        low, high = map(_whole, parts)
        if low > high:
            raise ValueError(f"{text!r} is an empty range")
        return Uniform(low, high)
    if kind in ("normal", "lognormal") and len(parts) in (2, 3):
        mean, stddev = map(float, parts[:2])
        if not (0 < mean <= MAX_LENGTH and 0 <= stddev <= MAX_LENGTH):
            raise ValueError(f"{text!r} has a mean or a deviation outside 0..{MAX_LENGTH}")
        high = _whole(parts[2]) if len(parts) == 3 else MAX_LENGTH
        return Normal(mean, stddev, high) if kind == "normal" else LogNormal(mean, stddev, high)
    raise ValueError(
        f"{text!r} is no length; write N, uniform:LOW:HIGH, normal:MEAN:STDDEV[:MAX] or "
        "lognormal:MEAN:STDDEV[:MAX]"
    )


def _whole(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_LENGTH:
        raise ValueError(f"{value} is not in 1..{MAX_LENGTH}")
    return value

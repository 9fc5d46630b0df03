"""Rewrites the numbers of a JSON schema so that llguidance keeps their meaning.

llguidance reads numbers as doubles, and converts those to 64-bit integers where they are integers.
A `const` that would become another number is refused. A bound moves inwards to the next number that
is kept exactly: what is within it is within the bound that was asked for.

Knows: JSON Schema's keywords for numbers, and how llguidance reads and prints them.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from minisrv.errors import truncated

_HELD = 2**53
"""Number up to which a double represents every integer exactly."""
_INT64 = 2**63
"""Bound of llguidance's integers, which have 64 bits."""

_UPPER = ("maximum", "exclusiveMaximum")
_LOWER = ("minimum", "exclusiveMinimum")
EXACT = ("const", "enum", "multipleOf")
"""Keywords whose numbers, at any depth, are kept exactly or refused."""


def restate_numbers(schema: dict[str, Any]) -> None:
    """Change the numbers of a schema, but not those of schemas inside it, to what llguidance has to
    be given.

    Raises ValueError for a number that cannot be kept.
    """
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    for key, value in schema.items():
        if key in (*_UPPER, *_LOWER) and is_number(value):
            schema[key] = _bound(key, _decimal(value), "integer" in types)
        elif key == "multipleOf" and is_number(value):
            schema[key] = _factor(_decimal(value), "integer" in types and "number" not in types)
        elif key in EXACT:
            schema[key] = _map_numbers(value, functools.partial(_exact, key))
        elif is_number(value):
            schema[key] = plain(value)


def _bound(key: str, bound: Decimal, integers: bool) -> int | float:
    """Return the outermost number within a bound that llguidance keeps exactly.

    integers: whether integers, which llguidance counts in 64 bits, are among what is bounded.

    Raises ValueError if no integer, or no number that a double holds, is within it.
    """
    upper = key in _UPPER
    if integers:
        if bound <= -_INT64 if upper else bound >= _INT64:
            raise ValueError(
                f"{key}: {_short(bound)} leaves no integer, as they reach from -2**63 to 2**63"
            )
        # llguidance clips an upper bound above its range, but fails on a lower bound below it.
        bound = max(bound, Decimal(1 - _INT64))
    inwards = -math.inf if upper else math.inf
    double = _nearest(bound)
    while not math.isinf(double):
        outside = any(read > bound if upper else read < bound for read in _readings(double))
        written = None if outside else _written(double)
        if written is not None:
            return written
        double = math.nextafter(double, inwards)
    raise ValueError(f"{key}: {_short(bound)} leaves no number that a double holds")


def _factor(factor: Decimal, integers: bool) -> int | float:
    """Return the value for `multipleOf` that llguidance has to be given.

    integers: whether the multiples must be integers.

    Raises ValueError for a number that is not above 0, or cannot be kept exactly.
    """
    if factor <= 0:
        raise ValueError(f"multipleOf: {_short(factor)} is not allowed: it must be above 0")
    exact = _exact("multipleOf", factor)
    # Integers are multiples of 1 as well, which llguidance ignores where it looks for a multiple
    # within the bounds.
    return _exact("multipleOf", Fraction(factor).numerator) if integers else exact


def _exact(key: str, number: int | float | Decimal) -> int | float:
    """Return the number to write for one that must be kept exactly. Raises ValueError for a number
    that would become another one."""
    exact = _decimal(number)
    double = _nearest(exact)
    written = _written(double)
    if (
        written is None
        or exact.copy_abs() >= _INT64
        or any(read != exact for read in _readings(double))
    ):
        raise ValueError(
            f"{key}: the number {_short(exact)} cannot be kept exactly, as those below 2**63 of up "
            "to 15 digits can; a string can be of any digits"
        )
    return written


def _readings(double: float) -> tuple[Decimal, Decimal]:
    """Return the values that llguidance uses for a double: as it prints it, and as it computes with
    it if it is an integer."""
    printed = _decimal(double)
    return printed, Decimal(double) if double.is_integer() else printed


def is_number(value: Any) -> bool:
    """Whether a value is a number of JSON."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _map_numbers(value: Any, change: Callable[[Any], int | float]) -> Any:
    if isinstance(value, list):
        return [_map_numbers(part, change) for part in value]
    if isinstance(value, dict):
        return {name: _map_numbers(part, change) for name, part in value.items()}
    return change(value) if is_number(value) else value


def _decimal(number: int | float | Decimal) -> Decimal:
    """Return a number as it was written; a double as the shortest text that makes it. Raises
    ValueError for NaN."""
    exact = Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
    if exact.is_nan():
        raise ValueError("NaN is no number of JSON")
    return exact


def _nearest(number: int | float | Decimal) -> float:
    """Return the nearest finite double."""
    most = Decimal(sys.float_info.max)
    return float(min(max(_decimal(number), most.copy_negate()), most))


def _written(double: float) -> int | float | None:
    """Return the number to write so that llguidance reads this double. Its reader (serde_json's) is
    sometimes off by one step, so the result may be a neighbouring double; None if none of them is
    read as this one."""
    if double.is_integer() and abs(double) < _INT64:
        return int(double)
    up, down = math.nextafter(double, math.inf), math.nextafter(double, -math.inf)
    return next((written for written in (double, up, down) if _as_read(written) == double), None)


def _as_read(double: float) -> float:
    """Return what serde_json reads for a double that is written in its shortest form: its digits as
    a double, times a power of ten."""
    negative, digits, exponent = _decimal(double).as_tuple()
    assert isinstance(exponent, int)
    value = float(int("".join(map(str, digits))))
    while exponent:
        step = max(-308, min(308, exponent))
        value = value / float(f"1e{-step}") if step < 0 else value * float(f"1e{step}")
        exponent -= step
    return -value if negative else value


def plain(number: int | float | Decimal) -> int | float:
    """Return a number as JSON can hold it, perhaps rounded. Integers that a double represents
    exactly become integers."""
    double = _nearest(number)
    return int(double) if double.is_integer() and abs(double) <= _HELD else double


def _short(number: Decimal) -> str:
    return truncated(str(number), 40)

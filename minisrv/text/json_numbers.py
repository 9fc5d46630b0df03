"""The numbers of a JSON schema, as llguidance has to be told them.

llguidance reads numbers as doubles, and integers from those as 64 bits. A `const` that would come
out as another number is refused. A bound moves inwards to the next number that is kept: what is
within it is within what was asked for.

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

from minisrv.errors import shortened

_HELD = 2**53
"""A double holds every integer up to here."""
_INT64 = 2**63
"""llguidance counts integers in 64 bits."""

_UPPER = ("maximum", "exclusiveMaximum")
_LOWER = ("minimum", "exclusiveMinimum")
EXACT = ("const", "enum", "multipleOf")
"""Keywords whose numbers, however deep, are kept as they are or refused."""


def restate_numbers(schema: dict[str, Any]) -> None:
    """Change the numbers of a schema, of none that it holds, to what llguidance has to be told.

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
    """The outermost number within a bound that llguidance keeps.

    integers: some of what is bounded is counted in 64 bits.

    Raises ValueError if no integer is within it.
    """
    upper = key in _UPPER
    if integers:
        if bound <= -_INT64 if upper else bound >= _INT64:
            raise ValueError(
                f"{key}: {_short(bound)} leaves no integer, as they reach from -2**63 to 2**63"
            )
        # llguidance cuts off an upper bound that is higher than it counts, and fails at a lower
        # one that is lower.
        bound = max(bound, Decimal(1 - _INT64))
    inwards = -math.inf if upper else math.inf
    double = _nearest(bound)
    while not math.isinf(double):
        outside = any(read > bound if upper else read < bound for read in _readings(double))
        told = None if outside else _told(double)
        if told is not None:
            return told
        double = math.nextafter(double, inwards)
    raise ValueError(f"{key}: {_short(bound)} leaves no number that a double holds")


def _factor(factor: Decimal, integers: bool) -> int | float:
    """Of `multipleOf`. integers: the multiples are integers. Raises ValueError."""
    if factor <= 0:
        raise ValueError(f"multipleOf: {_short(factor)} is not allowed: it must be above 0")
    exact = _exact("multipleOf", factor)
    # Integers are multiples of 1 as well, which llguidance forgets where it looks for a multiple
    # within the bounds.
    return _exact("multipleOf", Fraction(factor).numerator) if integers else exact


def _exact(key: str, number: int | float | Decimal) -> int | float:
    """Raises ValueError for a number that would come out as another one."""
    exact = _decimal(number)
    double = _nearest(exact)
    told = _told(double)
    if (
        told is None
        or exact.copy_abs() >= _INT64
        or any(read != exact for read in _readings(double))
    ):
        raise ValueError(
            f"{key}: the number {_short(exact)} cannot be kept exactly, as those below 2**63 of up "
            "to 15 digits can; a string can be of any digits"
        )
    return told


def _readings(double: float) -> tuple[Decimal, Decimal]:
    """A double as llguidance prints it, and as it counts with it where it is an integer."""
    printed = _decimal(double)
    return printed, Decimal(double) if double.is_integer() else printed


def is_number(value: Any) -> bool:
    """Whether it is a number of JSON."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _map_numbers(value: Any, change: Callable[[Any], int | float]) -> Any:
    if isinstance(value, list):
        return [_map_numbers(part, change) for part in value]
    if isinstance(value, dict):
        return {name: _map_numbers(part, change) for name, part in value.items()}
    return change(value) if is_number(value) else value


def _decimal(number: int | float | Decimal) -> Decimal:
    """As it is written; a double as the shortest text that makes it. Raises ValueError for NaN."""
    exact = Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
    if exact.is_nan():
        raise ValueError("NaN is no number of JSON")
    return exact


def _nearest(number: int | float | Decimal) -> float:
    """The nearest double that is finite."""
    most = Decimal(sys.float_info.max)
    return float(min(max(_decimal(number), most.copy_negate()), most))


def _told(double: float) -> int | float | None:
    """What is to be written so that llguidance reads this double. Its reader (serde_json's) is off
    by a step now and then, so that it may be one of the next; None if it is none of them."""
    if double.is_integer() and abs(double) < _INT64:
        return int(double)
    up, down = math.nextafter(double, math.inf), math.nextafter(double, -math.inf)
    return next((written for written in (double, up, down) if _as_read(written) == double), None)


def _as_read(double: float) -> float:
    """What serde_json makes of a double in its shortest form: its digits as a double, times a power
    of ten."""
    negative, digits, exponent = _decimal(double).as_tuple()
    assert isinstance(exponent, int)
    value = float(int("".join(map(str, digits))))
    while exponent:
        step = max(-308, min(308, exponent))
        value = value / float(f"1e{-step}") if step < 0 else value * float(f"1e{step}")
        exponent -= step
    return -value if negative else value


def plain(number: int | float | Decimal) -> int | float:
    """As JSON can have it, nearly. Integers that a double holds are integers."""
    double = _nearest(number)
    return int(double) if double.is_integer() and abs(double) <= _HELD else double


def _short(number: Decimal) -> str:
    return shortened(str(number), 40)

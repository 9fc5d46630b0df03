"""Limits on how many values the JSON of one request may hold, counted before it is parsed.

A string or a number is read in nanoseconds, and takes about as much memory as it has bytes. An
object, a list and a member of an object each take a hundred bytes of memory or more for the two or
three bytes that they may have in a body, and Python code looks at each of them later. So there are
two limits.

Knows: where JSON has commas, colons and brackets. Knows nothing of requests.
"""

from __future__ import annotations

import numpy as np

MAX_MEMBERS = 150_000
"""Maximum number of objects, lists and members of objects together in one request. A hundred tools
of twenty kilobytes have 50,000, and 4,096 short messages have 12,000. This many are parsed in 30
ms."""
MAX_ELEMENTS = 800_000
"""Maximum number of list elements beyond the first and object members beyond the first in one
request, which is the number of its commas. Four megabytes have room for 700,000 token ids of five
digits."""

_EXACT_ABOVE = 4096
"""Number of values up to which the count may include what stands inside strings, which is faster.
Strings of code and of JSON hold many of the characters that are counted, so above this number the
insides of strings are left out."""


class TooManyValuesError(ValueError):
    """Raised if a request holds too many values. The message is the predicate of a sentence ("is
    too much: ..."), which says what is allowed; whoever catches it puts the subject in front."""


class ValueBudget:
    """The remainder of both limits for one request, which its body and any JSON inside its strings
    use up together."""

    def __init__(self) -> None:
        self._members = MAX_MEMBERS
        self._elements = MAX_ELEMENTS

    def spend(self, data: bytes) -> None:
        """Count the values of a JSON text, and take them from what is left. For a text that is not
        valid JSON, the count is at least what would be parsed before the error. Raises
        TooManyValuesError if the text holds more than is left."""
        members, elements = _count(data)
        if members + elements > _EXACT_ABOVE:
            members, elements = _count(_outside_of_texts(data))
        self._members -= members
        self._elements -= elements
        if self._members < 0:
            raise TooManyValuesError(
                f"is too much: {MAX_MEMBERS - self._members} objects, lists and members of objects "
                f"are more than the {MAX_MEMBERS} that a request may hold; send less, or several "
                "requests"
            )
        if self._elements < 0:
            raise TooManyValuesError(
                f"is too much: {MAX_ELEMENTS - self._elements} values are more than the "
                f"{MAX_ELEMENTS} that a request may hold; send less, or several requests"
            )


def _count(data: bytes) -> tuple[int, int]:
    members = data.count(b":") + data.count(b"{") + data.count(b"[")
    return members, data.count(b",")


def _outside_of_texts(data: bytes) -> bytes:
    """Return JSON without its strings and the quotes that open them; the quotes that close them
    stay."""
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")  # each quote left opens or closes one
    characters = np.frombuffer(plain, np.uint8)
    inside = np.bitwise_xor.accumulate(characters == ord('"'))
    return characters[~inside].tobytes()

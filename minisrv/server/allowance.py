"""How many values the JSON of one request may hold, counted before anything is made of it.

A text or a number is read in nanoseconds, and is as long as its bytes. An object, a list and a
member of an object take a hundred bytes or more of memory for the two or three that they may have
in a body, and each is looked at in Python later. So there are two limits.

Knows: where JSON has commas, colons and brackets. Knows nothing of requests.
"""

from __future__ import annotations

import numpy as np

MAX_MEMBERS = 150_000
"""Members of objects, and objects and lists themselves, in one request. A hundred tools of twenty
kilobytes are 50,000, and 4,096 short messages 12,000. So many are parsed in 30 ms."""
MAX_ELEMENTS = 800_000
"""Elements of lists beyond the first, and members beyond the first, in one request. Four megabytes
have room for 700,000 token ids of five digits."""

_EXACT_ABOVE = 4096
"""Of what is counted wherever it stands, inside of texts too, as texts of code and of JSON have
many. Above that, what stands in texts is left out."""


class TooManyValuesError(ValueError):
    """The message says what is wrong with "it", and what is allowed."""


class Allowance:
    """What is left of both limits for one request: for its body, and for JSON in texts of it."""

    def __init__(self) -> None:
        self._members = MAX_MEMBERS
        self._elements = MAX_ELEMENTS

    def take(self, data: bytes) -> None:
        """Count what would be made of a JSON text; of one that is broken, at least what would be
        made up to there. Raises TooManyValuesError if it is more than is left."""
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
    """JSON without its texts, and without the quotes that close them."""
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")  # quotes that are left begin or end one
    characters = np.frombuffer(plain, np.uint8)
    inside = np.bitwise_xor.accumulate(characters == ord('"'))
    return characters[~inside].tobytes()

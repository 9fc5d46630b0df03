"""Who may ask, and how much of theirs may be open at once.

Every path needs a key, where there are any, but those of `OPEN_PATHS`. What a client sends is
compared by its digest, all of them every time, so that the time tells nothing; the path is that of
the request line, whatever headers say.

Knows: keys. Knows nothing of what is asked for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisrv.errors import AuthenticationError, KeyLimitError, RequestError
from minisrv.processes import map_shared

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What supervisors ask, and what tells nothing else."""

_SCHEME = "bearer "


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class ApiKeys:
    """The keys that are accepted; without any, everybody is."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, path: str, authorization: str) -> int | None:
        """The number of the key that a request comes with; None if it needs none.

        Raises AuthenticationError.
        """
        if not self._digests or path in OPEN_PATHS:
            return None
        bearer = authorization[: len(_SCHEME)].lower() == _SCHEME
        given = _digest(authorization[len(_SCHEME) :].strip() if bearer else "")
        found = [i for i, key in enumerate(self._digests) if hmac.compare_digest(given, key)]
        if not found or not bearer:
            raise AuthenticationError(
                "This server needs an API key, and what was sent is none of its own: send "
                "'Authorization: Bearer KEY'."
            )
        return found[0]


def owner(scope: Mapping[str, Any]) -> int | str:
    """Who takes turns with others: the number of a request's key, or without one its address.

    scope: ASGI's, with the `key` that `ApiKeys.check` has found.
    """
    if scope["key"] is not None:
        return int(scope["key"])
    host, _ = scope.get("client") or ("", 0)
    return str(host)


class KeyLimit:
    """How much each key has open, in a mapped file that all API workers count in: of a generation
    every choice, as each takes a place in the engine, and of any other work 1.

    Each worker writes to its own numbers only and reads all. It writes before it reads, so that of
    two that come in the same instant both may be refused, but never both let in.

    limit: of each key.
    """

    def __init__(self, path: Path, *, keys: int, limit: int, worker: int, workers: int) -> None:
        self._limit = limit
        size = 4 * keys * workers
        self._map = map_shared(path, size)
        counts = memoryview(self._map).cast("i")
        self._of_all = [counts[key::keys] for key in range(keys)]
        self._own = counts[worker * keys : (worker + 1) * keys]
        for key in range(keys):
            self._own[key] = 0  # a dead worker may have left something

    @contextmanager
    def places(
        self, key: int, number: int = 1, *, param: str | None = None, retry_after: int = 1
    ) -> Iterator[None]:
        """Count a request of so many choices while it is open.

        param: the field that asks for so many, for the error to name.
        retry_after: seconds, for a refusal.
        Raises RequestError for more than one key may ever have, KeyLimitError for more than it may
        have beside what is open.
        """
        if number > self._limit:
            raise RequestError(
                f"{param} asks for {number} choices at once, and one API key may have "
                f"{self._limit} open; send several requests, one behind another.",
                param=param,
            )
        self._own[key] += number
        try:
            taken = sum(self._of_all[key]) - number
            if taken + number > self._limit:
                raise KeyLimitError(
                    f"This API key has {taken} choices open of {self._limit} that it may have, and "
                    f"this request asks for {number}; try again when others have ended.",
                    retry_after=retry_after,
                )
            yield
        finally:
            self._own[key] -= number

"""API keys: who may send requests, and how much each key may have open at once.

If any keys are configured, every path needs one, except `OPEN_PATHS` and the files of the web page
(`minisrv.server.pages`). The digest of what a client sends
is compared with the digests of all keys every time, so that the time of a check reveals nothing.
The path that is checked is that of the request line, whatever the headers say.

Knows: keys. Knows nothing of what is asked for.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisrv.errors import AuthenticationError, KeyLimitError, RequestError
from minisrv.processes import map_shared

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
"""Paths that need no API key: health checks ask for them, and they reveal nothing else."""

_SCHEME = "bearer "


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class ApiKeys:
    """The API keys that are accepted; if there are none, every request is accepted.

    open_paths: paths that need no key.
    """

    def __init__(self, keys: Sequence[str], open_paths: Collection[str] = OPEN_PATHS) -> None:
        self._digests = [_digest(key) for key in keys]
        self._open_paths = open_paths

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, path: str, headers: Mapping[str, str]) -> int | None:
        """Return the index of the API key that a request carries; None if it carries no valid one
        and needs none.

        headers: the request's, by names in lower case. `authorization` comes before `x-api-key`,
            which Anthropic's clients send.
        Raises AuthenticationError.
        """
        if not self._digests:
            return None
        sent = headers.get("x-api-key")
        authorization = headers.get("authorization", "")
        if authorization[: len(_SCHEME)].lower() == _SCHEME:
            sent = authorization[len(_SCHEME) :]
        given = _digest((sent or "").strip())
        found = [i for i, key in enumerate(self._digests) if hmac.compare_digest(given, key)]
        if found:
            return found[0]
        if path in self._open_paths:
            return None
        raise missing_key()


def missing_key() -> AuthenticationError:
    """Return the error for a request without a key that it needs."""
    return AuthenticationError(
        "This server needs an API key, and what was sent is none of its own: send "
        "'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    )


def owner(scope: Mapping[str, Any]) -> int | str:
    """Return whom a request belongs to where clients take turns: the index of its API key, or the
    client's address if it has none.

    scope: the ASGI scope, with the `key` that `ApiKeys.check` has found.
    """
    if scope["key"] is not None:
        return int(scope["key"])
    host, _ = scope.get("client") or ("", 0)
    return str(host)


class KeyLimit:
    """Counts and limits what each API key has open, in a memory-mapped file that all API workers
    share. A generation counts once for each choice, as each takes a place in the engine; any other
    request counts once.

    Each worker writes only its own counters and reads those of all. It writes before it reads, so
    that two requests that arrive at the same instant may both be refused, but are never both let in
    above the limit.

    limit: maximum number that each key may have open.
    """

    def __init__(self, path: Path, *, keys: int, limit: int, worker: int, workers: int) -> None:
        self._limit = limit
        size = 4 * keys * workers
        self._map = map_shared(path, size)
        counts = memoryview(self._map).cast("i")
        self._of_all = [counts[key::keys] for key in range(keys)]
        self._own = counts[worker * keys : (worker + 1) * keys]
        for key in range(keys):
            self._own[key] = 0  # a worker that died may have left its counts here

    @contextmanager
    def places(
        self, key: int, number: int = 1, *, param: str | None = None, retry_after: int = 1
    ) -> Iterator[None]:
        """Count `number` choices of a request for as long as it is open.

        param: the field that asks for this many, for the error to name.
        retry_after: seconds after which a refused client should try again.
        Raises RequestError if `number` is more than one key may ever have open, KeyLimitError if it
        is more than fits beside what the key has open now.
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

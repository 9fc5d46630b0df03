"""`minisrv trace`: records the steps of a server to a file, as docs/trace.md describes them.

Each line is written as a whole when it has come, so that a file has only whole lines however the
recording ends, and the reader of a pipe sees steps as they come.

Knows: HTTP by the standard library, and which lines are steps. Knows nothing of what a step means.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import msgspec

from minisrv.config import TraceConfig
from minisrv.errors import AuthenticationError, ConfigError, EngineError

CONNECT_SECONDS = 30
"""Number of seconds within which a server must accept a connection and begin to answer."""

LONGEST_LINE = 1 << 24
"""Number of bytes beyond which a line is none of a trace."""

SHOW_SECONDS = 0.5
"""Interval in seconds at which the progress is shown on a terminal."""


class _Line(msgspec.Struct):
    """A line of the trace, with the fields that are used here."""

    type: str
    event: str = ""
    reason: str = ""
    to: int = 0
    from_: int = msgspec.field(default=0, name="from")


def record(config: TraceConfig, file: Path, key: str | None) -> None:
    """Record to a file, or to stdout for the name "-", until the configured time is over, enough
    steps have come, or Ctrl-C.

    key: the API key for the server, or None.

    Raises ConfigError if the file cannot be written or no server answers, AuthenticationError, and
    EngineError if the server ends the trace.
    """
    with ExitStack() as stack:
        connection = _connect(config)
        stack.callback(connection.close)
        sock = connection.sock  # behind an answer that ends the connection, the latter has none
        response = _ask(connection, config, key)
        out = sys.stdout.buffer if str(file) == "-" else stack.enter_context(_opened(file))
        _Recording(config, sock, response, out).run(str(file))


class _Recording:
    """One recording, from the first line to the last."""

    def __init__(
        self, config: TraceConfig, sock: socket.socket, response: HTTPResponse, out: BinaryIO
    ) -> None:
        self._config = config
        self._sock = sock
        self._response = response
        self._out = out
        self._stopped = False
        self._began = time.monotonic()
        self._shown = self._began
        self._steps = self._events = self._missed = 0

    def run(self, name: str) -> None:
        """Write lines until there is a reason to stop, and say on stderr what has been written.

        name: the name of the file.
        """
        ended = ""
        with _on_interrupt(self._stop), _after(self._config.seconds, self._stop):
            for text in self._lines():
                line = self._read(text)
                self._out.write(text)
                self._out.flush()
                if line.event == "end":
                    ended = line.reason
                self._count(line)
                if self._steps == self._config.steps:
                    break
            else:
                ended = ended or "the connection was lost."
        self._show(f"{self._steps} steps and {self._events} events written to {name}", last=True)
        if self._missed:
            print(f"{self._missed} steps came too fast to be read", file=sys.stderr)
        if ended and not self._stopped:
            raise EngineError(f"the server ended the trace: {ended}")

    def _read(self, text: bytes) -> _Line:
        try:
            return msgspec.json.decode(text, type=_Line)
        except (msgspec.MsgspecError, RecursionError):
            raise EngineError(
                f"--url {self._config.url}: what answers there is no trace of steps: {text[:60]!r}."
            ) from None

    def _lines(self) -> Iterator[bytes]:
        while not self._stopped:
            try:
                text = self._response.readline(LONGEST_LINE)
            except (HTTPException, OSError, ValueError):
                return
            if not text.endswith(b"\n"):
                return
            yield text

    def _stop(self) -> None:
        self._stopped = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _count(self, line: _Line) -> None:
        self._steps += line.type == "step"
        self._events += line.type == "event"
        if line.event == "gap":
            self._missed += line.to - line.from_ + 1
        now = time.monotonic()
        if now > self._shown + SHOW_SECONDS:
            self._shown = now
            self._show(f"{self._steps} steps, {now - self._began:.0f} s; Ctrl-C ends")

    def _show(self, text: str, *, last: bool = False) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last:
            print(text, file=sys.stderr)


def _connect(config: TraceConfig) -> HTTPConnection:
    """Return an open connection to the server. Raises ConfigError."""
    parts = urlsplit(config.url)
    kinds = {"http": HTTPConnection, "https": HTTPSConnection}
    try:
        kind, port = kinds[parts.scheme], parts.port
        host = parts.hostname or ""
        if not host:
            raise ValueError
    except (KeyError, ValueError):
        raise ConfigError(
            f"--url {config.url} is no address of a server; write http://127.0.0.1:8000."
        ) from None
    connection: HTTPConnection = kind(host, port, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
    except OSError as error:
        raise ConfigError(
            f"--url {config.url}: no server answers there ({error}); start one with `minisrv "
            "serve`, or name the address of one."
        ) from None
    return connection


def _ask(connection: HTTPConnection, config: TraceConfig, key: str | None) -> HTTPResponse:
    """Return the response that holds the trace. Raises AuthenticationError, ConfigError,
    EngineError."""
    prefix = urlsplit(config.url).path.rstrip("/").removesuffix("/v1")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        path = f"{prefix}/debug/steps?follow=true&limit={config.last}"
        connection.request("GET", path, headers=headers)
        sock = connection.sock
        response = connection.getresponse()
        sock.settimeout(None)  # an idle server sends nothing
    except (HTTPException, OSError) as error:
        raise ConfigError(f"--url {config.url}: the server does not answer ({error!r}).") from None
    if response.status == 200:
        return response
    message = _message(response)
    if response.status == 401:
        raise AuthenticationError(f"{message} This program sends the key in $MINISRV_API_KEY.")
    if response.status >= 500:
        raise EngineError(f"--url {config.url}: {message}")
    raise ConfigError(f"--url {config.url}: {message}")


def _message(response: HTTPResponse) -> str:
    """Return what an error says."""
    try:
        return str(json.load(response)["error"]["message"])
    except (ValueError, LookupError, TypeError, HTTPException, OSError):
        return f"what answers there has no trace of steps (status {response.status})."


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("wb")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}.") from error


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at Ctrl-C during the block, in place of an exception anywhere within it."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _after(seconds: float | None, stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` after some seconds of the block; None never does."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()

"""An HTTP/1.1 client over asyncio: only what a load generator needs, at the least cost per token.

Knows: how a request is written, how a response is framed, and connections that are kept alive.
Knows nothing of JSON, event streams, nor of what is measured. It follows no redirect, uses no
proxy, and asks for no compression.

A general client is not used because of its cost per token. Here a read is parsed and passed on
within the event loop's callback for it: its time is that of the read itself, and not that at which
a waiting task is scheduled after the reads of all other streams; and a task wakes once for a
response and not once for a token. There is no limit on connections: a limit would queue requests
inside the client and count that wait as the server's.
"""

import asyncio
import ssl
from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import Self, cast
from urllib.parse import SplitResult, quote, urlsplit

import httptools
import msgspec

from loadgen.records import clock

KEEPALIVE_S = 4.0
"""Seconds after which an idle connection is not used again: common servers close it after 5 s."""

_PORTS = {"http": 80, "https": 443}

Receive = Callable[[int, bytes, float], bool]
"""A function that is called with (status, bytes of the body, the time of `clock` at which they were
read); if it returns False, the rest of the response is not read."""


class HTTPError(Exception):
    """There was no response, or it was cut off, or the bytes received were no HTTP response."""


class ConnectError(HTTPError):
    """The server could not be reached; nothing was sent."""


class Head(msgspec.Struct, frozen=True):
    """A response without its headers and body."""

    status: int
    reason: str


class Client:
    """Sends requests, each over a connection that no other request uses at the same time. It
    belongs to one event loop."""

    def __init__(self, api_key: str | None) -> None:
        """Make a client.

        api_key: sent as a bearer token; printable ASCII.
        """
        self._headers = (
            "Accept: */*\r\nAccept-Encoding: identity\r\nUser-Agent: loadgen\r\n"
            "Content-Type: application/json\r\n"
        )
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: dict[tuple[str, str], list[_Connection]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()

    async def exchange(self, method: str, url: str, body: bytes, receive: Receive) -> Head:
        """Send a request, and return when its response is complete or `receive` returns False.

        url: the URL, in ASCII.
        receive: called with each part of the body as it is read.
        Raises HTTPError. There is no timeout; cancellation closes the connection.
        """
        parts = urlsplit(url)
        idle = self._idle.setdefault((parts.scheme, parts.netloc), [])
        connection = self._reusable(idle) or await self._connect(parts)
        head = (
            f"{method} {quote(parts.path, safe='/%')} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"{self._headers}Content-Length: {len(body)}\r\n\r\n"
        )
        try:
            found = await connection.exchange(head.encode() + body, receive)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            idle.append(connection)
        else:
            connection.close()
        return found

    @staticmethod
    def _reusable(idle: list["_Connection"]) -> "_Connection | None":
        """Remove and return the connection that has been idle for the shortest time; close those
        that have been idle for too long. None if there is none."""
        while idle:
            connection = idle.pop()
            if connection.reusable and clock() - connection.idle_since_s < KEEPALIVE_S:
                return connection
            connection.close()
        return None

    async def _connect(self, parts: SplitResult) -> "_Connection":
        assert parts.hostname is not None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection,
                parts.hostname,
                parts.port or _PORTS[parts.scheme],
                ssl=self._tls if parts.scheme == "https" else None,
            )
        except (OSError, UnicodeError) as error:  # the host name may be invalid
            raise ConnectError(f"cannot connect to {parts.netloc}: {error}") from None
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()


class _Connection(asyncio.Protocol):
    """One connection, with at most one request at a time. It also has the callbacks of the
    parser."""

    def __init__(self) -> None:
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._keep = False
        self._reply: asyncio.Future[Head]
        self._waiting = False
        self._receive: Receive
        self._now_s = 0.0
        self._status = 0
        self._reason = b""
        self._framed = False
        """Whether the headers of the response define where its body ends; if not, the end of the
        connection does."""

    async def exchange(self, request: bytes, receive: Receive) -> Head:
        """Send a request and receive its response, as in `Client.exchange`. The connection must be
        open, with no request on it."""
        assert self._transport is not None
        self._keep, self._status, self._receive = False, 0, receive
        self._reply = asyncio.get_running_loop().create_future()
        self._waiting = True
        self._transport.write(request)
        try:
            return await self._reply
        finally:
            self._waiting = False
            self.idle_since_s = clock()

    @property
    def reusable(self) -> bool:
        """Whether the connection is open and may carry another request."""
        return self._keep and self._transport is not None

    def close(self) -> None:
        """Close the connection at once, even during a request."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._waiting:
            if self._status >= 200 and not self._framed and error is None:
                self._end()
            else:
                reason = f": {error}" if error is not None else ""
                self._fail(f"the connection was closed before the response was whole{reason}")

    def data_received(self, data: bytes) -> None:
        self._now_s = clock()
        if not self._waiting:  # data without a request: the connection is not used again
            self._keep = False
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._waiting:
                self._fail(f"what came is no HTTP response: {error}")
            self._keep = False

    def _end(self) -> None:
        self._waiting = False
        if not self._reply.cancelled():  # the waiting task may be cancelled and not have run yet
            self._reply.set_result(Head(self._status, self._reason.decode(errors="replace")))

    def _fail(self, text: str) -> None:
        self._waiting = False
        if not self._reply.cancelled():
            self._reply.set_exception(HTTPError(text))

    def on_message_begin(self) -> None:
        if not self._waiting:  # another response follows the one that was asked for
            self._keep = False
        self._status, self._reason, self._framed = 0, b"", False

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._waiting and not self._receive(self._status, data, self._now_s):
            self._end()

    def on_message_complete(self) -> None:
        if self._status >= 200 and self._waiting:  # after a status below 200 another follows
            self._keep = self._parser.should_keep_alive()
            self._end()

"""HTTP/1.1 over asyncio: as little as a load generator needs, and as cheap as it can be.

Knows how a request is written, how a response is framed, and connections that are kept. Does not
know JSON, event streams, nor what is measured. Follows no redirect, uses no proxy, and asks for no
compression.

It is not a general client's because of what a token costs here. A read is parsed and handed on
within the loop's callback for it: its instant is the read's own, not that at which a waiting task
got its turn behind the reads of all other streams, and a task wakes once for a response and not
once for a token. There is no limit on connections: one would queue requests inside the client and
count the wait as the server's.
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
"""A connection idle for longer is not used again: common servers close it after 5 s."""

_PORTS = {"http": 80, "https": 443}

Receive = Callable[[int, bytes, float], bool]
"""Takes (status, bytes of the body, when they were read by `clock`); False ends the response."""


class HTTPError(Exception):
    """A response did not come, or not whole, or what came was none."""


class ConnectError(HTTPError):
    """The server could not be reached; nothing was sent."""


class Head(msgspec.Struct, frozen=True):
    """A response without its headers and body."""

    status: int
    reason: str


class Client:
    """Sends requests, each over a connection of its own while it lasts. For one event loop."""

    def __init__(self, api_key: str | None) -> None:
        """`api_key`, printable ASCII, is sent as a bearer token."""
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
        """Send a request and return when its response is whole, or `receive` wants no more.

        `url` is ASCII. Raises HTTPError. Has no timeout; cancelling closes the connection.
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
        """Take the connection that rested least; those that rested too long are closed."""
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
        except (OSError, UnicodeError) as error:  # a host's name may be none
            raise ConnectError(f"cannot connect to {parts.netloc}: {error}") from None
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()


class _Connection(asyncio.Protocol):
    """One connection with at most one request under way; also the parser's callbacks."""

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
        """Whether the body's end can be told from its headers."""

    async def exchange(self, request: bytes, receive: Receive) -> Head:
        """As `Client.exchange`; the connection is `reusable`."""
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
        """Whether it is open and may carry another request."""
        return self._keep and self._transport is not None

    def close(self) -> None:
        """Drop it, whatever is under way."""
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
        if not self._waiting:  # what nobody asked for
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
        if not self._reply.cancelled():  # whoever waited has not had its turn to say so
            self._reply.set_result(Head(self._status, self._reason.decode(errors="replace")))

    def _fail(self, text: str) -> None:
        self._waiting = False
        if not self._reply.cancelled():
            self._reply.set_exception(HTTPError(text))

    def on_message_begin(self) -> None:
        if not self._waiting:  # what nobody asked for, behind a response
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
        if self._status >= 200 and self._waiting:  # below, another response follows
            self._keep = self._parser.should_keep_alive()
            self._end()

"""uvicorn's HTTP protocol with bounds of its own, and with errors in OpenAI's shape.

The application never sees what is refused here: a request head that does not end, bytes that are
not HTTP or that two readers could understand in two ways, a client that takes too long.

Knows: uvicorn's protocol class and the framing of requests. Knows nothing of requests that can be
parsed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from minisrv.errors import shutting_down_error
from minisrv.server.connections import Connections
from minisrv.server.errors import JSON, error_response, http_error_response

MAX_HEAD_BYTES = 64 << 10
"""Maximum number of bytes of a request without its body; up to one read of the socket may come on
top."""

MAX_PIPELINED = 32
"""Maximum number of pipelined requests that wait behind the one being answered. Each costs as much
to parse as any other, and one read of the socket may hold thousands."""

LINGER_SECONDS = 10
"""Seconds for which data that a client still sends is read and dropped after its last response is
written. A socket that is closed while it has unread data is reset, which may make the client lose
the response."""

_LENGTH, _CODING = b"content-length", b"transfer-encoding"

_STATUS_LINE_BEGINS = b"HTTP/1.1 "
"""The first bytes of every response."""

_CHUNK_BEGINS = b"0"
"""A leading zero of a chunk's size, which any chunk may have, the last one included."""

_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#]*)")
"""Matches a request target in absolute form, which names a host as for a proxy, and captures the
host."""


class BoundedProtocol(HttpToolsProtocol):
    """The server's side of one connection."""

    opening: asyncio.Task[Any]
    """The task that opens the connection; it ends when there is a transport."""

    _head_bytes = 0
    """Bytes received since the last piece of a body or the end of a request: those of a head or of
    trailers."""

    _body_bytes = 0
    """Bytes of the body received for the request that was read last."""

    _in_body = False
    """Whether the head of the request that was read last is complete and its body is not."""

    _running: RequestResponseCycle | None = None
    """The request whose response is under way. uvicorn's `cycle` is the request that was read
    last."""

    _sends_no_more = False
    """Whether the client has closed its sending side."""

    _fault: str | None = None
    """Why the head that is being read is refused."""

    _last_answer: bytes | None = None
    """The response to input that cannot be read. It is sent when all requests before it are
    answered; nothing behind it is read."""

    _ended = False
    """Whether the last response is sent."""

    _replays_head = False
    """Whether the parser is being fed a head that was read before."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
    ) -> None:
        self._pieces: list[bytes] = []
        # The parser only collects the pieces of a body: it may come in chunks of one byte each, of
        # which one read holds tens of thousands.
        self.on_body = self._pieces.append  # type: ignore[assignment, method-assign]
        super().__init__(config, server_state, app_state)
        self._connections = connections

    def connection_lost(self, exc: Exception | None) -> None:
        # NOTE: uvicorn tells only the request that was read last that the client is gone; the one
        # that is running would go on.
        if self._running is not None:
            _disconnect(self._running)
        self._connections.closed(self)
        super().connection_lost(exc)
        # NOTE: uvicorn leaves its keep-alive timer in place if the client has reset the connection,
        # and all that this object holds would stay in memory until the timer fires.
        self._unset_keepalive_if_required()

    # ---- reading ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._ended or self._last_answer is not None:
            return
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            fault = self._fault or "Invalid HTTP request received."
            self.logger.warning("%s", fault)
            self._refuse(http_error_response(400, fault))
        if self._head_bytes > MAX_HEAD_BYTES and self._last_answer is None:
            fault = f"The request's line and headers must have at most {MAX_HEAD_BYTES} bytes."
            self._refuse(http_error_response(431, fault))

    def _parse(self, data: bytes) -> None:
        """Feed data to the parser. Raises HttpParserError."""
        while data:
            try:
                self.parser.feed_data(data)
                self._take_pieces()
                return
            except httptools.HttpParserUpgrade as upgrade:
                # For llhttp, what follows the head is not HTTP any more. As no upgrade is
                # supported, it is the request's body (RFC 9110, 7.8).
                data = data[upgrade.args[0] :]
                self._read_on()

    def _read_on(self) -> None:
        """Let a new parser read what follows the head that was read last."""
        framing = [header for header in self.headers if header[0] in (_LENGTH, _CODING)]
        if not self.cycle.keep_alive:
            framing.append((b"connection", b"close"))
        lines = [b"POST / HTTP/1.1", *(b": ".join(header) for header in framing), b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # uvicorn does the same
        self._replays_head = True
        self.parser.feed_data(b"\r\n".join(lines))
        self._replays_head = False

    def on_message_begin(self) -> None:
        if not self._replays_head:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._replays_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replays_head:
            return
        if not self._in_body:
            super().on_header(name, value.rstrip(b" \t"))  # llhttp strips on the left only
        elif name.lower() == b"connection":
            # llhttp obeys this header, and would read nothing more although the response promises
            # that the connection is kept.
            self._fault = "A trailer must not hold 'connection'."
            raise ValueError(self._fault)
        # Other trailers are ignored: code that looked at the head has not seen them.

    def on_headers_complete(self) -> None:
        if self._replays_head:
            return
        self._fault = self._fault_of_head()
        if self._fault is not None:
            raise ValueError(self._fault)
        # NOTE: the host in the request line takes precedence over the Host header (RFC 9112,
        # 3.2.2).
        if absolute := _ABSOLUTE_FORM.match(self.url):
            httptools.parse_url(self.url)  # raises HttpParserError for a malformed host
            self.headers[:] = [
                (name, absolute[1] if name == b"host" else value) for name, value in self.headers
            ]
            path = self.url[absolute.end() :]
            self.url = path if path.startswith(b"/") else b"/" + path
        super().on_headers_complete()
        self.cycle.transport = _ResponseTransport(self.transport, self._end)  # type: ignore[assignment]
        if self.parser.get_http_version() == "1.0":
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[assignment, method-assign]
        self._in_body = True
        self._body_bytes = 0
        if not self.pipeline:
            self._running = self.cycle
            self._connections.wait_for_body(self)

    def _fault_of_head(self) -> str | None:
        """Return why a head is refused, or None; mostly because another reader, such as a proxy,
        may have understood it in another way."""
        lengths = [value for name, value in self.headers if name == _LENGTH]
        codings = [value.lower() for name, value in self.headers if name == _CODING]
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return f"HTTP/{version} is not supported; use HTTP/1.1."
        if self.parser.get_method() == b"CONNECT":
            return "CONNECT is not supported; this server is no proxy."
        if len(self.pipeline) == MAX_PIPELINED:
            return f"At most {MAX_PIPELINED} requests may wait on a connection."
        if len(lengths) + len(codings) > 1:
            return "A request must have one content-length or one transfer-encoding."
        if codings and (codings != [b"chunked"] or version == "1.0"):
            return "The transfer-encoding must be chunked, and the request HTTP/1.1."
        return None

    def _take_pieces(self) -> None:
        """Pass the collected pieces of a body on to the application."""
        if self._pieces:
            body = b"".join(self._pieces)
            self._pieces.clear()
            self._head_bytes = 0
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # llhttp reports the end of a head with Upgrade as the end of the request
        self._take_pieces()
        self._head_bytes = 0
        self._in_body = False
        super().on_message_complete()
        self._wait()

    # ---- answering ----------------------------------------------------------------------------

    @property
    def _answers(self) -> bool:
        """Whether a response is under way."""
        return self._running is not None and not self._running.response_complete

    def on_response_complete(self) -> None:
        if self._ended:
            return
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        # NOTE: `Connections.end_late_connections` ends silent connections. uvicorn's timer would
        # also end a connection whose next request has arrived but was not read yet because the
        # worker was held up.
        self._unset_keepalive_if_required()
        if not self._answers and (self._sends_no_more or self._last_answer is not None):
            self._end()
        else:
            self._wait()

    def _end(self) -> None:
        """Send the last response, if there is one, and close the connection behind it."""
        if self._ended:
            return
        self._ended = True
        more_may_come = self._in_body or self._last_answer is not None
        self.transport.write(self._last_answer or b"")
        if more_may_come and not self._sends_no_more and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._connections.wait_for_head(self)
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                LINGER_SECONDS, self.timeout_keep_alive_handler
            )
        else:
            self.transport.close()

    def _wait(self) -> None:
        """Tell `Connections` what the connection waits for."""
        if self._in_body and self._running is self.cycle:
            self._connections.wait_for_body(self)
        elif self._answers and self.flow.write_paused:
            self._connections.wait_for_reader(self)
        elif self._answers:
            self._connections.wait_for_nothing(self)
        else:
            self._connections.wait_for_head(self)

    def pause_writing(self) -> None:
        """The client does not read what was sent."""
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        """It has read some of it."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._wait()

    def _refuse(self, response: JSON) -> None:
        """Answer input that cannot be read, after the responses to the requests before it, and
        close the connection."""
        response.headers["connection"] = "close"
        status = HTTPStatus(response.status_code)
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self._last_answer = b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
        if self._in_body and not self._withdraw():
            self._last_answer = b""  # the response to that request has begun already
        if not self._answers:
            self._end()

    def _withdraw(self) -> bool:
        """Drop the request whose body is being read; return whether no response to it had begun."""
        self._in_body = False
        if self.cycle is not self._running:
            self.pipeline.popleft()
            return True
        self._running = None
        _disconnect(self.cycle)
        return not self.cycle.response_started

    # ---- clients that go away or take too long -------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: a client may close its sending side and go on reading.

        A client that is gone has sent the same end-of-file. The first bytes of the coming response
        tell the two apart, as they would be the same for any response: the operating system of a
        client that is gone answers them with a reset. Behind the head of a response there are such
        bytes only if it comes in chunks; otherwise its next piece tells.
        """
        if self._ended or self.scheme == "https":  # asyncio closes both directions of TLS
            return False
        if self._in_body and self.cycle is not self._running:
            self._withdraw()
        if self._in_body or not self._answers:
            return False
        assert self._running is not None
        self._sends_no_more = True
        transport = cast(_ResponseTransport, self._running.transport)
        if not self._running.response_started:
            transport.begin(_STATUS_LINE_BEGINS)
        elif self._running.chunked_encoding:
            transport.write(_CHUNK_BEGINS)
        file: int = self.transport.get_extra_info("socket").fileno()
        self._connections.abort_if_reset(file, self)
        return True

    @property
    def _is_open(self) -> bool:
        """Whether the TLS handshake, if there is one, is over and the connection is not closed."""
        return self in self.connections

    def abort(self) -> None:
        """Close the connection at once, whatever it does."""
        if self._is_open:
            self.transport.abort()
        else:
            self.opening.cancel()

    def time_out(self) -> None:
        """End the connection, as the client took too long to send."""
        if not self._is_open:
            self.opening.cancel()
        elif self.transport.get_write_buffer_size():
            self._connections.wait_for_head(self)  # data is unsent: TCP_USER_TIMEOUT covers it
        elif not self._ended and (self._in_body or self._head_bytes):
            self._refuse(http_error_response(408, "The request did not arrive in time."))
        else:
            self.transport.close()

    def give_up(self) -> None:
        """Stop waiting for a body: the server has no time left to answer."""
        if self._in_body and not self._ended:
            self._refuse(error_response(shutting_down_error()))

    def body_bytes(self) -> int | None:
        """Return how many bytes of the body have arrived; None if no body is read at the moment."""
        return None if self.flow.read_paused else self._body_bytes


class _ResponseTransport:
    """The transport that a response is written to, with another way to close it."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write: Callable[[bytes], None] = transport.write
        self.is_closing = transport.is_closing
        self.close = close

    def begin(self, first: bytes) -> None:
        """Send the first bytes of the next write in advance; that write then sends only the
        rest."""
        write = self.write

        def rest(data: bytes) -> None:
            self.write = write
            write(data[len(first) :])

        write(first)
        self.write = rest


def _without_chunks(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """Return a `send` for a client of HTTP/1.0, which cannot read chunks: a response whose length
    is not known ends with the connection."""
    sized = True

    async def send(message: Any) -> None:
        nonlocal sized
        if message["type"] == "http.response.start":
            sized = any(name.lower() == _LENGTH for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = None if sized else False
        elif not sized:
            # NOTE: uvicorn checks that the body has the promised length; here, each piece has its
            # own.
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)

    return send


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell the application that the client of a request is gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()

"""uvicorn's HTTP protocol with bounds of its own, and with errors in OpenAI's shape.

The application never sees what is refused here: a head that does not end, bytes that are no HTTP or
that two readers could understand in two ways, a client that takes too long.

Knows: uvicorn's protocol class and the framing of requests. Knows nothing of requests that can be
parsed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from minisrv.errors import time_is_over
from minisrv.server.connections import Connections
from minisrv.server.errors import JSON, error_response, http_error_response

MAX_HEAD_BYTES = 64 << 10
"""Of a request without its body; one read of the socket may come on top."""

MAX_PIPELINED = 32
"""Requests behind the one that is answered. Each costs as much as any other to parse, and a read
of the socket may hold thousands."""

LINGER_SECONDS = 10
"""For which what a client still sends is read and dropped when its last answer is written. A socket
that is closed with something unread is reset, and a client may lose the answer by that."""

_LENGTH, _CODING = b"content-length", b"transfer-encoding"

_STATUS_LINE_BEGINS = b"HTTP/1.1 "
"""As every answer does."""

_CHUNK_BEGINS = b"0"
"""As the size of any chunk may, the last one's included."""

_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#]*)")
"""A request's target that names a host, as for a proxy, and which."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    opening: asyncio.Task[Any]
    """Ends when there is a transport."""

    _head_bytes = 0
    """Received since the last piece of a body or end of a request: a head, or trailers."""

    _body_bytes = 0
    """Received of the request that was read last."""

    _in_body = False
    """The head of the request that was read last is complete, and its body is not."""

    _running: RequestResponseCycle | None = None
    """Whose response is under way. uvicorn's `cycle` is the request that was read last."""

    _sends_no_more = False
    """The client has closed its sending side."""

    _fault: str | None = None
    """Why the head that is read is refused."""

    _last_answer: bytes | None = None
    """To what cannot be read. It is sent when all before it is answered; nothing is read behind it.
    """

    _ended = False
    """The last answer is sent."""

    _replays_head = False
    """The parser is told of a head that it has read before."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
    ) -> None:
        self._pieces: list[bytes] = []
        # A body may come in chunks of a byte each, of which a read holds tens of thousands.
        self.on_body = self._pieces.append  # type: ignore[assignment, method-assign]
        super().__init__(config, server_state, app_state)
        self._connections = connections

    def connection_lost(self, exc: Exception | None) -> None:
        # NOTE: uvicorn tells the request that was read last, and the one that runs went on.
        if self._running is not None:
            _disconnect(self._running)
        self._connections.closed(self)
        super().connection_lost(exc)
        # NOTE: uvicorn leaves it where the client has reset the connection, and all that this holds
        # would stay until then.
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
        """Raises HttpParserError."""
        while data:
            try:
                self.parser.feed_data(data)
                self._take_pieces()
                return
            except httptools.HttpParserUpgrade as upgrade:
                # What is behind the head is for llhttp no HTTP any more. No upgrade is supported,
                # so that it is the body (RFC 9110, 7.8).
                data = data[upgrade.args[0] :]
                self._read_on()

    def _read_on(self) -> None:
        """Let another parser read what follows the head that was read last."""
        framing = [header for header in self.headers if header[0] in (_LENGTH, _CODING)]
        if not self.cycle.keep_alive:
            framing.append((b"connection", b"close"))
        lines = [b"POST / HTTP/1.1", *(b": ".join(header) for header in framing), b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
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
            # llhttp heeds it, and would read nothing more while the answer promises that we do.
            self._fault = "A trailer must not hold 'connection'."
            raise ValueError(self._fault)
        # Others are ignored: whoever has looked at the head has not seen them.

    def on_headers_complete(self) -> None:
        if self._replays_head:
            return
        self._fault = self._fault_of_head()
        if self._fault is not None:
            raise ValueError(self._fault)
        # NOTE: what the request line names goes before what Host says (RFC 9112, 3.2.2).
        if absolute := _ABSOLUTE_FORM.match(self.url):
            self.headers[:] = [
                (name, absolute[1] if name == b"host" else value) for name, value in self.headers
            ]
            path = self.url[absolute.end() :]
            self.url = path if path.startswith(b"/") else b"/" + path
        super().on_headers_complete()
        self.cycle.transport = _Wire(self.transport, self._end)  # type: ignore[assignment]
        self._in_body = True
        self._body_bytes = 0
        if not self.pipeline:
            self._running = self.cycle
            self._connections.wait_for_body(self)

    def _fault_of_head(self) -> str | None:
        """Why a head is refused: mostly as another reader, such as a proxy, may have understood it
        in another way."""
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
        """Hand on what has come of a body."""
        if self._pieces:
            body = b"".join(self._pieces)
            self._pieces.clear()
            self._head_bytes = 0
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # llhttp takes the end of the head for it
        self._take_pieces()
        self._head_bytes = 0
        self._in_body = False
        super().on_message_complete()
        self._wait()

    # ---- answering ----------------------------------------------------------------------------

    @property
    def _answers(self) -> bool:
        """A response is under way."""
        return self._running is not None and not self._running.response_complete

    def on_response_complete(self) -> None:
        if self._ended:
            return
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        # NOTE: a sweep ends a connection that is silent. uvicorn's timer would end it as well where
        # the next request has come, but was not read yet as the worker was held up.
        self._unset_keepalive_if_required()
        if not self._answers and (self._sends_no_more or self._last_answer is not None):
            self._end()
        else:
            self._wait()

    def _end(self) -> None:
        """Close the connection behind the last answer."""
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
        """Tell whom the connection waits for."""
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
        """Answer what cannot be read, behind the answers to what came before it, and close."""
        response.headers["connection"] = "close"
        status = HTTPStatus(response.status_code)
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self._last_answer = b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body)
        if self._in_body and not self._withdraw():
            self._last_answer = b""  # that request has its answer
        if not self._answers:
            self._end()

    def _withdraw(self) -> bool:
        """Take back the request whose body is read; whether no answer to it had begun."""
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

        One that is gone has sent the same. The first bytes of what comes next in any case tell
        them apart: the system of a client that is gone answers them with a reset.
        """
        if self._ended or self.scheme == "https":  # where asyncio ends both directions together
            return False
        if self._in_body and self.cycle is not self._running:
            self._withdraw()
        if self._in_body or not self._answers:
            return False
        assert self._running is not None
        self._sends_no_more = True
        wire = cast(_Wire, self._running.transport)
        if not self._running.response_started:
            wire.begin(_STATUS_LINE_BEGINS)
        elif self._running.chunked_encoding:
            wire.write(_CHUNK_BEGINS)
        file: int = self.transport.get_extra_info("socket").fileno()
        self._connections.abort_if_reset(file, self)
        return True

    @property
    def _is_open(self) -> bool:
        """The TLS handshake is over, if there is one, and the connection is not closed."""
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
            self._connections.wait_for_head(self)  # it reads, and the kernel sees to that
        elif not self._ended and (self._in_body or self._head_bytes):
            self._refuse(http_error_response(408, "The request did not arrive in time."))
        else:
            self.transport.close()

    def give_up(self) -> None:
        """Wait for no body any more: the server has no time left to answer."""
        if self._in_body and not self._ended:
            self._refuse(error_response(time_is_over()))

    def body_bytes(self) -> int | None:
        """How much of a body has come; None if it is not read at the moment."""
        return None if self.flow.read_paused else self._body_bytes


class _Wire:
    """Where a response goes: its transport, with another way to close."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write: Callable[[bytes], None] = transport.write
        self.is_closing = transport.is_closing
        self.close = close

    def begin(self, first: bytes) -> None:
        """Send the first bytes of what is written next."""
        write = self.write

        def rest(data: bytes) -> None:
            self.write = write
            write(data[len(first) :])

        write(first)
        self.write = rest


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell the application that the client of a request is gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()

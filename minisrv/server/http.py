"""uvicorn's HTTP protocol with bounds of its own, and with errors in OpenAI's shape.

The application never sees what is refused here: a head that does not end, and bytes that are no
HTTP. It also bounds what a client can hold by not reading.

Knows: uvicorn's protocol class. Knows nothing of requests that can be parsed.
"""

from __future__ import annotations

import socket
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from minisrv.server.errors import http_error_response

MAX_HEAD_BYTES = 64 << 10
"""Of a request without its body; one read of the socket may come on top."""

STALLED_SECONDS = 30
"""After which a client that reads nothing of what was sent to it, or has vanished from the network,
loses its connection. Until then a stream holds what was generated for it, at most a context."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    """Received since the last piece of a body or end of a request: a head, or trailers."""

    _running: RequestResponseCycle | None = None
    """Whose response is under way. uvicorn's `cycle` is the request that was read last."""

    def connection_lost(self, exc: Exception | None) -> None:
        # NOTE: uvicorn tells the request that was read last, and the one that runs went on.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"The request's line and headers must have at most {MAX_HEAD_BYTES} bytes.",
            )

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        response = http_error_response(status, message, {"connection": "close"})
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()


def bound_writes(listener: socket.socket) -> None:
    """Let the kernel cut connections of `listener` whose clients stall: see STALLED_SECONDS."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)

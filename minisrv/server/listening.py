"""uvicorn's server with an accept loop of its own, which accepts only as many connections as there
is room for.

The event loop's own accept loop does not do that: when file descriptors run out, it accepts no
connections for a while, or closes those that come, and it hands a connection over only when its TLS
handshake is complete.

Knows: uvicorn's server and listening sockets. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn

from minisrv.server.connections import Connections
from minisrv.server.http import BoundedProtocol

logger = logging.getLogger("minisrv.server")

STALLED_SECONDS = 30
"""Seconds after which a client that reads nothing of what was sent to it, or has vanished from the
network, loses its connection. Until then a stream keeps the output generated for it in memory,
which is at most a context's worth."""

BACKLOG = 2048
"""Connections that the kernel queues until they are accepted."""

ACCEPT_AGAIN_SECONDS = 1
"""Seconds after which a worker tries to accept again if it had no room, or the system had no file
descriptor or memory left."""

_TICKS_A_SECOND = 10
"""Calls of `on_tick` that uvicorn makes a second."""


class HttpServer(uvicorn.Server):
    """uvicorn's server, serving one listening socket, within bounds."""

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, connections: Connections
    ) -> None:
        super().__init__(config)
        self.connections = connections
        self._listener = listener
        self._again: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets=[])
        # The accepted sockets inherit this option.
        self._listener.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000
        )
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._resume()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections, and shut down as uvicorn does."""
        self._pause()
        self._listener.close()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Check the connections once a second."""
        if counter % _TICKS_A_SECOND == 0:
            self.connections.end_late_connections()
        return await super().on_tick(counter)

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _pause(self) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()

    def _accept(self) -> None:
        """Accept one connection. The next one is accepted after everything else that is ready in
        the event loop has run."""
        loop = asyncio.get_running_loop()
        client = None
        if self.connections.make_room():
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("a connection cannot be accepted: %s", error.strerror)
        if client is None:
            self._pause()
            self._again = loop.call_later(ACCEPT_AGAIN_SECONDS, self._resume)
            return
        protocol = BoundedProtocol(self.config, self.server_state, {}, self.connections)
        self.connections.wait_for_head(protocol)
        protocol.opening = loop.create_task(
            loop.connect_accepted_socket(lambda: protocol, client, ssl=self.config.ssl)
        )

        def opened(opening: asyncio.Task[Any]) -> None:
            if opening.cancelled() or opening.exception() is not None:
                self.connections.closed(protocol)
                client.close()

        protocol.opening.add_done_callback(opened)

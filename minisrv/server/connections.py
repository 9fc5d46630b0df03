"""The connections of an API worker: how many are open, how long each may wait for its client, and
which one is closed to make room.

From the end of a request to the end of its response, a connection waits for the server, and nothing
here ends it. At other times it waits for its client: for a TLS handshake and the head of a request,
for a body, or for it to read what was sent.

Knows: file descriptors and the order of events. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import resource
import select
import sys
from collections import OrderedDict
from typing import Protocol

HEAD_SECONDS = 30
"""Seconds from the opening of a connection, or the end of a response on it, to the end of the next
request's head, a TLS handshake included. This is longer than most clients keep an idle connection
(httpx 5 s, aiohttp 15 s), as they would otherwise send a request while it is closed."""

BODY_SECONDS = 30
"""Seconds from the end of its head that any body may take."""

BODY_BYTES_PER_SECOND = 32 << 10
"""Rate at which larger bodies must arrive: each byte received extends the time limit accordingly.
It is a quarter of what a line with 1 Mbit/s brings."""

MAX_WAITING = 8192
"""Maximum number of a worker's connections that wait for their clients; they take memory, and
nothing else bounds them. Those that wait for the worker are no more than the requests that the
engine runs and queues."""

RESERVED_DESCRIPTORS = 128
"""File descriptors kept free for what is no client's connection: the engine's sockets, files, and
sockets that are closing."""


RESERVED_CONNECTIONS = 32
"""Connections kept free for requests that are answered at once, such as those of health checks."""


class Connection(Protocol):
    """The operations that a connection offers."""

    def abort(self) -> None:
        """Close the connection at once, whatever it does."""

    def time_out(self) -> None:
        """End the connection, as its client took too long."""

    def body_bytes(self) -> int | None:
        """Return how many bytes of the body have arrived; None if no body is read at the moment."""


class Connections:
    """Keeps track of every open connection of a worker.

    limit: how many may be open. Above it, or above MAX_WAITING connections that wait for their
        clients, the connection that has waited longest is closed; one that sends a body is closed
        only if none waits for the head of a request, and one that does not read its response only
        if no other waits.

    Time is counted in sweeps, of which there is one a second: no client counts as late because the
    worker was held up.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Set the limit; None takes what the limit on file descriptors leaves."""
        self.limit = _limit() if limit is None else limit
        self._open: set[Connection] = set()
        # Each with the number of the sweep at which its wait began, oldest first.
        self._heads: OrderedDict[Connection, int] = OrderedDict()
        self._bodies: OrderedDict[Connection, int] = OrderedDict()
        self._readers: OrderedDict[Connection, int] = OrderedDict()
        self._now = 0
        self._resets = select.epoll()
        self._watched: dict[int, Connection] = {}
        self._files: dict[Connection, int] = {}
        """The file descriptor of each watched connection: the inverse of `_watched`."""

    @property
    def max_served(self) -> int:
        """Maximum number of connections that may wait for the server for as long as a generation
        takes."""
        return max(1, self.limit - RESERVED_CONNECTIONS)

    def wait_for_head(self, connection: Connection) -> None:
        """Note that a connection, which may be new, waits for the head of a request."""
        self.wait_for_nothing(connection)
        self._open.add(connection)
        self._heads[connection] = self._now

    def wait_for_body(self, connection: Connection) -> None:
        """Note that a connection waits for the rest of a request."""
        self.wait_for_nothing(connection)
        self._bodies[connection] = self._now

    def wait_for_reader(self, connection: Connection) -> None:
        """Note that a connection waits until its client has read some of a response; the kernel's
        timeout bounds how long."""
        self.wait_for_nothing(connection)
        self._readers[connection] = self._now

    def wait_for_nothing(self, connection: Connection) -> None:
        """Note that a connection does not wait for its client."""
        for line in self._waiting_queues:
            line.pop(connection, None)

    @property
    def _waiting_queues(self) -> tuple[OrderedDict[Connection, int], ...]:
        """The connections that wait for their clients, in the order in which they give way."""
        return self._heads, self._bodies, self._readers

    def closed(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self.wait_for_nothing(connection)
        self._open.discard(connection)
        file = self._files.pop(connection, None)
        if file is not None and self._watched.get(file) is connection:
            del self._watched[file]

    def make_room(self) -> bool:
        """Whether one more connection may be opened; if need be, another is closed to make room."""
        waiting = sum(map(len, self._waiting_queues))
        if len(self._open) < self.limit and waiting < MAX_WAITING:
            return True
        for line in self._waiting_queues:
            if line:
                oldest = next(iter(line))
                self.closed(oldest)
                oldest.abort()
                return True
        return False

    def end_late_connections(self) -> None:
        """End the connections whose clients took too long. Must be called once a second."""
        self._now += 1
        late = []
        for connection, since in self._heads.items():
            if self._now - since <= HEAD_SECONDS:
                break  # those behind it began to wait later, so they are not late either
            late.append(connection)
        for connection, since in self._bodies.items():
            received = connection.body_bytes()
            if received is None:
                self._bodies[connection] = since + 1
            elif self._now - since > BODY_SECONDS + received / BODY_BYTES_PER_SECOND:
                late.append(connection)
        for connection in late:
            connection.time_out()

    def abort_if_reset(self, file: int, connection: Connection) -> None:
        """Watch a socket on which the client has closed its sending side, so that all it sends has
        been read: the event loop no longer polls it and would not see a reset."""
        if not self._watched:
            asyncio.get_running_loop().add_reader(self._resets.fileno(), self._abort_reset)
        self._resets.register(file, 0)  # with no events asked for, epoll still reports errors
        self._watched[file] = connection
        self._files[connection] = file

    def _abort_reset(self) -> None:
        for file, _ in self._resets.poll(0):
            self._resets.unregister(file)
            if connection := self._watched.pop(file, None):
                connection.abort()


def _limit() -> int:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if most == resource.RLIM_INFINITY else max(1, most - RESERVED_DESCRIPTORS)

"""The connections of a worker: how many are open, how long each may wait for its client, and which
is closed to make room.

From the end of a request to the end of its answer a connection waits for the server, and nothing
here ends it. Otherwise it waits for its client: for a TLS handshake and a head, for a body, or to
read what was sent to it.

Knows: descriptors and the order of things. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import resource
import select
import sys
from collections import OrderedDict
from typing import Protocol

HEAD_SECONDS = 30
"""From the opening of a connection or the end of an answer to the end of the next head, a TLS
handshake included. Longer than most clients keep a connection that is idle, or they would send a
request while it is closed: httpx 5 s, aiohttp 15 s.
"""

BODY_SECONDS = 30
"""What any body may take from the end of its head."""

BODY_BYTES_PER_SECOND = 32 << 10
"""What must come of a longer one on the average: a quarter of what a line with 1 Mbit/s brings."""

MAX_WAITING = 8192
"""Connections of a worker that wait for their clients, which take memory and nothing else bounds.
Those that wait for the worker are no more than the requests that the engine runs and queues."""

RESERVED_DESCRIPTORS = 128
"""For what is no client's connection: the engine's sockets, files, and sockets that are closing."""


RESERVED_CONNECTIONS = 32
"""For requests that are answered at once, as supervisors ask them."""


class Connection(Protocol):
    """What can be asked of a connection."""

    def abort(self) -> None:
        """Close it at once, whatever it does."""

    def time_out(self) -> None:
        """End it, as its client took too long."""

    def body_bytes(self) -> int | None:
        """How much of a body has come; None if it is not read at the moment."""


class Connections:
    """Every open connection of a worker.

    limit: how many may be open. Beyond it, and beyond MAX_WAITING of those that wait for their
        clients, the one that has waited longest is closed; one that sends a body, only if none
        waits for a head, and one that does not read its answer, only if no other waits.
    Time is counted in sweeps, one a second: no client is late while the worker was held up.
    """

    def __init__(self, limit: int | None = None) -> None:
        """limit: None takes what the limit on descriptors leaves."""
        self.limit = _limit() if limit is None else limit
        self._open: set[Connection] = set()
        # With the sweep at which the wait began, oldest first.
        self._heads: OrderedDict[Connection, int] = OrderedDict()
        self._bodies: OrderedDict[Connection, int] = OrderedDict()
        self._readers: OrderedDict[Connection, int] = OrderedDict()
        self._now = 0
        self._resets = select.epoll()
        self._watched: dict[int, Connection] = {}
        self._files: dict[Connection, int] = {}
        """The other way round."""

    @property
    def most_lasting(self) -> int:
        """How many may wait for the server as long as it takes to generate."""
        return max(1, self.limit - RESERVED_CONNECTIONS)

    def wait_for_head(self, connection: Connection) -> None:
        """A connection, perhaps a new one, waits for its client to ask."""
        self.wait_for_nothing(connection)
        self._open.add(connection)
        self._heads[connection] = self._now

    def wait_for_body(self, connection: Connection) -> None:
        """It waits for the rest of a request."""
        self.wait_for_nothing(connection)
        self._bodies[connection] = self._now

    def wait_for_reader(self, connection: Connection) -> None:
        """It waits until its client has read some of an answer; the kernel sees to how long."""
        self.wait_for_nothing(connection)
        self._readers[connection] = self._now

    def wait_for_nothing(self, connection: Connection) -> None:
        """It does not wait for its client."""
        for line in self._lines:
            line.pop(connection, None)

    @property
    def _lines(self) -> tuple[OrderedDict[Connection, int], ...]:
        """Those that wait for their clients, in the order in which they give way."""
        return self._heads, self._bodies, self._readers

    def closed(self, connection: Connection) -> None:
        """Forget it."""
        self.wait_for_nothing(connection)
        self._open.discard(connection)
        file = self._files.pop(connection, None)
        if file is not None and self._watched.get(file) is connection:
            del self._watched[file]

    def make_room(self) -> bool:
        """Whether one more may be opened, if need be in the place of another."""
        waiting = sum(map(len, self._lines))
        if len(self._open) < self.limit and waiting < MAX_WAITING:
            return True
        for line in self._lines:
            if line:
                oldest = next(iter(line))
                self.closed(oldest)
                oldest.abort()
                return True
        return False

    def sweep(self) -> None:
        """End the connections whose clients took too long. To be called once a second."""
        self._now += 1
        late = []
        for connection, since in self._heads.items():
            if self._now - since <= HEAD_SECONDS:
                break  # nor are those behind it
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
        """Watch a socket of which all is read that its client will send: the event loop looks at it
        no more, and would not see it reset."""
        if not self._watched:
            asyncio.get_running_loop().add_reader(self._resets.fileno(), self._abort_reset)
        self._resets.register(file, 0)  # errors are always told
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

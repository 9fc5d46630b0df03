"""Carries bytes between strangers and a socket that trusts whoever reaches it.

zmq accepts everybody who connects, keeps every subscription that it is sent, and holds all parts of
a message in memory until the last one has come, which need not come at all. It has no limit for any
of these, so a stranger could take all descriptors and all memory of the process. So zmq listens in
a private directory only, and strangers reach it through a relay, which bounds four things:

- connections: whoever comes when there are `MAX_PEERS` at an endpoint is disconnected at once;
- bytes: a peer that has sent more than `MAX_RECEIVED` on a connection is disconnected;
- time: a peer that takes nothing of what is for it in `READ_SECONDS` is disconnected;
- its own work: what comes in is read in turns with pauses between them, `MAX_READ` bytes of each
  peer in a turn, so that the thread leaves the interpreter to the others whatever strangers do.

What goes out waits for nothing. If a peer does not read, the relay does not read what is for it,
and the socket inside drops what is too much. A connection for which the kernel has no memory or no
room in a selector ends, and the relay goes on. zmq's own clients connect again when they have been
disconnected.

Knows: sockets and the bytes that pass. Knows nothing of zmq or of what the bytes mean.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import selectors
import socket
import stat
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

MAX_PEERS = 16
"""Maximum number of connections to each endpoint."""
MAX_RECEIVED = 64 << 10
"""Maximum number of bytes that a peer may send on a connection. zmq's greetings have 150 bytes, a
subscription has a few more than its topic, and a request for a replay has 12."""
MAX_ACCEPTED = 4
"""Maximum number of connections to an endpoint that are accepted in a turn."""
MAX_READ = 4096
"""Maximum number of bytes that are read from a peer in a turn."""
PAUSE_SECONDS = 0.02
"""Number of seconds between two turns in which connections are accepted and peers are read."""
GATHER_SECONDS = 0.005
"""Number of seconds for which what is for peers is gathered, so that many small pieces go out
together."""
CHUNK = 128 << 10
"""Maximum number of bytes that are kept for a peer that does not read, outside the kernel."""
RECEIVE_BUFFER = 16 << 10
"""Number of bytes of a peer that the kernel keeps until they are read."""
KEEPALIVE_SECONDS = 60
"""Number of silent seconds after which the kernel asks whether a peer's machine is still there."""
READ_SECONDS = 30
"""Number of seconds after which it is seen whether a peer for which something waits has read."""

_TCP = re.compile(r"tcp://(.+):([0-9]{1,5})")


class _Connection:
    """A peer, and the connection inside that belongs to it."""

    def __init__(self, relay: Relay, endpoint: _Endpoint, peer: socket.socket) -> None:
        """Connect inside. Raises OSError if that is not possible."""
        self._relay, self._endpoint, self._peer = relay, endpoint, peer
        self._num_received = self._num_queued = 0
        self._to_inside = self._to_peer = memoryview(b"")
        self._inside = socket.socket(socket.AF_UNIX)
        try:
            self._inside.connect(str(endpoint.inside))
            for each in (peer, self._inside):
                each.setblocking(False)
            if peer.family != socket.AF_UNIX:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
            relay.inward.register(peer, selectors.EVENT_READ, self._or_close(self._read_peer))
            self._await_inside()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """End both connections. May be called again."""
        relay = self._relay
        self._endpoint.connections.discard(self)
        relay.behind.pop(self, None)
        for selector in (relay.inward, relay.outward):
            for each in (self._peer, self._inside):
                with suppress(KeyError, ValueError):  # not registered, or closed
                    selector.unregister(each)
        self._peer.close()
        self._inside.close()

    def look(self) -> None:
        """Disconnect the peer if it has taken nothing since the last look."""
        before, self._num_queued = self._num_queued, _num_queued(self._peer)
        if self._num_queued < before:
            self._look_later()
        else:
            self.close()

    def _look_later(self) -> None:
        self._relay.behind.pop(self, None)
        self._relay.behind[self] = time.monotonic() + READ_SECONDS

    def _or_close(self, step: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            if self not in self._endpoint.connections:
                return  # closed by an event of the same turn
            try:
                step()
            except BlockingIOError:
                pass
            except OSError:
                self.close()

        return guarded

    def _read_peer(self) -> None:
        """Pass on a part of what the peer has sent, once the one before it has gone inside."""
        if not self._to_inside:
            received = self._peer.recv(MAX_READ)
            self._num_received += len(received)
            if not received or self._num_received > MAX_RECEIVED:
                self.close()
                return
            self._to_inside = memoryview(received)
        self._to_inside = self._to_inside[self._inside.send(self._to_inside) :]

    def _await_inside(self) -> None:
        read = self._or_close(self._read_inside)
        self._relay.outward.register(self._inside, selectors.EVENT_READ, read)

    def _read_inside(self) -> None:
        """Pass on what is for the peer. If it does not take all, wait for it, and not for more."""
        chunk = memoryview(self._inside.recv(CHUNK))
        if not chunk:
            self.close()
            return
        try:
            rest = chunk[self._peer.send(chunk) :]
        except BlockingIOError:
            rest = chunk
        if rest:
            self._relay.outward.unregister(self._inside)
            self._to_peer = rest
            write = self._or_close(self._write_peer)
            self._relay.outward.register(self._peer, selectors.EVENT_WRITE, write)
            self._note_queued()

    def _write_peer(self) -> None:
        self._to_peer = self._to_peer[self._peer.send(self._to_peer) :]
        if self._to_peer:
            self._note_queued()
        else:
            del self._relay.behind[self]
            self._relay.outward.unregister(self._peer)
            self._await_inside()

    def _note_queued(self) -> None:
        self._num_queued = _num_queued(self._peer)
        self._look_later()


class _Endpoint:
    """A socket at which peers arrive, and the path of the socket inside."""

    def __init__(self, relay: Relay, listener: socket.socket, inside: Path) -> None:
        self.connections: set[_Connection] = set()
        self.inside = inside
        self._relay, self._listener = relay, listener
        relay.inward.register(listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Accept nobody any more."""
        self._relay.inward.unregister(self._listener)
        name = self._listener.getsockname()
        self._listener.close()
        if isinstance(name, str):
            Path(name).unlink(missing_ok=True)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                peer, _ = self._listener.accept()
            except OSError:  # there is nobody else, or no descriptor for it
                return
            try:
                if len(self.connections) < MAX_PEERS:
                    self.connections.add(_Connection(self._relay, self, peer))
                    continue
            except OSError:
                pass  # the socket inside is closed
            peer.close()


class Relay:
    """Endpoints for strangers, and the thread that carries bytes to and from the sockets inside.

    inward: what comes from peers, which is read in turns.
    outward: what is for peers.
    behind: the connections whose peers have not taken all that is for them, each with the time at
        which that is looked at again, the earliest first.
    Each selector knows for a socket what is to be called when that is ready.
    """

    def __init__(self) -> None:
        self.inward, self.outward = selectors.DefaultSelector(), selectors.DefaultSelector()
        self.behind: dict[_Connection, float] = {}
        self._endpoints: list[_Endpoint] = []
        self._next_turn: float | None = None
        """When peers are read again; None if they are read as soon as one has sent something."""
        self._end: float | None = None
        self._wakeup, self._waker = socket.socketpair()
        self.outward.register(self._wakeup, selectors.EVENT_READ, lambda: None)
        self._await_peers()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def listen(self, endpoint: str, inside: Path) -> None:
        """Let peers at an endpoint (tcp://HOST:PORT, where * is any IPv4 address, or ipc://PATH)
        reach the unix socket at a path. May be called before `start`. Raises OSError if nobody can
        be listened to there."""
        self._endpoints.append(_Endpoint(self, _listener(endpoint), inside))

    @property
    def num_peers(self) -> int:
        """Number of connections of strangers."""
        return sum(len(endpoint.connections) for endpoint in self._endpoints)

    def start(self) -> None:
        """Begin to carry bytes."""
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Accept nobody any more, and end when all connections have been ended from inside or after
        some seconds."""
        self._end = time.monotonic() + seconds
        self._waker.close()
        if self._thread.ident is None:  # not started
            self._run()
        else:
            self._thread.join()

    def _await_peers(self) -> None:
        self.outward.register(self.inward.fileno(), selectors.EVENT_READ, self._take_turn)

    def _take_turn(self) -> None:
        for key, _ in self.inward.select(0):
            key.data()
        self.outward.unregister(self.inward.fileno())
        self._next_turn = time.monotonic() + PAUSE_SECONDS

    def _run(self) -> None:
        while self._end is None:
            self._carry(None)
            time.sleep(GATHER_SECONDS)
        self.outward.unregister(self._wakeup)
        for endpoint in self._endpoints:
            endpoint.close()
        while self.num_peers and time.monotonic() < self._end:
            self._carry(PAUSE_SECONDS)
        for endpoint in self._endpoints:
            for connection in list(endpoint.connections):
                connection.close()
        for each in (self._wakeup, self.inward, self.outward):
            each.close()

    def _carry(self, seconds: float | None) -> None:
        """Wait for something to do, at most for some seconds, and do it."""
        dues = [*islice(self.behind.values(), 1)]
        dues += [] if self._next_turn is None else [self._next_turn]
        if dues:
            left = max(0.0, min(dues) - time.monotonic())
            seconds = left if seconds is None else min(seconds, left)
        for key, _ in self.outward.select(seconds):
            key.data()
        now = time.monotonic()
        for connection in [c for c, due in self.behind.items() if due <= now]:
            connection.look()
        if self._next_turn is not None and now >= self._next_turn:
            try:
                self._await_peers()
            except OSError:  # the kernel has no memory for it now
                self._next_turn = now + PAUSE_SECONDS
            else:
                self._next_turn = None


def _num_queued(connection: socket.socket) -> int:
    """Return the number of bytes that the kernel keeps until the other end takes them."""
    number = array.array("i", [0])
    fcntl.ioctl(connection, termios.TIOCOUTQ, number)
    return number[0]


def _listener(endpoint: str) -> socket.socket:
    """Return a socket that listens at an endpoint. Raises OSError."""
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):  # of a process that has ended
                os.unlink(path)
        address: str | tuple[str, int] = path
        family = socket.AF_UNIX
    else:
        match = _TCP.fullmatch(endpoint)
        if match is None or not 0 < int(match[2]) < 1 << 16:
            raise OSError(errno.EINVAL, "it is neither tcp://HOST:PORT nor ipc://PATH")
        host = match[1].strip("[]")
        address = ("" if host == "*" else host, int(match[2]))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener

"""Bounds how many peers may be connected to a zmq socket at the same time.

zmq accepts everybody who connects and has no such limit of its own, so a stranger could take all
descriptors of the process. Whoever comes when there are enough is disconnected at once; zmq's own
clients then try again until there is room.

Knows: what zmq tells of the connections of a socket. Knows nothing of what is sent over them.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import zmq
from zmq.utils.monitor import parse_monitor_message

HANDSHAKE_SECONDS = 5
"""Number of seconds within which a peer has to be one that speaks zmq."""

KEEPALIVE_SECONDS = 60
"""Number of silent seconds after which the kernel asks whether a peer's machine is still there."""


class PeerLimit:
    """The peers of a socket that waits for them, of which there may be `most`. It is to be made
    before the socket is bound, and belongs to the thread that calls `enforce`."""

    def __init__(self, limited: zmq.Socket[bytes], most: int) -> None:
        limited.handshake_ivl = 1000 * HANDSHAKE_SECONDS
        limited.tcp_keepalive = 1
        limited.tcp_keepalive_idle = KEEPALIVE_SECONDS
        self._socket = limited
        self._most = most
        self._connections: set[int] = set()
        events = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED
        self.monitor = limited.get_monitor_socket(events)
        """Can be read when `enforce` has something to do."""

    @property
    def num_peers(self) -> int:
        """Number of connections as of the last `enforce`, with those that are being closed."""
        return len(self._connections)

    def enforce(self) -> None:
        """Take note of who has come and gone since the last call, and disconnect those who are too
        many."""
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())
            descriptor = event["value"]
            if event["event"] == zmq.Event.DISCONNECTED:
                self._connections.discard(descriptor)
                continue
            self._connections.add(descriptor)
            if len(self._connections) > self._most:
                self._disconnect(descriptor)

    def _disconnect(self, descriptor: int) -> None:
        """End a connection; zmq then closes its descriptor. The peer may have gone already, and the
        number then be that of another file, which is told by its address."""
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as peer:
            own = peer.getsockname()
            endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
            place = own if isinstance(own, str) else f":{own[1]}"
            if endpoint.endswith(place):
                peer.shutdown(socket.SHUT_RDWR)

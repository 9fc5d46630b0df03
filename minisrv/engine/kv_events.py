"""Publishes the events of the prefix cache over zmq, as vLLM 0.33.0 does.

Subscribers get messages of three frames: the topic, the number of the batch (8 bytes, big-endian,
from 0 on), and the batch in msgpack. Whoever finds a number missing asks the replay endpoint, by a
REQ or DEALER socket, with the first number that it wants; it is sent the batches from there on that
are still kept, in the same form, and one with the number -1 at the end.

The loop of steps only encodes a batch and hands it over; a thread sends and replays. Nothing waits
for a subscriber: to one that is too slow batches are lost, which their numbers show. What is kept
for those who are connected is bounded by their number and by the batches kept for replay, whose
bytes all replays share.

Knows: zmq, and the endpoints. Knows nothing of the cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import zmq

from minisrv.config import KVEventsConfig
from minisrv.core.kv_events import KVCacheEvent
from minisrv.engine.peers import PeerLimit
from minisrv.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_QUEUED = 100_000
"""Maximum number of batches that wait for a subscriber, or for the thread; vLLM's default."""
NUM_KEPT = 10_000
"""Maximum number of batches that are kept for replay; vLLM's default."""
MAX_KEPT_BYTES = 64 << 20
"""Maximum number of bytes of these batches together."""
MAX_PEERS = 16
"""Maximum number of connections to each endpoint."""
NUMBER_BYTES = 8
"""The length of the number of a batch."""
MAX_FRAME = 1024
"""Maximum number of bytes of a frame that asks for a replay, or of zmq's own handshake before it. A
peer that sends more is disconnected."""
END = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)
CLOSE_SECONDS = 1.0
"""Maximum number of seconds for sending the last batches."""


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """The events of one turn of the engine's loop.

    ts: when they were published, in seconds since 1970.
    data_parallel_rank: the number of the engine among those of one server, of which there is one.
    """

    ts: float
    events: Sequence[KVCacheEvent]
    data_parallel_rank: int | None = None


class KVEventPublisher:
    """Sends batches of events from a thread of its own.

    Raises ConfigError if an endpoint cannot be opened.
    """

    def __init__(self, config: KVEventsConfig) -> None:
        self._topic = config.topic.encode()
        self._encode = msgspec.msgpack.Encoder().encode
        self._next_number = 0
        self._has_dropped = False
        self._context = zmq.Context()
        self._inbox, self._outbox = (self._context.socket(zmq.PAIR) for _ in range(2))
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(MAX_QUEUED // 2)  # together
        self._outbox.bind("inproc://batches")
        self._inbox.connect("inproc://batches")
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.set_hwm(MAX_QUEUED)
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.set_hwm(2 * (NUM_KEPT + 1))  # a whole replay fits, however slow its reader
        self._limits = []
        for socket in (self._publisher, self._replay):
            socket.maxmsgsize = MAX_FRAME
            self._limits.append(PeerLimit(socket, MAX_PEERS))
        self._kept: deque[tuple[int, zmq.Frame]] = deque()
        self._kept_bytes = 0
        try:
            _open(self._publisher, "kv_events_endpoint", config.endpoint)
            if config.replay_endpoint is not None:
                _open(self._replay, "kv_events_replay_endpoint", config.replay_endpoint)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[KVCacheEvent]) -> None:
        """Hand over events, if there are any, to be sent as one batch."""
        if not events:
            return
        batch = self._encode(KVEventBatch(time.time(), events, 0))
        number = self._next_number.to_bytes(NUMBER_BYTES, "big")
        self._next_number += 1
        try:
            self._inbox.send_multipart((number, batch), zmq.NOBLOCK)
        except zmq.Again:
            if not self._has_dropped:
                logger.warning("events of the KV cache come faster than they can be sent")
            self._has_dropped = True

    def close(self) -> None:
        """Send what has been handed over, and close the sockets."""
        self._inbox.sndtimeo = round(1000 * CLOSE_SECONDS)
        with suppress(zmq.Again):  # a thread that has failed takes nothing any more
            self._inbox.send(b"")
        self._thread.join(CLOSE_SECONDS)
        self._context.destroy(linger=round(1000 * CLOSE_SECONDS))

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._outbox, zmq.POLLIN)
        poller.register(self._replay, zmq.POLLIN)
        for limit in self._limits:
            poller.register(limit.monitor, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            # First, so that a replay has all that was published before it was asked for.
            while self._outbox.poll(0):
                message = self._outbox.recv_multipart()
                if len(message) == 1:  # `close`
                    return
                number, batch = message
                self._keep(int.from_bytes(number, "big"), batch)
                self._publisher.send_multipart((self._topic, number, batch))
            for limit in self._limits:
                if limit.monitor in ready:
                    limit.enforce()
            if self._replay in ready:
                self._answer(self._replay.recv_multipart())

    def _keep(self, number: int, batch: bytes) -> None:
        """Keep a batch for replay, and drop the oldest ones if there are too many."""
        self._kept.append((number, zmq.Frame(batch)))
        self._kept_bytes += len(batch)
        while len(self._kept) > NUM_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
            _, dropped = self._kept.popleft()
            self._kept_bytes -= len(dropped)

    def _answer(self, message: list[bytes]) -> None:
        """Replay to a subscriber what it asks for. To one that has gone, zmq sends nothing."""
        sizes = [len(frame) for frame in message[1:]]
        if sizes != [0, NUMBER_BYTES]:
            # No warning: whoever reaches the endpoint could fill the log.
            logger.debug("a request for a replay has frames of %s bytes, not 0 and 8", sizes)
            return
        subscriber, _, wanted = message
        first = int.from_bytes(wanted, "big")
        for number, batch in self._kept:
            if number >= first:
                name = number.to_bytes(NUMBER_BYTES, "big")
                # Frames are not copied: all replays of a batch hold the same bytes.
                for frame in (subscriber, b"", self._topic, name):
                    self._replay.send(frame, zmq.SNDMORE)
                self._replay.send(batch, copy=False)
        self._replay.send_multipart((subscriber, b"", b"", END, b""))


def _open(socket: zmq.Socket[bytes], setting: str, endpoint: str) -> None:
    """Bind a socket to an address of this machine, or connect it to one of a subscriber that waits
    for it; as in vLLM, one with a wildcard is bound, and so is a replay endpoint in any case."""
    is_bound = socket.type == zmq.ROUTER or "*" in endpoint or "::" in endpoint
    is_bound |= endpoint.startswith("ipc://")
    try:
        (socket.bind if is_bound else socket.connect)(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"{setting}={endpoint!r} cannot be opened ({error.strerror}); write tcp://*:5557 or "
            "another free port, or ipc:// and the path of a file."
        ) from error

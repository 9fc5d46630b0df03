"""Publishes the events of the prefix cache over zmq, as vLLM 0.33.0 does.

Subscribers get messages of three frames: the topic, the number of the batch (8 bytes, big-endian,
from 0 on), and the batch in msgpack. Whoever finds a number missing asks the replay endpoint, by a
REQ or DEALER socket, with the first number that it wants; it is sent the batches from there on that
are still kept, in the same form, and one with the number -1 at the end.

The loop of steps only encodes a batch and hands it over; a thread sends and replays. Nothing waits
for a subscriber: to one that is too slow batches are lost, which their numbers show, and a replay
goes on when its reader has read. Subscribers are strangers. Those who come to an endpoint that
waits reach zmq through a relay, which bounds what they can send, and the thread answers requests in
turns with pauses between them. So what they cost is bounded, in memory as in time.

Knows: zmq, and the endpoints. Knows nothing of the cache.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from minisrv.config import KVEventsConfig
from minisrv.core.kv_events import KVCacheEvent
from minisrv.engine.relay import Relay
from minisrv.errors import ConfigError

logger = logging.getLogger(__name__)

NUM_KEPT = 10_000
"""Maximum number of batches that are kept for replay, or wait for the thread."""
MAX_KEPT_BYTES = 64 << 20
"""Maximum number of bytes of the batches that are kept for replay."""
MAX_BEHIND = 1000
"""Maximum number of batches that wait for a subscriber, besides those in the kernel's buffers. A
batch has at most the tokens of a step."""
MAX_BEHIND_IN_REPLAY = 100
"""Maximum number of these batches of a replay."""
MAX_WANTED = 8
"""Maximum number of replays that a subscriber may have asked for and not got; it gets no others."""
BATCHES_PER_TURN = 32
"""Maximum number of batches that are replayed in a turn, to all subscribers together."""
REQUESTS_PER_TURN = 16
"""Maximum number of requests for a replay that are read in a turn."""
TURN_SECONDS, WAIT_SECONDS = 0.002, 0.02
"""Number of seconds between two turns, while somebody reads what is replayed, and else."""
NUMBER_BYTES = 8
"""The length of the number of a batch."""
MAX_FRAME = 1024
"""Maximum number of bytes of a frame that asks for a replay, or of zmq's own handshake before it. A
peer that sends more is disconnected."""
HANDSHAKE_SECONDS = 5
"""Number of seconds within which a peer has to be one that speaks zmq."""
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

    private_dir: a directory for sockets, which nobody else may enter.
    Raises ConfigError if an endpoint cannot be opened.
    """

    def __init__(self, config: KVEventsConfig, private_dir: Path) -> None:
        self._topic = config.topic.encode()
        self._encode = msgspec.msgpack.Encoder().encode
        self._next_number = 0
        self._has_dropped = False
        self._context = zmq.Context()
        # This is set before a socket listens. If the peer of a connection goes while the socket is
        # being closed, zmq closes the connection by the linger with which the socket began to
        # listen, which is endless by default.
        self._context.linger = round(1000 * CLOSE_SECONDS)
        self._inbox, self._outbox = (self._context.socket(zmq.PAIR) for _ in range(2))
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(NUM_KEPT // 2)  # together
        self._outbox.bind("inproc://batches")
        self._inbox.connect("inproc://batches")
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.set_hwm(MAX_BEHIND)
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.sndhwm, self._replay.rcvhwm = MAX_BEHIND_IN_REPLAY, REQUESTS_PER_TURN
        self._replay.router_mandatory = 1  # says if a subscriber has gone, or has to read first
        for socket in (self._publisher, self._replay):
            socket.maxmsgsize = MAX_FRAME
            socket.handshake_ivl = round(1000 * HANDSHAKE_SECONDS)
        self._kept: dict[int, zmq.Frame] = {}
        self._kept_bytes = self._oldest = self._newest = 0
        self._wanted: dict[bytes, deque[_Replay]] = {}
        self._relay = Relay()
        try:
            self._open(self._publisher, "kv_events_endpoint", config.endpoint, private_dir)
            if config.replay_endpoint is not None:
                name = "kv_events_replay_endpoint"
                self._open(self._replay, name, config.replay_endpoint, private_dir)
        except ConfigError:
            self._context.destroy()
            self._relay.close(0)
            raise
        self._relay.start()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _open(
        self, socket: zmq.Socket[bytes], setting: str, endpoint: str, private_dir: Path
    ) -> None:
        """Wait for subscribers at an endpoint, or connect the socket to the one subscriber that
        waits there. As in vLLM, the engine waits at an endpoint with a wildcard, at a path, and for
        replays in any case."""
        is_replay = socket.type == zmq.ROUTER
        try:
            if is_replay or "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://"):
                inside = private_dir / ("kv-rep" if is_replay else "kv-pub")
                socket.bind(f"ipc://{inside}")
                self._relay.listen(endpoint, inside)
            else:
                socket.connect(endpoint)
        except (zmq.ZMQError, OSError) as error:
            raise ConfigError(
                f"{setting}={endpoint!r} cannot be opened ({error.strerror or error}); write "
                "tcp://*:5557 or another free port, or ipc:// and the path of a file."
            ) from error

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
        self._context.destroy()
        self._relay.close(CLOSE_SECONDS)

    def _run(self) -> None:
        poller = zmq.Poller()
        # zmq notes subscriptions and closed connections while a thread waits for the socket.
        for socket in (self._outbox, self._replay, self._publisher):
            poller.register(socket, zmq.POLLIN)
        next_turn = 0.0
        while True:
            if (pause := next_turn - time.monotonic()) > 0:
                self._outbox.poll(math.ceil(1000 * pause))
            elif not self._wanted:
                poller.poll()
            # First, so that a replay has all that was published before it was asked for.
            while self._outbox.poll(0):
                message = self._outbox.recv_multipart()
                if len(message) == 1:  # `close`
                    return
                number, batch = message
                self._keep(int.from_bytes(number, "big"), batch)
                self._publisher.send_multipart((self._topic, number, batch))
            if time.monotonic() >= next_turn:
                next_turn = time.monotonic() + self._take_turn()

    def _keep(self, number: int, batch: bytes) -> None:
        """Keep a batch for replay, and drop the oldest ones if there are too many."""
        self._kept[number] = zmq.Frame(batch)
        self._kept_bytes += len(batch)
        self._newest = number
        while len(self._kept) > NUM_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
            dropped = self._kept.pop(self._oldest, b"")  # a number is missing if it was not sent
            self._kept_bytes -= len(dropped)
            self._oldest += 1

    def _take_turn(self) -> float:
        """Read requests for replays, and send a part of what is wanted. Return the number of
        seconds until the next turn."""
        num_requests = 0
        while num_requests < REQUESTS_PER_TURN and self._replay.poll(0):
            self._note(self._replay.recv_multipart())
            num_requests += 1
        num_sent = 0
        for subscriber in list(self._wanted):
            num_sent += self._continue(subscriber, BATCHES_PER_TURN // len(self._wanted) or 1)
        if num_sent:
            return TURN_SECONDS
        return WAIT_SECONDS if num_requests or self._wanted else 0

    def _note(self, message: list[bytes]) -> None:
        """Note what a subscriber asks for."""
        sizes = [len(frame) for frame in message[1:]]
        if sizes != [0, NUMBER_BYTES]:
            # No warning: whoever reaches the endpoint could fill the log.
            logger.debug("a request for a replay has frames of %s bytes, not 0 and 8", sizes)
            return
        wanted = self._wanted.setdefault(message[0], deque())
        if len(wanted) < MAX_WANTED:
            wanted.append(_Replay(int.from_bytes(message[2], "big"), self._newest))

    def _continue(self, subscriber: bytes, most: int) -> int:
        """Send a subscriber some of the messages that it has asked for, until it has to read first.
        Return how many."""
        wanted = self._wanted[subscriber]
        num_sent = 0
        try:
            while wanted and num_sent < most:
                replay = wanted[0]
                replay.next = max(replay.next, self._oldest)
                while replay.next <= replay.last and replay.next not in self._kept:
                    replay.next += 1
                if replay.next <= replay.last:
                    name, batch = replay.next.to_bytes(NUMBER_BYTES, "big"), self._kept[replay.next]
                    self._send(subscriber, self._topic, name, batch)
                    replay.next += 1
                else:
                    self._send(subscriber, b"", END, b"")
                    wanted.popleft()
                num_sent += 1
        except zmq.Again:
            return num_sent
        except zmq.ZMQError:  # it has gone
            wanted.clear()
        if not wanted:
            del self._wanted[subscriber]
        return num_sent

    def _send(self, subscriber: bytes, topic: bytes, name: bytes, batch: zmq.Frame | bytes) -> None:
        """Send a subscriber a batch. Raises zmq.Again if it has to read first, and ZMQError if it
        has gone."""
        self._replay.send(subscriber, zmq.SNDMORE | zmq.NOBLOCK)
        for frame in (b"", topic, name):
            self._replay.send(frame, zmq.SNDMORE)
        self._replay.send(batch, copy=False)  # all replays of a batch hold the same bytes


@dataclass
class _Replay:
    """Batches that a subscriber has asked for: from the next one to the last that there was."""

    next: int
    last: int

"""Whoever reads the events of the prefix cache knows what is in it."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from minisrv.config import EngineConfig, KVEventsConfig, ServerConfig
from minisrv.core.budget import PrefillBudget
from minisrv.core.kv_cache import hash_block
from minisrv.core.kv_events import (
    BlockStored,
    RecordingBlockPool,
    RecordingScheduler,
    event_hash,
)
from minisrv.core.step import SchedulerOutput
from minisrv.engine import kv_events, relay
from minisrv.engine.kv_events import KVEventPublisher
from minisrv.engine.process import EngineProcess
from minisrv.engine.relay import MAX_PEERS, MAX_RECEIVED
from minisrv.errors import ConfigError
from minisrv.request import EngineRequest, SamplingParams
from tests.engine.kv_events_consumer import Block, Consumer
from tests.waiting import wait_until

BLOCK = 4
LIMIT = 60


def endpoints(directory: Path) -> KVEventsConfig:
    return KVEventsConfig(f"ipc://{directory}/events", f"ipc://{directory}/replay", "kv")


class Load:
    """Random requests with shared beginnings to a scheduler with few blocks, whose events are
    published after each step."""

    def __init__(self, publisher: KVEventPublisher, seed: int) -> None:
        self.publisher = publisher
        self.draw = random.Random(seed)
        self.pool = RecordingBlockPool(41, BLOCK)
        self.scheduler = RecordingScheduler(
            self.pool,
            PrefillBudget(48),
            max_num_seqs=6,
            max_model_len=LIMIT,
            max_waiting=100,
            eos_token_ids=[7],
        )
        self.in_flight: deque[SchedulerOutput] = deque()
        self.texts = [[self.draw.randint(1, 5) for _ in range(30)] for _ in range(12)]
        self.num_requests = self.num_batches = 0

    def add(self) -> None:
        draw = self.draw
        prompt = [*draw.choice(self.texts)[: draw.randint(1, 30)], draw.randint(1, 5)]
        request = EngineRequest(
            request_id=str(self.num_requests),
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=draw.randint(1, LIMIT - len(prompt))),
            api_key_index=draw.choice((None, None, 0, 1)),
            cache_salt=draw.choice((None, None, None, "salt")),
        )
        self.scheduler.add(request, 0)
        self.num_requests += 1

    def turn(self) -> None:
        """Launch up to two steps and retire the oldest, or do what else an engine does with the
        cache; then publish."""
        draw = self.draw
        while len(self.scheduler.waiting) < 4 and draw.random() < 0.7:
            self.add()
        if draw.random() < 0.02:
            self.scheduler.abort(str(self.num_requests - draw.randint(1, 10)))
        if draw.random() < 0.02:  # as a certification does
            self.pool.give_back(self.pool.evict(draw.randint(1, 3)))
        while len(self.in_flight) < 2 and (step := self.scheduler.schedule()) is not None:
            self.in_flight.append(step)
        self.retire()
        if draw.random() < 0.001:  # as sleep does
            self.finish()
            self.pool.clear_prefix_cache()
        self.publish()

    def retire(self) -> None:
        if self.in_flight:
            step = self.in_flight.popleft()
            weights = (9, 3, 3, 3, 1)
            tokens = [self.draw.choices((1, 2, 3, 4, 7), weights) for _ in range(step.num_rows)]
            self.scheduler.update(step.step_id, tokens)

    def finish(self) -> None:
        while self.scheduler.has_work or self.in_flight:
            if (step := self.scheduler.schedule()) is not None:
                self.in_flight.append(step)
            self.retire()

    def publish(self) -> None:
        events = self.pool.take_events()
        self.publisher.publish(events)
        self.num_batches += bool(events)

    def cached(self) -> set[int]:
        return {event_hash(block_hash) for block_hash in self.pool._block_of}


def full_hash(known: dict[int, Block], name: int, found: dict[int, bytes]) -> bytes:
    """The hash of a block, made from what its reader knows: the tokens of all blocks up to it, and
    the keys of the first."""
    if name not in found:
        chain = [name]
        while (parent := known[chain[-1]].parent) is not None:
            chain.append(parent)
        keys = [str(key) for key in known[chain[-1]].extra_keys or ()]
        owner = [int(key.removeprefix("api_key:")) for key in keys if key.startswith("api_key:")]
        salts = [key for key in keys if not key.startswith("api_key:")]
        salt = (owner[0] if owner else None, salts[0] if salts else None)
        before: bytes | None = None
        for each in reversed(chain):
            before = found[each] = hash_block(salt, before, known[each].token_ids)
    return found[name]


@pytest.mark.parametrize("number", [1500])
def test_a_reader_s_picture_is_the_cache(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through preemption, eviction, aborts and clearing, with lost batches that are asked for
    again, a reader has exactly the blocks that the cache can find, with their tokens."""
    monkeypatch.setattr(relay, "GATHER_SECONDS", 0)  # it waits for each batch
    config = endpoints(tmp_path)
    publisher = KVEventPublisher(config, tmp_path)
    assert config.replay_endpoint is not None
    consumer = Consumer(config.endpoint, config.replay_endpoint, config.topic)
    load = Load(publisher, seed=number)
    try:
        load.add()
        load.finish()
        load.publish()
        consumer.catch_up()  # what was published before it had subscribed
        turns = 0
        while load.num_requests < number:
            before = load.num_batches
            load.turn()
            turns += 1
            if load.num_batches > before and turns > 100 and load.draw.random() < 0.01:
                consumer.lose()
            elif load.num_batches > before and turns > 100:
                consumer.read()
            elif turns == 100:
                while not consumer.has_heard():  # until it has subscribed, batches are lost
                    load.turn()
                consumer.catch_up()
            if turns % 50 == 0 and turns > 100 and consumer.next_number == load.num_batches:
                assert consumer.blocks.keys() == load.cached()
        load.finish()
        load.publish()
        consumer.catch_up()
        assert consumer.next_number == load.num_batches
        assert consumer.blocks.keys() == load.cached()
        found: dict[int, bytes] = {}
        for name in consumer.known:
            assert event_hash(full_hash(consumer.known, name, found)) == name
        assert consumer.num_replayed > 10
        assert load.scheduler.num_preemptions > 10
        assert load.scheduler.prefix_cache_hits > 1000
        assert len(consumer.known) > 20 * load.pool.total, "hardly anything was evicted"
        print(
            f"{load.num_requests} requests, {load.scheduler.num_preemptions} preemptions, "
            f"{load.num_batches} batches, {consumer.num_replayed} of them replayed, "
            f"{len(consumer.known)} different blocks"
        )
    finally:
        consumer.close()
        publisher.close()


def test_a_publisher_without_a_reader_keeps_the_last_batches(tmp_path: Path) -> None:
    """Nothing waits for a reader, and one that comes late gets what is kept."""
    config = endpoints(tmp_path)
    publisher = KVEventPublisher(config, tmp_path)
    load = Load(publisher, seed=1)
    try:
        for _ in range(200):
            load.turn()
        assert config.replay_endpoint is not None
        consumer = Consumer(config.endpoint, config.replay_endpoint, config.topic)
        try:
            while consumer.next_number < load.num_batches:
                consumer.catch_up()
            assert consumer.blocks.keys() == load.cached()
        finally:
            consumer.close()
    finally:
        publisher.close()


def test_whoever_asks_for_no_replay_delays_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one who sends a number of 30 MB, which would be read again for each batch."""
    config = endpoints(tmp_path)
    publisher = KVEventPublisher(config, tmp_path)
    load = Load(publisher, seed=1)
    assert config.replay_endpoint is not None
    context = zmq.Context()
    hostile = context.socket(zmq.DEALER)
    try:
        for _ in range(200):
            load.turn()
        hostile.connect(config.replay_endpoint)
        for message in ([b""], [b"", b""], [b"", bytes(9)], [b"", bytes(30 << 20)], [b"\0"] * 9):
            hostile.send_multipart(message)
        consumer = Consumer(config.endpoint, config.replay_endpoint, config.topic)
        try:
            consumer.catch_up()
            assert consumer.next_number == load.num_batches
        finally:
            consumer.close()
        assert not hostile.poll(100)
        assert not caplog.records
    finally:
        hostile.close(0)
        context.term()
        publisher.close()


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has greeted and has not closed."""
    try:
        greeting = connection.recv(1000)
        return bool(greeting) and connection.recv(1000) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_strangers_take_no_more_than_the_allowed_connections(tmp_path: Path, kind: str) -> None:
    """Those who come later are disconnected, a reader that was there is served, and when the
    strangers have gone others are too. No descriptor is left behind."""
    path = str(tmp_path / "replay")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    replay = f"ipc://{path}" if kind == "ipc" else f"tcp://*:{port}"
    reached = replay.replace("*", "127.0.0.1")
    events = f"ipc://{tmp_path}/events"
    publisher = KVEventPublisher(KVEventsConfig(events, replay, ""), tmp_path)
    load = Load(publisher, seed=1)
    family = socket.AF_UNIX if kind == "ipc" else socket.AF_INET
    strangers = [socket.socket(family) for _ in range(5 * MAX_PEERS)]
    readers = [Consumer(events, reached)]
    try:
        for _ in range(50):
            load.turn()
        readers[0].catch_up()
        for stranger in strangers:
            stranger.connect(path if kind == "ipc" else ("127.0.0.1", port))
            stranger.setblocking(False)
        wait_until(lambda: 0 < sum(map(is_open, strangers)) <= MAX_PEERS - 1)
        for _ in range(20):
            load.turn()
        readers[0].catch_up()
        assert readers[0].next_number == load.num_batches
        for stranger in strangers:
            stranger.close()
        readers.append(Consumer(events, reached))
        readers[1].catch_up()
        assert readers[1].next_number == load.num_batches
        wait_until(lambda: publisher._relay.num_peers == 2 * len(readers))
    finally:
        for each in (*strangers, *readers):
            each.close()
        publisher.close()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def hostile(path: str, kind: bytes) -> socket.socket:
    """A peer that has greeted zmq as a socket of some kind does, and may send any bytes."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(20)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.connect(path)
    body = b"\5READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    peer.sendall(GREETING + b"\4" + bytes([len(body)]) + body)
    greeting = b""
    while len(greeting) < len(GREETING):
        greeting += peer.recv(1000)
    return peer


TOPICS = b"".join(
    b"\0\5\1" + bytes([a, b, c, d])
    for a, b, c, d in itertools.product(range(30), range(30), (0, 255), (0, 255))
)
FLOODS = {
    "parts of a message that has no end": ("replay", b"DEALER", b"\1\0"),
    "parts of a subscription that has no end": ("events", b"SUB", b"\1\0"),
    "topics": ("events", b"SUB", TOPICS),
    "long topics": ("events", b"SUB", b"\2" + (1000).to_bytes(8, "big") + b"\1" + bytes(999)),
    "a topic that comes and goes": ("events", b"SUB", b"\0\2\1a\0\2\0a"),
    "requests for a replay": ("replay", b"DEALER", b"\1\0\0\x08" + bytes(8)),
    "frames that are no request": ("replay", b"DEALER", b"\0\1a"),
}
"""What a hostile peer sends again and again, and as what to which endpoint."""


@pytest.mark.parametrize("name", FLOODS)
def test_who_sends_without_end_is_disconnected(tmp_path: Path, name: str) -> None:
    """A peer is heard up to a number of bytes, whose cost in memory is small, and meanwhile a
    reader gets every batch."""
    endpoint, kind, flood = FLOODS[name]
    config = endpoints(tmp_path)
    publisher = KVEventPublisher(config, tmp_path)
    load = Load(publisher, seed=1)
    assert config.replay_endpoint is not None
    consumer = Consumer(config.endpoint, config.replay_endpoint, config.topic)
    try:
        load.turn()
        consumer.catch_up()
        before = resident_bytes()
        with ThreadPoolExecutor(MAX_PEERS - 1) as threads:
            address = f"{tmp_path}/{endpoint}", kind
            sent = [threads.submit(flooded, *address, flood) for _ in range(MAX_PEERS - 1)]
            while not all(each.done() for each in sent):
                load.turn()
                time.sleep(0.001)
        assert max(each.result() for each in sent) < 4 * MAX_RECEIVED
        while consumer.next_number < load.num_batches:
            consumer.read()
        assert consumer.blocks.keys() == load.cached()
        assert resident_bytes() - before < 64 << 20
    finally:
        consumer.close()
        publisher.close()


def flooded(path: str, kind: bytes, flood: bytes) -> int:
    """Send bytes again and again; return how many it were when the connection ended, or a number
    that is far too great."""
    num_sent = 0
    with hostile(path, kind) as peer, suppress(ConnectionError):
        while num_sent < 100 * MAX_RECEIVED:
            num_sent += peer.send(flood * (4096 // len(flood) or 1))
    return num_sent


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_readers_that_do_not_read_hold_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of live batches nor those of replays, of which each has asked for several, at
    another time each. A reader that reads gets every batch."""
    monkeypatch.setattr(kv_events, "MAX_KEPT_BYTES", 8 << 20)
    monkeypatch.setattr(relay, "GATHER_SECONDS", 0)  # it waits for each batch
    config = endpoints(tmp_path)
    publisher = KVEventPublisher(config, tmp_path)
    assert config.replay_endpoint is not None
    consumer = Consumer(config.endpoint, config.replay_endpoint, config.topic)
    stuck = [hostile(f"{tmp_path}/events", b"SUB") for _ in range(3)]
    try:
        for peer in stuck:
            peer.sendall(b"\0\1\1")
        consumer.catch_up()
        before = resident_bytes()
        for number in range(6000):  # of 40 kB, 240 MB in all
            tokens = [1 << 20] * 8000
            publisher.publish([BlockStored([number], None, tokens, 8000, None, "GPU", None)])
            consumer.lose()
            if number % 500 == 0:
                stuck.append(hostile(f"{tmp_path}/replay", b"DEALER"))
                stuck[-1].sendall((b"\1\0\0\x08" + bytes(8)) * 20)
        assert resident_bytes() - before < 120 << 20
        consumer._replay.send_multipart((b"", (5999).to_bytes(8, "big")))
        assert consumer._replay.recv_multipart()[2] == (5999).to_bytes(8, "big")
        assert consumer._replay.recv_multipart()[2] == kv_events.END
    finally:
        for each in (*stuck, consumer):
            each.close()
        publisher.close()


@pytest.mark.timeout(100)
def test_peers_that_go_while_it_closes_do_not_hold_it(tmp_path: Path) -> None:
    """There are batches for them that zmq has not sent. They come without the relay, which would
    end their connections a little later."""
    config = KVEventsConfig(f"ipc://{tmp_path}/events", None, "")
    for number in range(100):
        publisher = KVEventPublisher(config, tmp_path)
        peers = [hostile(f"{tmp_path}/kv-pub", b"SUB") for _ in range(8)]
        for peer in peers:
            peer.sendall(b"\0\1\1")
        time.sleep(0.01)
        for _ in range(60):
            publisher.publish([BlockStored([1], None, [1 << 20] * 8000, 8000, None, "GPU", None)])
        with ThreadPoolExecutor(1) as thread:
            leaving = thread.submit(leave, peers, number % 20 / 10_000)
            publisher.close()
            leaving.result()


def leave(peers: list[socket.socket], seconds: float) -> None:
    time.sleep(seconds)
    for peer in peers:
        peer.close()


def test_batches_kept_for_replay_have_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest ones are dropped, and a replay begins behind them."""
    monkeypatch.setattr(kv_events, "MAX_KEPT_BYTES", 4000)
    config = endpoints(tmp_path)
    publisher = KVEventPublisher(config, tmp_path)
    load = Load(publisher, seed=1)
    assert config.replay_endpoint is not None
    consumer = Consumer(config.endpoint, config.replay_endpoint, config.topic)
    try:
        for _ in range(200):
            load.turn()
        consumer._replay.send_multipart((b"", bytes(8)))
        replayed = []
        while (frames := consumer._replay.recv_multipart())[2] != kv_events.END:
            replayed.append((int.from_bytes(frames[2], "big"), len(frames[3])))
        numbers = [number for number, _ in replayed]
        assert numbers == [*range(numbers[0], load.num_batches)]
        assert numbers[0] > 0
        assert 3000 < sum(size for _, size in replayed) <= 4000
    finally:
        consumer.close()
        publisher.close()


def test_an_endpoint_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_events_endpoint='nonsense'.*tcp://"):
        KVEventPublisher(KVEventsConfig("nonsense", None, ""), tmp_path)
    with pytest.raises(ConfigError, match="kv_events_replay_endpoint='ipc:///nowhere/at/all'"):
        KVEventPublisher(
            KVEventsConfig(f"ipc://{tmp_path}/a", "ipc:///nowhere/at/all", ""), tmp_path
        )


def test_events_of_a_cache_that_is_off_are_refused(tmp_path: Path) -> None:
    config = EngineConfig(enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="without the prefix cache"):
        EngineProcess(config, tmp_path, kv_events=endpoints(tmp_path))


def test_a_topic_without_an_endpoint_is_refused() -> None:
    assert ServerConfig().kv_events is None
    with pytest.raises(ConfigError, match="only allowed with"):
        ServerConfig(kv_events_topic="kv")

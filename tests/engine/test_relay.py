"""A relay carries all bytes in order, and no stranger costs others more than is allowed."""

from __future__ import annotations

import errno
import os
import random
import select
import selectors
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from minisrv.engine.relay import MAX_PEERS, MAX_RECEIVED, Relay
from tests.waiting import wait_until

KERNEL = 64 << 10
"""Number of bytes that the kernel's buffers may hold, with the small ones that tests set."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def relayed(directory: Path, endpoint: str) -> Iterator[socket.socket]:
    """A socket that trusts everybody, behind a relay at an endpoint."""
    inside = socket.socket(socket.AF_UNIX)
    inside.settimeout(20)
    inside.bind(str(directory / "inside"))
    inside.listen()
    relay = Relay()
    try:
        relay.listen(endpoint, directory / "inside")
        relay.start()
        yield inside
    finally:
        inside.close()
        relay.close(1)
        assert relay.num_peers == 0


@contextmanager
def connected(address: tuple[str, int], inside: socket.socket) -> Iterator[list[socket.socket]]:
    """A peer of a relay, and the connection inside that belongs to it."""
    with socket.create_connection(address, timeout=20) as peer, inside.accept()[0] as ours:
        ours.settimeout(20)
        yield [peer, ours]


def received(connection: socket.socket, number: int) -> bytes:
    found = b""
    while len(found) < number and (piece := connection.recv(1 << 16)):
        found += piece
    return found


@pytest.mark.parametrize("seed", range(3))
def test_bytes_arrive_in_both_directions_whatever_their_pieces(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    port = free_port()
    to_inside, to_peer = draw.randbytes(MAX_RECEIVED // 8), draw.randbytes(1 << 21)
    with (
        relayed(tmp_path, f"tcp://*:{port}") as inside,
        connected(("127.0.0.1", port), inside) as (peer, ours),
    ):

        def send(connection: socket.socket, rest: bytes) -> None:
            while rest:
                size = draw.choice((1, 100, 5000, 300_000))
                connection.sendall(rest[:size])
                rest = rest[size:]

        threads = [
            threading.Thread(target=send, args=(peer, to_inside)),
            threading.Thread(target=send, args=(ours, to_peer)),
        ]
        for thread in threads:
            thread.start()
        assert received(peer, len(to_peer)) == to_peer
        assert received(ours, len(to_inside)) == to_inside
        for thread in threads:
            thread.join()


def test_who_sends_without_end_is_disconnected(tmp_path: Path) -> None:
    """And what it has sent arrives, up to the limit."""
    port = free_port()
    with relayed(tmp_path, f"tcp://127.0.0.1:{port}") as inside, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.settimeout(20)
        peer.connect(("127.0.0.1", port))
        with inside.accept()[0] as ours:
            ours.settimeout(20)
            num_sent = 0
            with suppress(ConnectionError):
                while num_sent < 100 * MAX_RECEIVED:
                    num_sent += peer.send(bytes(1000))
            assert MAX_RECEIVED < num_sent < MAX_RECEIVED + KERNEL
            assert MAX_RECEIVED - 4096 <= len(received(ours, num_sent)) <= MAX_RECEIVED
            assert ours.recv(1) == b""


def test_who_reads_nothing_delays_nobody_and_its_bytes_wait_inside(tmp_path: Path) -> None:
    port = free_port()
    with (
        relayed(tmp_path, f"tcp://*:{port}") as inside,
        connected(("127.0.0.1", port), inside) as (_, slow),
        connected(("127.0.0.1", port), inside) as (peer, ours),
    ):
        while select.select([], [slow], [], 0.3)[1]:
            slow.send(bytes(1 << 12))
        peer.sendall(b"question")
        assert received(ours, 8) == b"question"
        ours.sendall(b"answer")
        assert received(peer, 6) == b"answer"


def test_who_reads_nothing_loses_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who has read all that there was keeps it."""
    monkeypatch.setattr("minisrv.engine.relay.READ_SECONDS", 0.2)
    port = free_port()
    with (
        relayed(tmp_path, f"tcp://*:{port}") as inside,
        connected(("127.0.0.1", port), inside) as (idle, other),
        connected(("127.0.0.1", port), inside) as (_, ours),
    ):
        other.sendall(b"first")
        assert received(idle, 5) == b"first"
        with pytest.raises(ConnectionError):
            ours.sendall(bytes(1 << 26))
        other.sendall(b"second")
        assert received(idle, 6) == b"second"


@pytest.mark.parametrize("number", range(5))
def test_a_selector_without_room_ends_at_most_one_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The kernel may have no memory for a registration, or the user as many as are allowed."""
    registrations: Iterator[int] = iter(())

    class Selector(selectors.DefaultSelector):
        def register(self, *arguments: Any) -> selectors.SelectorKey:
            if next(registrations, None) == number:
                raise OSError(errno.ENOSPC, "no room")
            return super().register(*arguments)

    monkeypatch.setattr("minisrv.engine.relay.selectors.DefaultSelector", Selector)
    port = free_port()
    before = len(os.listdir("/proc/self/fd"))
    with relayed(tmp_path, f"tcp://*:{port}") as inside:
        registrations = count()
        with connected(("127.0.0.1", port), inside) as (peer, ours), suppress(ConnectionError):
            while select.select([], [ours], [], 1.0)[1]:
                ours.send(bytes(1 << 12))
            ours.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):
                pass
        assert next(registrations) > number
        with connected(("127.0.0.1", port), inside) as (peer, ours):
            ours.sendall(b"welcome")
            assert received(peer, 7) == b"welcome"
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_there_are_no_more_connections_than_allowed(tmp_path: Path) -> None:
    """Whoever comes then is disconnected, and when one has gone another may come. A peer ends with
    its connection inside, and the other way round. No descriptor is left."""
    port = free_port()
    before = len(os.listdir("/proc/self/fd"))
    with relayed(tmp_path, f"tcp://*:{port}") as inside:
        address = ("127.0.0.1", port)
        peers = [socket.create_connection(address, timeout=20) for _ in range(MAX_PEERS)]
        ours = [inside.accept()[0] for _ in peers]
        with socket.create_connection(address, timeout=20) as another:
            assert another.recv(1) == b""
        ours[0].close()
        assert peers[0].recv(1) == b""
        peers[1].close()
        ours[1].settimeout(20)
        assert ours[1].recv(1) == b""
        with connected(address, inside) as (peer, end):
            end.sendall(b"welcome")
            assert received(peer, 7) == b"welcome"
        for each in (*peers, *ours):
            each.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_what_was_sent_before_the_end_arrives(tmp_path: Path) -> None:
    port = free_port()
    with relayed(tmp_path, f"tcp://*:{port}") as inside:
        peer = socket.create_connection(("127.0.0.1", port), timeout=20)
        with inside.accept()[0] as ours:
            ours.sendall(bytes(100_000))
    with peer:
        assert len(received(peer, 100_001)) == 100_000


@pytest.mark.parametrize("host", ["*", "127.0.0.1", "localhost", "[::1]", "[::]"])
def test_hosts(tmp_path: Path, host: str) -> None:
    port = free_port()
    reached = "::1" if ":" in host else "127.0.0.1"
    if ":" in host:
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
    with (
        relayed(tmp_path, f"tcp://{host}:{port}") as inside,
        connected((reached, port), inside) as (peer, ours),
    ):
        peer.sendall(b"x")
        assert ours.recv(1) == b"x"


def test_a_path_left_by_another_process_is_taken(tmp_path: Path) -> None:
    """But no file that is not a socket."""
    path = tmp_path / "outside"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with relayed(tmp_path, f"ipc://{path}") as inside, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        with inside.accept()[0] as ours:
            peer.sendall(b"x")
            assert ours.recv(1) == b"x"
    assert not path.exists()
    path.write_text("precious")
    (tmp_path / "inside").unlink()
    with pytest.raises(OSError, match="in use"), relayed(tmp_path, f"ipc://{path}"):
        pass
    assert stat.S_ISREG(path.stat().st_mode)


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "tcp://*", "tcp://*:0", "tcp://*:65536", "tcp://*:*", "ipc:///no/one"]
)
def test_where_nobody_can_listen(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(OSError), relayed(tmp_path, endpoint):  # noqa: PT011
        pass

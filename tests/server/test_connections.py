"""Connections on which the server waits for the client: each has a time limit, and is closed if its
place is needed.

Time passes here by sweeps; the server itself makes one a second.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import socket
import struct
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.server import http, listening
from minisrv.server.connections import (
    BODY_BYTES_PER_SECOND,
    BODY_SECONDS,
    HEAD_SECONDS,
    Connections,
)
from minisrv.server.http import BoundedProtocol
from tests.server.live_server import serve_with_connections
from tests.waiting import GUARD_SECONDS, until

pytestmark = pytest.mark.anyio

POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


class Fake:
    """A connection that records how it ended."""

    def __init__(self, body: int | None = 0) -> None:
        self.end = ""
        self.body = body

    def abort(self) -> None:
        self.end = "aborted"

    def time_out(self) -> None:
        self.end = "timed out"

    def body_bytes(self) -> int | None:
        return self.body


def sweep(connections: Connections, seconds: int) -> None:
    """Let this many seconds pass for the connections."""
    for _ in range(seconds):
        connections.end_late_connections()


def test_a_head_has_its_time_from_the_last_thing_that_was_done() -> None:
    """The time for a head starts anew whenever a connection begins to wait for one, when it is
    opened or after a response, and a connection that waits longer is timed out."""
    connections, first, second = Connections(), Fake(), Fake()
    connections.wait_for_head(first)
    connections.wait_for_head(second)
    sweep(connections, HEAD_SECONDS)
    connections.wait_for_head(first)
    connections.end_late_connections()
    assert (first.end, second.end) == ("", "timed out")
    sweep(connections, HEAD_SECONDS)
    assert first.end == "timed out"


def test_a_body_has_time_for_what_has_come_of_it() -> None:
    """A body has more time the more of it has come: one that comes too slowly is timed out, a fast
    one is not."""
    connections, slow, fast, unread = Connections(), Fake(), Fake(), Fake(None)
    for connection in (slow, fast, unread):
        connections.wait_for_head(connection)
        connections.wait_for_body(connection)
    for _ in range(4 * BODY_SECONDS):
        slow.body, fast.body = slow.body + BODY_BYTES_PER_SECOND // 2, fast.body + 131_072
        connections.end_late_connections()
    assert (slow.end, fast.end, unread.end) == ("timed out", "", "")
    unread.body = 0  # its time begins when the application reads it
    sweep(connections, BODY_SECONDS)
    assert unread.end == ""
    connections.end_late_connections()
    assert unread.end == "timed out"


def test_who_waits_for_the_server_has_any_time_and_keeps_its_place() -> None:
    """A connection whose request runs is never timed out, and is not closed to make room for
    others."""
    connections, running = Connections(limit=1), Fake()
    connections.wait_for_head(running)
    connections.wait_for_nothing(running)
    sweep(connections, 10_000)
    assert not connections.make_room()
    assert running.end == ""
    connections.closed(running)
    assert connections.make_room()


def test_who_has_waited_longest_gives_way_and_bodies_last() -> None:
    """Where there is no room, the connection that has waited longest is closed; one that sends a
    body or does not read its answer is closed only after those that wait for a head, and one whose
    request runs never."""
    connections = Connections(limit=4)
    body, first, reader, running = found = [Fake() for _ in range(4)]
    for connection in found:
        assert connections.make_room()
        connections.wait_for_head(connection)
    connections.wait_for_body(body)
    connections.wait_for_reader(reader)
    connections.wait_for_nothing(running)
    for victim in (first, body, reader):
        assert connections.make_room()
        assert victim.end == "aborted"
        newcomer = Fake()
        connections.wait_for_head(newcomer)
        connections.wait_for_nothing(newcomer)
    assert not connections.make_room()
    assert running.end == ""


class Recorder:
    """An application that waits where a test tells it to, and counts its requests and those whose
    client disconnected."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = 0
        self.lost = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            self.lost += 1
            return
        if scope["path"] == "/slow":
            await self.go.wait()
        await Response(b"%d" % len(body))(scope, receive, send)


async def read(reader: asyncio.StreamReader) -> bytes:
    """Read everything that comes until the server closes the connection."""
    async with asyncio.timeout(GUARD_SECONDS):
        return await reader.read()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"\r\n", 408),
        (b"POST / HTTP/1.1\r\nhos", 408),
        (POST, 408),
        (POST + b"x" * 99, 408),
        (POST.replace(b"content-length: 100", b"transfer-encoding: chunked") + b"5\r\nhe", 408),
        (POST.replace(b"host", b"connection: upgrade\r\nupgrade: h2c\r\nhost") + b"x", 408),
    ],
)
async def test_who_does_not_go_on_is_told_and_closed(sent: bytes, status: int | None) -> None:
    """A client that stops in the middle of a request gets 408 and a closed connection; one that
    sent nothing is closed without an answer."""
    app = Recorder()
    async with serve_with_connections(app) as (address, connections):
        # A new connection, and one kept after a request.
        for before in (b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection(*address)
            if before:
                writer.write(before)
                assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200 ")
            begun = app.begun
            writer.write(sent)
            await until(lambda begun=begun: app.begun > begun or b"\r\n\r\n" not in sent)
            reading = asyncio.create_task(read(reader))
            while not reading.done():
                connections.end_late_connections()
                await asyncio.sleep(0.001)
            received = await reading
            writer.close()
            if status is None:
                assert received == b""
                continue
            head, _, body = received.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert b"connection: close" in head
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
        await until(lambda: app.lost == app.begun - 1)


async def test_a_connection_is_kept_for_sweeps_and_not_for_seconds() -> None:
    """A keep-alive connection lasts for a number of sweeps: if seconds counted, a request that came
    while the worker was busy would be lost."""
    async with serve_with_connections(Recorder(), timeout_keep_alive=0) as (address, connections):
        reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(GUARD_SECONDS):
            for _ in range(3):
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200 ")
                sweep(connections, HEAD_SECONDS // 2)
                await asyncio.sleep(0.05)
            sweep(connections, HEAD_SECONDS)
            assert await reader.read() == b""
        writer.close()


async def test_a_slow_line_brings_a_large_body() -> None:
    """A body of four megabytes at one megabit a second is read to its end."""
    async with serve_with_connections(Recorder()) as (address, connections):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST.replace(b"100", b"%d" % (4 << 20)))
        for _ in range(32):
            writer.write(b"x" * (128 << 10))
            await writer.drain()
            await asyncio.sleep(0.005)
            connections.end_late_connections()
        async with asyncio.timeout(GUARD_SECONDS):
            assert await reader.readuntil(b"\r\n\r\n4194304")
        writer.close()


async def test_who_waits_for_an_answer_gets_it_however_long_it_takes() -> None:
    """A request that runs for any length of time is answered, even with half a head of another one
    behind it."""
    app = Recorder()
    async with serve_with_connections(app) as (address, connections):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\nGET /behind HTTP/1.1\r\nho")
        await until(lambda: app.begun == 1)
        sweep(connections, 10_000)
        app.go.set()
        async with asyncio.timeout(GUARD_SECONDS):
            assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"no HTTP\r\n\r\n"])
@pytest.mark.parametrize("reset", [False, True])
async def test_nothing_holds_a_connection_that_is_closed(
    sent: bytes, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the timer of a keep-alive connection nor that of one that lingers after an error
    keeps a closed connection in memory."""
    opened: list[weakref.ref[BoundedProtocol]] = []

    class Protocol(BoundedProtocol):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.append(weakref.ref(self))

    monkeypatch.setattr(listening, "BoundedProtocol", Protocol)
    monkeypatch.setattr(http, "LINGER_SECONDS", 10 * GUARD_SECONDS)
    settings = {"timeout_keep_alive": 10 * GUARD_SECONDS}
    async with serve_with_connections(Recorder(), **settings) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        async with asyncio.timeout(GUARD_SECONDS):
            await reader.readuntil(b"\r\n\r\n")
        assert opened[0]() is not None
        if reset:
            linger = struct.pack("ii", 1, 0)
            client = writer.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        await until(lambda: gc.collect() >= 0 and opened[0]() is None)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nho", POST + b"x"])
async def test_as_many_connections_as_somebody_likes_leave_room(sent: bytes) -> None:
    """Any number of connections that are silent or have sent half a head or half a body leave room
    for others, and do not end one that is being answered."""
    app = Recorder()
    async with serve_with_connections(app) as (address, connections):
        connections.limit = 8
        answered, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await until(lambda: app.begun == 1)
        clients = []
        for _ in range(30):
            clients.append(await asyncio.open_connection(*address))
            clients[-1][1].write(sent)
        async with httpx.AsyncClient(trust_env=False) as http:
            for _ in range(3):
                url = f"http://{address[0]}:{address[1]}/health"
                assert (await http.get(url, timeout=GUARD_SECONDS)).status_code == 200
        await until(
            lambda: sum(reader.at_eof() or bool(reader.exception()) for reader, _ in clients) >= 22
        )
        app.go.set()
        assert (await read(answered)).startswith(b"HTTP/1.1 200 ")
        for _, client in clients:
            client.close()
        writer.close()


async def test_who_does_not_read_gives_way() -> None:
    """Clients that do not read their large answers are closed to make room for others."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        large = scope["path"] == "/large"
        await Response(b"x" * (16 << 20 if large else 1))(scope, receive, send)

    async with serve_with_connections(app) as (address, connections):
        connections.limit = 8
        with ExitStack() as stack:
            for _ in range(8):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await asyncio.get_running_loop().sock_connect(client, address)
                client.send(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
            await until(lambda: len(connections._readers) == 8)
            async with httpx.AsyncClient(trust_env=False) as http:
                for _ in range(3):
                    url = f"http://{address[0]}:{address[1]}/health"
                    assert (await http.get(url, timeout=GUARD_SECONDS)).status_code == 200


async def test_connections_in_their_handshake_count(tmp_path: Path) -> None:
    """Connections that do not finish their TLS handshake count towards the limit, leave room for
    others and are timed out."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    pem = tmp_path / "server.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(pem)
    app = Recorder()
    async with serve_with_connections(app, ssl_certfile=pem) as (address, connections):
        connections.limit = 4
        silent = [await asyncio.open_connection(*address) for _ in range(10)]
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            url = f"https://{address[0]}:{address[1]}/"
            assert (await http.get(url, timeout=GUARD_SECONDS)).status_code == 200
        while not all(reader.at_eof() for reader, _ in silent):
            connections.end_late_connections()
            await asyncio.sleep(0.001)
        for _, writer in silent:
            writer.close()


async def test_a_system_without_a_descriptor_left_does_not_end_the_accepting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After ENFILE from `accept` the server logs the failure, tries again and serves."""
    monkeypatch.setattr(listening, "ACCEPT_AGAIN_SECONDS", 0.01)
    accept: Callable[[socket.socket], Any] = socket.socket.accept
    failures = 3

    def fail(listener: socket.socket) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.ENFILE, "Too many open files in system")
        return accept(listener)

    async with serve_with_connections(Recorder()) as (address, _):
        monkeypatch.setattr(socket.socket, "accept", fail)
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://{address[0]}:{address[1]}/"
            assert (await http.get(url, timeout=GUARD_SECONDS)).status_code == 200
    assert failures == 0
    assert caplog.text.count("Too many open files in system") == 3

"""Clients that go away without a word: their requests end, their slots and blocks come back."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.server import CHAT, COMPLETIONS, Server, until

IDLE = (0.0, 0.0, 0.0)
BODIES = {
    COMPLETIONS: {"prompt": "Once upon a time", "max_tokens": 480},
    CHAT: {"messages": [{"role": "user", "content": "Go on."}]},
}


@pytest.fixture(params=["server", "async_server"])
def either(request: pytest.FixtureRequest) -> Server:
    """At a lag of zero and of one: there an aborted request is still named by a step in flight."""
    server: Server = request.getfixturevalue(request.param)
    return server


def load(server: Server) -> tuple[float, float, float]:
    metrics = server.metrics()
    return (
        metrics["num_requests_running"],
        metrics["num_requests_waiting"],
        metrics["kv_cache_usage_perc"],
    )


@contextmanager
def connections(
    server: Server, number: int, path: str, stream: bool
) -> Iterator[list[socket.socket]]:
    """Connections with a long request each, whose answers nobody reads."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = json.dumps(BODIES[path] | {"ignore_eos": True, "stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    opened = []
    try:
        for _ in range(number):
            opened.append(socket.create_connection((host, int(port))))
            opened[-1].sendall(request)
        yield opened
    finally:
        for connection in opened:
            connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_running_and_queued(either: Server, path: str, stream: bool) -> None:
    assert load(either) == IDLE
    with connections(either, 20, path, stream):
        until(lambda: load(either)[:2] == (8, 12), "eight run and twelve wait")
        assert load(either)[2] > 0
    until(lambda: load(either) == IDLE, "all are gone")
    assert either.complete("x", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_only_those_that_went_away(server: Server) -> None:
    with connections(server, 11, COMPLETIONS, True) as opened:
        until(lambda: load(server)[:2] == (8, 3), "eight run and three wait")
        for connection in (*opened[:2], opened[-1]):
            # With a reset instead of a farewell.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        until(lambda: load(server)[:2] == (8, 0), "two of the waiting run now")
    until(lambda: load(server) == IDLE, "all are gone")


def test_a_long_prefill(server: Server) -> None:
    """A client that goes away before its first token."""
    before = server.metrics()['request_failure_total{status="499"}']
    with connections(server, 6, CHAT, False):
        pass
    until(lambda: server.metrics()['request_failure_total{status="499"}'] == before + 6, "noticed")
    until(lambda: load(server) == IDLE, "all are gone")

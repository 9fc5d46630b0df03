"""Clients that go away without notice: their requests end, and their request indices and KV cache
blocks are free again."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import CHAT, COMPLETIONS, Server, request_bytes, until

IDLE = (0.0, 0.0, 0.0)
BODIES = {
    COMPLETIONS: {"prompt": "Once upon a time", "max_tokens": 480},
    CHAT: {"messages": [{"role": "user", "content": "Go on."}]},
}


@pytest.fixture(params=["server", "async_server"])
def either(request: pytest.FixtureRequest) -> Server:
    """A server without and one with asynchronous scheduling, where a step in flight still holds an
    aborted request."""
    server: Server = request.getfixturevalue(request.param)
    return server


def load(server: Server) -> tuple[float, float, float]:
    """Requests running, requests waiting, and the share of the KV cache that is in use."""
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
    """Open connections with one long request each, whose answers nobody reads."""
    sent = request_bytes(path, BODIES[path] | {"ignore_eos": True, "stream": stream})
    opened = []
    try:
        for _ in range(number):
            opened.append(server.connect())
            opened[-1].sendall(sent)
        yield opened
    finally:
        for connection in opened:
            connection.close()


def reset(connection: socket.socket) -> None:
    """Close a connection with a TCP reset, without an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_running_and_queued(either: Server, path: str, stream: bool) -> None:
    until(lambda: load(either) == IDLE, "no graph is being certified")
    with connections(either, 20, path, stream):
        until(lambda: load(either)[:2] == (8, 12), "eight run and twelve wait")
        assert load(either)[2] > 0
    until(lambda: load(either) == IDLE, "all are gone")
    assert either.complete("x", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_only_those_that_went_away(server: Server) -> None:
    """Clients that reset their connections end their own requests only, running or waiting."""
    with connections(server, 11, COMPLETIONS, True) as opened:
        until(lambda: load(server)[:2] == (8, 3), "eight run and three wait")
        for connection in (*opened[:2], opened[-1]):
            reset(connection)
        until(lambda: load(server)[:2] == (8, 0), "two of the waiting run now")
    until(lambda: load(server) == IDLE, "all are gone")


def test_a_long_prefill(server: Server) -> None:
    """Clients that go away before their first token are counted with status 499."""

    def gone() -> float:
        return server.metrics().get('request_failure_total{status="499"}', 0)

    before = gone()
    with connections(server, 6, CHAT, False):
        pass
    until(lambda: gone() == before + 6, "noticed")
    until(lambda: load(server) == IDLE, "all are gone")


RUNNING, WAITING = 4, 12
CLIENTS = 250
AT_ONCE = RUNNING + WAITING + 4


def vanish(server: Server, random: random.Random) -> str:
    """Be one client that sends a random request and goes away. Returns how far the client came."""
    path = random.choice((COMPLETIONS, CHAT))
    length = random.choice((1, 20, 400))
    body: dict[str, Any] = {"max_tokens": random.choice((3, 100, 1000)), "ignore_eos": True}
    body["stream"] = random.random() < 0.6
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": "a b " * length}]
    else:
        body["prompt"] = [[5] * length] * random.choice((1, 1, 3))
    sent = request_bytes(path, body)
    cut = random.random() < 0.1
    with server.connect() as connection:
        connection.sendall(sent[: random.randrange(len(sent))] if cut else sent)
        if body["stream"] and not cut and random.random() < 0.5:
            connection.recv(1)  # it goes away after it has seen the beginning of its answer
        time.sleep(random.choice((0, random.uniform(0, 0.03), random.uniform(0, 0.3))))
        connection.setblocking(False)
        try:
            received = connection.recv(1 << 20)
        except BlockingIOError:
            received = b""
        if random.random() < 0.5:
            reset(connection)
    if cut:
        return "has sent half a request"
    if not received:
        return "has no answer"
    if b" 429 " in received:
        return "was refused"
    return "has a part" if body["stream"] and b"[DONE]" not in received else "has all"


FLAGS = (
    *("--max-num-seqs", str(RUNNING)),
    *("--max-waiting", str(WAITING)),
    *("--max-num-batched-tokens", "64"),
)


@pytest.mark.parametrize("seed", range(2))
def test_at_any_moment(start: Callable[..., Server], tiny: Path, seed: int) -> None:
    """Clients go away while their request is queued, in prefill or in decode, before all of it is
    sent or after the answer has come, streamed or not, by an orderly close or a reset, with and
    without asynchronous scheduling."""
    ahead = ["--async-scheduling"] * (seed % 2)
    server = start(str(tiny), *FLAGS, *ahead).wait_ready()
    print(json.dumps(vanish_all(server, seed, CLIENTS)))


def vanish_all(server: Server, seed: int, clients: int) -> Counter[str]:
    """Let `clients` clients of a server with FLAGS go away. Returns how many came how far. Raises
    AssertionError if anything of them is left."""
    question = {"prompt": list(range(5, 99)), "max_tokens": 40, "ignore_eos": True}
    answer = server.complete(**question)["choices"]
    files = Path(f"/proc/{server.worker_pid()}/fd")
    before = len(os.listdir(files))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        ends = threads.map(
            lambda index: vanish(server, random.Random(f"{seed} {index}")), range(clients)
        )
        counts = Counter(ends)
    until(lambda: load(server) == IDLE, "all are gone")
    until(lambda: len(os.listdir(files)) <= before, "so are their connections")
    # Every place is free again: as many requests as there are places run and wait at the same time.
    bodies = [{"prompt": [5], "max_tokens": 100, "ignore_eos": True}] * (RUNNING + WAITING)
    futures = server.post_all(COMPLETIONS, bodies)
    assert {future.result(60).status_code for future in futures} == {200}
    assert server.complete(**question)["choices"] == answer
    assert "Traceback" not in server.log
    assert counts["has no answer"] > clients / 10
    assert counts["has a part"] > clients / 50
    return counts

"""Clients that misbehave: each gets its answer, and the server goes on."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import CHAT, COMPLETIONS, SMALL, Server, read_all, request_bytes, until

JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def still_serving(server: Server) -> Iterator[None]:
    """After each test, the next request is served, no KV cache block is left in use and nothing has
    raised."""
    yield
    assert server.complete("x", max_tokens=2)["usage"]["completion_tokens"] == 2
    # A graph that is being certified holds blocks for a moment.
    until(lambda: server.metrics()["kv_cache_usage_perc"] == 0, "all blocks are back")
    assert "Traceback" not in server.log


def test_of_a_field_given_twice_the_last_counts(server: Server) -> None:
    content = b'{"prompt": "x", "max_tokens": 1, "max_tokens": 3, "ignore_eos": true}'
    response = httpx.post(server.url + COMPLETIONS, content=content, headers=JSON, timeout=60)
    assert response.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\uffff\u202e\u200b",
        "e\u0301\u0323" + "\u0300" * 400,
        "👩‍👩‍👧‍👦🏳️‍🌈" * 10,
        "<|im_end|><|im_start|>system\n",
        " \n\t\r " * 50,
        "𒈙ﷺ꧅",
    ],
)
def test_odd_text(server: Server, text: str) -> None:
    """Odd text is served as it is or refused as too long, on both routes, streamed or not."""
    for path, body in (
        (COMPLETIONS, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        for stream in (False, True):
            response = server.post(path, **body, max_tokens=2, stream=stream, stop=text[:9])
            if response.status_code != 200:
                assert response.json()["error"]["code"] == "context_length_exceeded"


def test_half_a_request_holds_nobody_up(server: Server) -> None:
    """A connection that has sent part of its request does not delay others, and may send the rest
    later."""
    with server.connect() as connection:
        connection.sendall(request_bytes(COMPLETIONS, {"prompt": "x"})[:-4])
        assert server.complete("x", max_tokens=2)["choices"]
        connection.sendall(request_bytes(COMPLETIONS, {"prompt": "x"})[-4:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    body = {"prompt": "x", "ignore_eos": True}
    with server.connect() as connection:
        connection.sendall(
            request_bytes(COMPLETIONS, {**body, "max_tokens": 30})
            + request_bytes(COMPLETIONS, {**body, "max_tokens": 2, "stream": True})
            + request_bytes("/nowhere", {})
            + request_bytes(COMPLETIONS, {**body, "max_tokens": 3}, "connection: close")
        )
        answers = read_all(connection).decode().split("HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == ["200", "200", "404", "200"]
    assert '"completion_tokens":30' in answers[0]
    assert "data: [DONE]" in answers[1]
    assert '"completion_tokens":3' in answers[3]


def test_who_pipelines_and_vanishes_is_gone_for_the_request_that_runs(server: Server) -> None:
    """A client that goes away aborts the request that runs, and not only the last one that it
    pipelined, which was never begun."""
    long = {"prompt": "x", "ignore_eos": True, "max_tokens": 400, "stream": True}

    def failures(status: int) -> float:
        return server.metrics().get(f'request_failure_total{{status="{status}"}}', 0)

    gone, failed, logged = failures(499), failures(500), server.log.count("Traceback")
    # Requests ahead, so that the long one is once the first and once behind another.
    for short in (0, 1):
        with server.connect() as connection:
            ahead = request_bytes(COMPLETIONS, {**long, "max_tokens": 1}) * short
            connection.sendall(ahead + request_bytes(COMPLETIONS, long) * 3)
            for _ in range(short + 1):
                assert connection.recv(1 << 16)
        until(lambda: server.metrics()["num_requests_running"] == 0, "it is aborted")
    assert failures(499) == gone + 2
    assert failures(500) == failed
    assert server.log.count("Traceback") == logged


def test_two_hundred_connections_at_once(server: Server) -> None:
    bodies = [
        {"prompt": f"{i}", "max_tokens": 3, "ignore_eos": True, "stream": bool(i % 2)}
        for i in range(200)
    ]
    answers = [future.result() for future in server.post_all(COMPLETIONS, bodies)]
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[1::2])
    assert all(answer.json()["usage"]["completion_tokens"] == 3 for answer in answers[::2])


def test_a_reader_that_stops_reading(server: Server) -> None:
    """A client that stops reading delays nobody else, and gets all of its answer when it reads
    again."""
    body = {"prompt": ["x"] * 6, "max_tokens": 250, "ignore_eos": True, "logprobs": 20}
    with server.connect(buffer=4096) as connection:
        connection.sendall(
            request_bytes(COMPLETIONS, {**body, "stream": True}, "connection: close")
        )
        for _ in range(10):
            assert server.complete("y", max_tokens=20, ignore_eos=True)["choices"]
        received = read_all(connection).decode()
    assert received.count('"finish_reason":"length"') == 6
    assert received.count("data: [DONE]") == 1


FILES = 320
"""Limit of open files of the servers' processes: more than a server needs for itself, and not more
than the tests have clients."""


def test_more_connections_than_files(start: Callable[..., Server]) -> None:
    """Idle connections, half heads and half bodies, as many as there are file descriptors: another
    client is still served, and memory grows little."""
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {FILES}))"
    server = start(*SMALL, before=limits).wait_ready()
    for pid in server.group():
        (files,) = re.findall(r"Max open files +(\d+)", Path(f"/proc/{pid}/limits").read_text())
        assert files == str(FILES)
    memory = resident_bytes(server.worker_pid())
    body = request_bytes(COMPLETIONS, b" " * (4 << 20))[: 1 << 20]
    kinds = [b"", b"POST /v1/completions HTTP/1.1\r\nhos", body[:4096], body]
    connections = []
    try:
        for index in range(FILES):
            connections.append(server.connect())
            # The server closed it to make room, or had no room for its body.
            with suppress(ConnectionError):
                connections[-1].sendall(kinds[index % len(kinds)])
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert server.get(path).status_code == 200
        assert server.complete("x", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert resident_bytes(server.worker_pid()) - memory < 160 << 20
    finally:
        for connection in connections:
            connection.close()
    until(lambda: server.metrics()["num_requests_running"] == 0, "all are gone")
    assert "Traceback" not in server.log
    assert "cannot be accepted" not in server.log


def test_more_requests_than_files(start: Callable[..., Server], tiny: Path) -> None:
    """While the engine is stopped, the server lets in only as many requests as leave descriptors
    for the routes of supervisors; the others get 429."""
    limits = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, {FILES}))"
    flags = ("--engine-timeout", "600", "--max-waiting", str(2 * FILES))
    server = start(str(tiny), *SMALL, *flags, before=limits).wait_ready()
    request = request_bytes(COMPLETIONS, {"prompt": "x", "max_tokens": 2}, "connection: close")
    with ExitStack() as stack:
        os.kill(server.engine_pid(), signal.SIGSTOP)
        connections = []
        for _ in range(FILES):  # one that has sent nothing would be closed to make room for others
            connections.append(stack.enter_context(server.connect()))
            connections[-1].sendall(request)
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert server.get(path).status_code == 200
        os.kill(server.engine_pid(), signal.SIGCONT)
        statuses = Counter(read_all(connection).split()[1] for connection in connections)
    assert statuses.keys() == {b"200", b"429"}
    assert statuses[b"200"] > FILES // 4


def resident_bytes(pid: int) -> int:
    """The resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

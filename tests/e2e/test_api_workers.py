"""Several API workers behind one port: they serve, die, end and count as one server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from minisrv.server.worker import MEMORY_BYTES
from minisrv.server.worker_config import CHECKPOINT
from tests.e2e.server import COMPLETIONS, SMALL, Server, events_of, read_all, request_bytes, until
from tests.e2e.test_death import HOW, assert_dead
from tests.e2e.test_flood import body, tokens
from tests.e2e.test_start_and_stop import free_port

Start = Callable[..., Server]
Streams = dict[int, list[socket.socket]]
"""Open connections, by the id of the process that serves them."""

TWO = ("--api-workers", "2", "--max-num-batched-tokens", "64")
LONG: dict[str, Any] = {"prompt": [5], "max_tokens": 30_000, "ignore_eos": True, "stream": True}


@pytest.fixture
def two(start: Start, tiny: Path) -> Server:
    """A server with two API workers that runs up to eight requests at a time."""
    return start(str(tiny), *TWO, "--max-num-seqs", "8", "--shutdown-timeout", "1").wait_ready()


@pytest.fixture(scope="module")
def shared_two(tiny: Path) -> Iterator[Server]:
    """A server with two API workers for tests that leave it as it was."""
    names = ("--served-model-name", "one", "org/two")
    server = Server(str(tiny), *TWO, "--max-num-seqs", "4", *names)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def workers_of(server: Server) -> list[int]:
    """The process ids of both API workers."""
    return [server.worker_pid(index) for index in range(2)]


def running(server: Server) -> float:
    """The number of requests that the engine runs."""
    return server.metrics()["num_requests_running"]


def test_the_memory_of_a_worker_is_bounded(server: Server) -> None:
    """A chat template may ask for any amount of memory; the kernel's limit on the worker stops
    it."""
    limits = Path(f"/proc/{server.worker_pid()}/limits").read_text()
    assert re.search(rf"Max data size +{MEMORY_BYTES} ", limits)


@contextmanager
def streams_on_both(server: Server, each: int = 2) -> Iterator[Streams]:
    """Open `each` long streams on each of the two workers; the first byte of every stream has
    come."""
    found: Streams = {pid: [] for pid in workers_of(server)}
    try:
        while any(len(opened) < each for opened in found.values()):
            connection = server.connect()
            connection.sendall(request_bytes(COMPLETIONS, LONG, "connection: close"))
            assert connection.recv(1)
            opened = found[server.worker_of(connection)]  # the kernel has chosen the worker
            if len(opened) < each:
                opened.append(connection)
            else:
                connection.close()
        until(lambda: running(server) == 2 * each, "they run")
        yield found
    finally:
        for connection in (one for opened in found.values() for one in opened):
            connection.close()


def last_error(connection: socket.socket) -> dict[str, Any]:
    """The error that ends a stream whose first bytes were read before."""
    text = read_all(connection).decode()
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    return dict(events_of("\n".join(lines[-2:]))[0]["error"])


def test_both_serve_and_count_as_one(shared_two: Server) -> None:
    """Whichever worker answers /metrics, its answer counts all requests and the engine's
    counters."""
    two = shared_two
    with streams_on_both(two) as streams:
        assert len(streams) == 2
    until(lambda: running(two) == 0, "all are gone")
    before = two.metrics()
    answers = [two.complete([5, 6], max_tokens=3, ignore_eos=True) for _ in range(20)]
    assert len({str(answer["choices"]) for answer in answers}) == 1
    seen = set()
    for _ in range(20):
        with two.connect() as connection:
            connection.sendall(request_bytes("/metrics", b"", "connection: close", method="GET"))
            text = read_all(connection).decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if "minisrv:" in line)

        def added(name: str, values: dict[str, str] = values) -> float:
            return float(values[f"minisrv:{name}"]) - before.get(name, 0)

        assert added("generation_tokens_total") == 60
        assert added("prompt_tokens_total") == 40
        assert added('request_success_total{finished_reason="length"}') == 20
        assert added("time_to_first_token_seconds_count") == 20
        assert added("inter_token_latency_seconds_count") == 40
        by_worker = [added(f'http_requests_total{{worker="{index}"}}') for index in range(2)]
        seen.add(tuple(by_worker))
        assert all(by_worker), "the kernel spreads connections"
    assert len(seen) == 20, "every scrape is a request too"
    assert two.log.count("ready in") == 1


def test_the_same_tokens_as_with_one(shared_two: Server, start: Start, tiny: Path) -> None:
    """Two API workers give the same tokens as one."""
    one = start(str(tiny), "--max-num-batched-tokens", "64", "--max-num-seqs", "4").wait_ready()
    bodies = [body(index) for index in range(24)]
    found = []
    for server in (one, shared_two):
        futures = [server.post_all(path, [fields])[0] for path, fields in bodies]
        found.append([tokens(future.result(60)) for future in futures])
    assert found[0] == found[1]


def test_each_knows_the_names_the_request_and_what_is_cached(shared_two: Server) -> None:
    """Both workers know the served model names, send the request id back and report cached
    tokens."""
    address = shared_two.url.removeprefix("http://")
    seen: set[int] = set()
    cached = 0
    while len(seen) < 2:
        with closing(HTTPConnection(address, timeout=60)) as http:
            http.request("GET", "/v1/models/org/two", headers={"x-request-id": "mine"})
            answer = http.getresponse()
            assert answer.headers["x-request-id"] == "mine"
            assert json.load(answer)["id"] == "org/two"
            asked = {"model": "org/two", "prompt": [5] * 40, "max_tokens": 2, "ignore_eos": True}
            body = json.dumps(asked | {"return_token_ids": True})
            http.request("POST", COMPLETIONS, body, {"content-type": "application/json"})
            told = json.load(http.getresponse())
            assert told["model"] == "org/two"
            [choice] = told["choices"]
            assert choice["prompt_token_ids"] == asked["prompt"]
            assert len(choice["token_ids"]) == 2
            assert told["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
            cached = 32  # two blocks, whichever worker sent the request that filled them
            seen.add(shared_two.worker_of(http.sock))


def test_the_engine_counts_for_both(start: Start, tiny: Path) -> None:
    """A worker knows only its own requests; where those of all workers are too many, the engine
    refuses them with 429."""
    flags = (str(tiny), *TWO, "--max-num-seqs", "2", "--max-waiting", "2")
    server = start(*flags).wait_ready()
    with streams_on_both(server, each=1) as streams:
        waiting = []
        while server.metrics()["num_requests_waiting"] < 2:
            waiting.append(server.connect())
            waiting[-1].sendall(request_bytes(COMPLETIONS, LONG))
            until(lambda: server.metrics()["num_requests_waiting"] == len(waiting), "it waits")
        refused = [server.post(COMPLETIONS, prompt="x") for _ in range(10)]
        assert {response.status_code for response in refused} == {429}
        assert {response.json()["error"]["code"] for response in refused} == {"queue_full"}
        assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
        for connection in waiting:
            connection.close()
        assert len(streams) == 2
    until(lambda: running(server) == 0, "all are gone")
    assert server.complete("x", max_tokens=2)["choices"]


def test_a_worker_dies(two: Server) -> None:
    """A killed worker's streams end, the engine drops its requests, the other worker's streams go
    on, and a new worker takes its place without resetting the counters."""
    two.complete([5], max_tokens=2)
    with streams_on_both(two) as streams:
        before = two.metrics()
        dead, other = workers_of(two)
        os.kill(dead, signal.SIGKILL)
        for connection in streams[dead]:
            with suppress(ConnectionResetError):
                read_all(connection)
        until(lambda: two.named("minisrv-api-0") - {dead}, "another takes its place")
        until(lambda: running(two) == 2, "its requests are dropped")
        assert workers_of(two)[1] == other
        for connection in streams[other]:
            assert connection.recv(1 << 20)
        after = two.metrics()
        for name in ("request_success_total", "http_requests_total"):
            for key in (key for key in before if key.startswith(name)):
                assert after[key] >= before[key]
    until(lambda: running(two) == 0, "all are gone")
    with streams_on_both(two) as streams:
        assert dead not in streams
    assert "API worker 0" in two.log
    assert "its requests are lost" in two.log
    assert "has died, by SIGKILL (the kernel's log, dmesg, may tell why" in two.log
    two.send(signal.SIGTERM)
    assert two.wait() == 0
    two.assert_nothing_left()
    assert "Traceback" not in two.log


def test_the_only_worker_dies(start: Start, tiny: Path) -> None:
    """A client that connects while there is no worker waits for the next worker and is answered."""
    server = start(str(tiny), "--max-num-batched-tokens", "64").wait_ready()
    os.kill(server.worker_pid(), signal.SIGKILL)
    assert server.complete("x", max_tokens=2)["choices"]


def test_a_worker_dies_while_loading(start: Start) -> None:
    server = start(*SMALL, "--api-workers", "2")
    os.kill(until(lambda: server.named("minisrv-api-1"), "it starts").pop(), signal.SIGKILL)
    assert server.wait() == 1
    server.assert_nothing_left()
    assert "API worker 1" in server.log
    assert "has died, by SIGKILL" in server.log
    assert "the server ends" in server.log
    assert "Traceback" not in server.log


def test_a_worker_that_cannot_be_replaced_ends_the_server(two: Server) -> None:
    """The server ends with status 1, instead of starting workers that die one after another."""
    with streams_on_both(two) as streams:
        [private] = two.socket_dirs()
        (private / CHECKPOINT).unlink()
        dead, other = workers_of(two)
        os.kill(dead, signal.SIGKILL)
        assert [last_error(one)["code"] for one in streams[other]] == ["not_ready"] * 2
    assert two.wait() == 1
    two.assert_nothing_left()
    assert "API worker 0 did not start" in two.log


@pytest.mark.parametrize(("signum", "to_group"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_an_ordered_end_with_streams_on_both(
    two: Server, signum: signal.Signals, to_group: bool
) -> None:
    """SIGTERM may come more than once: `timeout` sends it to the process and to its group. With one
    worker each signal is sent to either, in test_the_time_to_finish_is_bounded."""
    with streams_on_both(two) as streams:
        two.send(signum, to_group=to_group)
        if signum is signal.SIGTERM:
            two.send(signum)
        for connection in (one for opened in streams.values() for one in opened):
            assert last_error(connection)["code"] == "not_ready"
        assert two.wait() == 0
    two.assert_nothing_left()
    assert "Traceback" not in two.log
    assert "ERROR" not in two.log


def test_the_engine_dies_under_streams_on_both(two: Server) -> None:
    """Every stream on both workers ends with engine_dead, and both workers report the dead
    engine."""
    with streams_on_both(two) as streams:
        os.kill(two.engine_pid(), signal.SIGKILL)
        for connection in (one for opened in streams.values() for one in opened):
            assert last_error(connection)["code"] == "engine_dead"
    for _ in range(10):
        assert_dead(two, HOW[signal.SIGKILL])
    two.send(signal.SIGTERM)
    assert two.wait() == 1
    two.assert_nothing_left()
    assert "has finished no step" not in two.log, "it is seen to end, and not only missed"


def test_the_launcher_dies(two: Server) -> None:
    """All other processes end by themselves, and their socket directory is removed."""
    with streams_on_both(two) as streams:
        two.send(signal.SIGKILL)
        for connection in (one for opened in streams.values() for one in opened):
            with suppress(ConnectionResetError):
                read_all(connection)
    until(lambda: not two.group(), "all end by themselves")
    until(lambda: not two.socket_dirs(), "the socket is gone")


def test_both_say_that_the_engine_loads_and_that_it_is_ready(start: Start) -> None:
    server = start(*SMALL, "--api-workers", "2", "--port", free_port())
    engine = server.hold_engine()
    seen = {server.get("/ready").json()["state"]}
    os.kill(engine, signal.SIGCONT)

    def both_answer() -> bool:
        with suppress(httpx.TransportError):
            assert server.get("/health").status_code == 200
            ready = server.get("/ready")
            assert ready.status_code == (200 if ready.json()["state"] == "ready" else 503)
            seen.add(ready.json()["state"])
        return "ready in" in server.log

    until(both_answer, "ready")
    assert seen >= {"loading"}
    for _ in range(10):
        assert server.get("/ready").status_code == 200


def test_two_servers_with_workers_on_one_port(start: Start, shared_two: Server) -> None:
    """The workers of one server share its port, and no other server may."""
    port = shared_two.url.rpartition(":")[2]
    for number in ("1", "2"):
        refused = start(*SMALL, "--api-workers", number, "--port", port)
        assert refused.wait() == 1
        assert "cannot listen on" in refused.log

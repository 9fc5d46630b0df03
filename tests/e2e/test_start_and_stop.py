"""From the start to an orderly end: readiness, signals while requests are open, and nothing left
behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import (
    CHAT,
    COMPLETIONS,
    SMALL,
    Server,
    events_of,
    read_all,
    request_bytes,
    until,
)
from tests.waiting import GUARD_SECONDS

Start = Callable[..., Server]

LONG = SMALL[:4]
"""Flags of a server that leave it the model's whole context, so that requests take long."""


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def open_requests(server: Server, number: int = 12) -> list[Future[httpx.Response]]:
    """Send long requests, more than run at once, half of them streamed; eight run when this
    returns."""
    body = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}
    futures = server.post_all(
        COMPLETIONS, ({**body, "stream": bool(index % 2)} for index in range(number))
    )
    waiting = number - 8

    def decoding() -> bool:
        metrics = server.metrics()
        counts = metrics["num_requests_running"], metrics["num_requests_waiting"]
        return counts == (8, waiting) and metrics["generation_tokens_total"] > 80

    until(decoding, "requests are running and waiting")
    assert not any(future.done() for future in futures)
    return futures


def error_of(future: Future[httpx.Response]) -> dict[str, Any]:
    """The error that ended a request: its response, or the last event of its stream."""
    response = future.result(GUARD_SECONDS)
    body = events_of(response.text)[-1] if response.status_code == 200 else response.json()
    assert response.status_code in (200, 503)
    return dict(body["error"])


def test_loading(start: Start) -> None:
    """The port answers at once, and requests are refused with 503 until every graph is captured."""
    server = start(*SMALL, "--port", free_port())
    engine = server.hold_engine()
    assert server.get("/health").json() == {"state": "loading"}
    ready = server.get("/ready")
    assert ready.status_code == 503
    assert ready.json()["state"] == "loading"
    assert ready.json()["loading"]["phase"]
    assert int(ready.headers["retry-after"]) > 0
    question = [{"role": "user", "content": "x"}]
    for refused in (
        server.post(COMPLETIONS, prompt="x"),
        server.post(CHAT, messages=question, stream=True),
    ):
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert int(refused.headers["retry-after"]) > 0
    assert server.get("/v1/models").status_code == 200
    assert server.metrics()['engine_state{state="loading"}'] == 1
    os.kill(engine, signal.SIGCONT)

    while (ready := server.get("/ready")).status_code != 200:
        assert ready.status_code == 503
        assert ready.json()["loading"]["phase"]
        time.sleep(0.02)
    server.wait_ready()
    assert "capturing graphs" in server.log
    assert server.get("/health").json() == {"state": "ready"}
    assert server.complete("x", max_tokens=1)["choices"]


@pytest.mark.parametrize("to_group", [False, True])
def test_open_requests_may_finish(start: Start, to_group: bool) -> None:
    """A SIGTERM to the whole group reaches the engine too, which must go on until open requests are
    done."""
    server = start(*SMALL, "--shutdown-timeout", "60").wait_ready()
    body = {"prompt": "Once", "max_tokens": 450, "ignore_eos": True}
    futures = server.post_all(COMPLETIONS, ({**body, "stream": i > 0} for i in range(3)))
    until(lambda: server.metrics()["num_requests_running"] == 3, "requests are running")
    server.send(signal.SIGTERM, to_group=to_group)
    assert server.wait() == 0
    whole, *streamed = (future.result(GUARD_SECONDS) for future in futures)
    assert whole.json()["usage"]["completion_tokens"] == 450
    for response in streamed:
        events = events_of(response.text)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    server.assert_nothing_left()


@pytest.mark.parametrize(
    ("signum", "to_group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGINT, False),
        (signal.SIGINT, True),
    ],
)
def test_the_time_to_finish_is_bounded(
    start: Start, signum: signal.Signals, to_group: bool
) -> None:
    """Requests that are still open at the end of that time end with an error, and not with a cut
    connection."""
    server = start(*LONG, "--shutdown-timeout", "1").wait_ready()
    futures = open_requests(server)
    server.send(signum, to_group=to_group)
    assert server.wait() == 0
    assert {error_of(future)["code"] for future in futures} == {"not_ready"}
    server.assert_nothing_left()
    assert "Traceback" not in server.log


def test_whatever_a_request_waits_for_it_ends_with_an_error(start: Start, tiny: Path) -> None:
    """At shutdown, a request that waits for the rest of its own body (here after a 100 Continue)
    and one whose grammar nobody compiles at the moment get 503. A client that reads no answer is
    cut off and makes nothing fail."""
    server = start(str(tiny), *SMALL, "--shutdown-timeout", "1").wait_ready()
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "integer"}}}
    long = {"prompt": ["x"] * 6, "max_tokens": 500, "ignore_eos": True, "logprobs": 20}
    with (
        server.connect() as body,
        server.connect() as grammar,
        server.connect(buffer=4096) as reader,
    ):
        # The process that tries grammars starts with the first one. It is stopped before the next.
        assert server.complete("x", max_tokens=1, response_format={"type": "json_object"})
        for pid in server.named("minisrv-grammar"):
            os.kill(pid, signal.SIGSTOP)
        reader.sendall(request_bytes(COMPLETIONS, {**long, "stream": True}))
        until(lambda: server.metrics()["generation_tokens_total"] == 1 + 6 * 500, "it is answered")
        grammar.sendall(request_bytes(COMPLETIONS, {"prompt": "x", "response_format": form}))
        body.sendall(request_bytes(COMPLETIONS, long, "expect: 100-continue")[:-5])
        assert body.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        server.send(signal.SIGTERM)
        for connection in (body, grammar):
            head, _, told = read_all(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert json.loads(told)["error"]["code"] == "not_ready"
        assert server.wait() == 0
    server.assert_nothing_left()
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


def test_a_second_interrupt_does_not_wait(start: Start) -> None:
    """A second SIGINT ends the server at once, whatever --shutdown-timeout allows."""
    server = start(*LONG, "--shutdown-timeout", "600").wait_ready()
    futures = open_requests(server)
    server.send(signal.SIGINT, to_group=True)
    until(lambda: refuses(server), "no new connections")
    server.send(signal.SIGINT, to_group=True)
    assert server.wait() == 0
    for future in futures:
        assert future.exception(GUARD_SECONDS) is not None or error_of(future)
    server.assert_nothing_left()


def refuses(server: Server) -> bool:
    """Whether the server accepts no connection any more."""
    try:
        server.get("/health")
    except httpx.TransportError:
        return True
    return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("log", ["", "weights are", "ready in"])
def test_a_signal_at_any_time(start: Start, signum: signal.Signals, log: str) -> None:
    """A signal while the engine process starts, while it loads, and at the moment at which it is
    ready."""
    server = start(*SMALL)
    if log:
        until(lambda: log in server.log, log)
    else:
        until(lambda: len(server.group()) > 2, "the engine starts")
        time.sleep(0.08)  # the engine and the workers are importing modules then
    server.send(signum, to_group=True)
    assert server.wait() == 0
    server.assert_nothing_left()
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_checkpoint_is_read(
    start: Start, signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is new to the cache is read by a process of its own, which does not outlive
    the server either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server = start(*SMALL)
    until(lambda: len(server.group()) > 1, "transformers is asked")
    server.send(signum)
    assert server.wait() == 0
    server.assert_nothing_left()
    assert "Traceback" not in server.log


def test_the_parts_of_the_start_add_up(server: Server) -> None:
    """The first line of the log comes before anything that takes long, and the named parts of the
    start add up to all of its seconds."""
    first, *_ = server.log.splitlines()
    assert "the default model, device auto" in first
    assert "engine: importing torch" in server.log
    assert re.search(
        r"resolved settings: float32 on cpu, mode \S+, \d+ of \d+ graphs \(.*\), .* KV blocks",
        server.log,
    )
    found = re.search(r"ready in ([\d.]+) s \(([^)]*)\)", server.log)
    assert found is not None
    parts = dict(part.rsplit(" ", 1) for part in found[2].split(", "))
    assert list(parts)[:4] == ["launcher", "engine process", "imports", "checkpoint"]
    assert list(parts)[-2:] == ["graphs", "API workers"]
    rounding = 0.005 * (len(parts) + 1)
    assert sum(map(float, parts.values())) == pytest.approx(float(found[1]), abs=rounding)


def test_an_eager_server_captures_nothing_and_says_so(eager_server: Server) -> None:
    assert "no graphs are captured" in eager_server.log
    assert "capturing graphs" not in eager_server.log


def test_port_zero_takes_a_free_port(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    assert port > 0
    assert server.get("/version").status_code == 200


def test_only_the_user_may_reach_the_sockets(server: Server) -> None:
    """The directory of the sockets is private to its user: whoever could write to a socket could
    act as an API worker."""
    directories = {path.parent for path in server.sockets}
    assert directories
    assert not [path for path in directories if path.stat().st_mode & 0o077]

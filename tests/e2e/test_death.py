"""A process that is killed: every open request ends, and no other process stays behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import httpx
import pytest

from tests.e2e.server import CHAT, COMPLETIONS, SMALL, Server, until
from tests.e2e.test_start_and_stop import LONG, error_of, open_requests

Start = Callable[..., Server]


def test_the_engine_under_load(start: Start) -> None:
    server = start(*LONG).wait_ready()
    futures = open_requests(server)
    os.kill(server.engine_pid(), signal.SIGKILL)
    errors = [error_of(future) for future in futures]
    assert {error["code"] for error in errors} == {"engine_dead"}

    for path in ("/health", "/ready"):
        response = server.get(path)
        assert (response.status_code, response.json()["state"]) == (503, "dead")
    assert server.metrics()['engine_state{state="dead"}'] == 1
    for path, prompt in (
        (COMPLETIONS, {"prompt": "x"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    ):
        for stream in (False, True):
            refused = server.post(path, **prompt, stream=stream)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_dead"
    assert "the engine has ended unexpectedly" in server.log
    assert "Traceback" not in server.log

    server.send(signal.SIGTERM)
    assert server.wait() == 0
    server.assert_nothing_left()


def test_the_engine_while_loading(start: Start) -> None:
    server = start(*SMALL)
    until(lambda: "weights are" in server.log, "the engine loads")
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.wait() == 1
    assert "the engine did not start: the engine has ended unexpectedly" in server.log
    assert "Traceback" not in server.log
    server.assert_nothing_left()


def test_the_parent_under_load(start: Start) -> None:
    server = start(*LONG).wait_ready()
    futures = open_requests(server)
    server.send(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    for future in futures:
        assert isinstance(future.exception(15), httpx.TransportError)
    until(lambda: not server.group(), "the engine ends by itself")
    until(lambda: not server.socket_dirs(), "the socket is gone")


def test_the_parent_while_loading(start: Start) -> None:
    server = start(*SMALL)
    until(lambda: "weights are" in server.log, "the engine loads")
    server.send(signal.SIGKILL)
    until(lambda: not server.group(), "the engine ends by itself")
    until(lambda: not server.socket_dirs(), "the socket is gone")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_engine_leaves_signals_to_its_parent(start: Start, signum: signal.Signals) -> None:
    server = start(*SMALL).wait_ready()
    os.kill(server.engine_pid(), signum)
    assert server.complete("x", max_tokens=4)["choices"]

"""A process that is killed: every open request ends, and no other process stays behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import CHAT, COMPLETIONS, SMALL, Server, until
from tests.e2e.test_start_and_stop import LONG, error_of, open_requests

Start = Callable[..., Server]


QUEUED = 8
DEAD_LINE = 1.0
"""Seconds from the engine's death to the last error."""


@pytest.mark.parametrize("seed", range(10))
def test_the_engine_at_any_moment(start: Start, tiny: Path, seed: int) -> None:
    """Idle, in prefill, in decode; with requests of every kind running and waiting."""
    moments = random.Random(seed)
    flags = ("--max-num-seqs", "4", "--max-num-batched-tokens", "64")
    server = start(str(tiny), *flags, *["--async-scheduling"] * (seed % 2)).wait_ready()
    moment = ("idle", "prefill", "prefill", "decode", "decode")[seed % 5]
    ends: list[float] = []
    futures = []
    if moment != "idle":
        length, tokens = (20_000, 5) if moment == "prefill" else (5, 20_000)
        for index in range(4 + QUEUED):
            path, prompt = (
                (CHAT, {"messages": [{"role": "user", "content": "a" * length}]})
                if index % 3 == 2
                else (COMPLETIONS, {"prompt": [[5] * length] * (1 + index % 3)})
            )
            fields = {"max_tokens": tokens, "ignore_eos": True, "stream": bool(index % 2)}
            futures += server.post_all(path, [{**prompt, **fields}])
            futures[-1].add_done_callback(lambda future: ends.append(time.monotonic()))
        until(lambda: busy(server, decodes=moment == "decode"), f"in {moment}")
        time.sleep(moments.uniform(0, 0.1))
    killed = time.monotonic()
    os.kill(server.engine_pid(), signal.SIGKILL)
    errors = [error_of(future) for future in futures]
    assert {error["code"] for error in errors} <= {"engine_dead"}
    if moment != "idle":
        slowest = max(ends) - killed
        print(f"{moment}: {len(ends)} requests, the last error after {slowest:.3f} s")
        assert slowest < DEAD_LINE
    until(lambda: server.get("/health").status_code == 503, "it is noticed", DEAD_LINE)
    assert_dead(server)
    server.send(signal.SIGTERM)
    assert server.wait() == 1
    server.assert_nothing_left()
    assert "the engine has ended unexpectedly" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_hangs(start: Start, tiny: Path, seed: int) -> None:
    """Stopped while idle, in prefill or in decode: it takes messages, and does nothing more."""
    moment = ("idle", "prefill", "decode")[seed]
    flags = ("--max-num-seqs", "4", "--engine-timeout", "2", "--api-workers", str(1 + seed % 2))
    server = start(str(tiny), *flags).wait_ready()
    prompts = {"prefill": [5] * 20_000, "decode": [5, 6]}
    fields = {"max_tokens": 20_000 if moment == "decode" else 5, "ignore_eos": True}
    futures = []
    if moment != "idle":
        bodies = [{"prompt": [prompts[moment]], **fields, "stream": s} for s in (True, False) * 3]
        futures = server.post_all(COMPLETIONS, bodies)
        until(lambda: server.metrics()["num_requests_running"] > 0, "running")
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    stopped = time.monotonic()
    if moment == "idle":  # nobody could know yet
        futures = server.post_all(COMPLETIONS, [{"prompt": [[5]], **fields}] * 4)
    assert {error_of(future)["code"] for future in futures} == {"engine_dead"}
    assert time.monotonic() - stopped < 2 + 2 * DEAD_LINE
    assert engine not in server.group()
    assert_dead(server)
    assert "the engine has finished no step for 2." in server.log
    server.send(signal.SIGTERM)
    assert server.wait() == 1
    server.assert_nothing_left()
    assert "Traceback" not in server.log


def busy(server: Server, *, decodes: bool) -> bool:
    """Whether requests run, in this phase, and more wait."""
    metrics = server.metrics()
    if decodes != (metrics["generation_tokens_total"] > 0):
        return False
    return metrics["num_requests_running"] > 0 and metrics["num_requests_waiting"] >= QUEUED


def assert_dead(server: Server) -> None:
    """It is still there to say so: every request is refused, and a supervisor can see it."""
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


@pytest.mark.parametrize("phase", ["weights are", "capturing graphs"])
def test_the_engine_while_loading(start: Start, phase: str) -> None:
    server = start(*SMALL)
    until(lambda: phase in server.log, phase)
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

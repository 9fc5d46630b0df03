"""A process is killed: every open request ends with an error, and no other process stays behind."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import CHAT, COMPLETIONS, SMALL, Server, until
from tests.e2e.test_start_and_stop import LONG, error_of, free_port, open_requests
from tests.waiting import GUARD_SECONDS

Start = Callable[..., Server]


RUNNING, QUEUED = 4, 8
ENGINE_TIMEOUT, LOADING_SECONDS = 2, 10
"""Seconds that an engine may show no sign of life: once it is ready, and while it loads (two
minutes unless a test sets less)."""


HOW = {
    signal.SIGKILL: "by SIGKILL (the kernel's log, dmesg, may tell why: of memory that ran out",
    signal.SIGSTOP: "killed as it showed no sign of life",
}
"""How the log and every client's error describe the end of an engine, by the signal that ended
it."""


@dataclass(frozen=True)
class Death:
    """How an engine is ended, and what it does at that moment.

    moment: "loading", "idle", "prefill" or "decode".
    flags: the flags of its server.
    """

    signum: signal.Signals
    moment: str
    flags: tuple[str, ...]


def random_death(seed: int) -> Death:
    """Every signal at every moment, with one API worker and then three, as the seed counts up; the
    other flags are drawn at random."""
    rng = random.Random(seed)
    ahead = ["--async-scheduling"] * rng.randrange(2)
    eager = ["--enforce-eager"] * rng.randrange(2)
    return Death(
        (signal.SIGKILL, signal.SIGSTOP)[seed % 2],
        ("idle", "prefill", "decode", "loading")[seed // 2 % 4],
        ("--api-workers", "13"[seed // 8 % 2], *ahead, *eager),
    )


def die(start: Start, model: Path, death: Death, seed: int) -> dict[str, Any]:
    """End an engine in this way and check all that follows. Returns measurements, of which only the
    seconds depend on how busy the machine is.

    seed: the seed of the delay before the signal, within the moment.
    Raises AssertionError if anything goes wrong.
    """
    rng = random.Random(seed)
    flags = ("--max-num-seqs", str(RUNNING), "--max-num-batched-tokens", "64", "--port")
    timeout = ("--engine-timeout", str(ENGINE_TIMEOUT))
    patience = (
        f"from minisrv.server import watched_engine as w; w.LOADING_SECONDS = {LOADING_SECONDS}"
    )
    server = start(str(model), *flags, free_port(), *timeout, *death.flags, before=patience)
    found = {"signal": death.signum.name, "moment": death.moment, "flags": list(death.flags)}
    if death.moment == "loading":
        _die_loading(server, death.signum, rng)
        return found
    server.wait_ready()
    ends: list[float] = []
    futures = _requests(server, death.moment)
    for future in futures:
        future.add_done_callback(lambda future: ends.append(time.monotonic()))
    if futures:
        until(lambda: busy(server, decodes=death.moment == "decode"), f"in {death.moment}")
    time.sleep(rng.uniform(0, 0.1))
    engine = server.engine_pid()
    done = sum(future.done() for future in futures)
    os.kill(engine, death.signum)
    killed = time.monotonic()
    if death == Death(signal.SIGSTOP, "idle", death.flags):  # no request could notice it so far
        futures = server.post_all(COMPLETIONS, [{"prompt": [[5]], "max_tokens": 5}] * 4)
        for future in futures:
            future.add_done_callback(lambda future: ends.append(time.monotonic()))
    errors = [error_of(future) for future in futures]
    assert done == 0
    assert {error["code"] for error in errors} <= {"engine_dead"}
    how = HOW[death.signum]
    assert all(how in error["message"] for error in errors), errors
    slowest = max(ends, default=killed) - killed
    until(lambda: server.get("/ready").status_code == 503, "it is noticed")
    unready = time.monotonic() - killed
    until(lambda: engine not in server.group(), "the engine is gone")
    # Each worker hears of it by itself, and answers here come from any of them.
    workers = int(death.flags[death.flags.index("--api-workers") + 1])
    told = "every request is refused from now on"
    until(lambda: server.log.count(told) == workers, "every worker knows")
    assert_dead(server, how)
    server.send(signal.SIGTERM)
    assert server.wait() == 1
    server.assert_nothing_left()
    # The end of a killed engine is seen itself, and not only inferred from its silence.
    silent = "the engine has finished no step for" in server.log
    assert silent == (death.signum == signal.SIGSTOP)
    assert f"the engine has ended unexpectedly, {how}" in server.log
    assert "Traceback" not in server.log
    return {
        **found,
        "requests": len(futures),
        "last_error_seconds": round(slowest, 3),
        "unready_seconds": round(unready, 3),
    }


def _requests(server: Server, moment: str) -> list[Future[httpx.Response]]:
    """Send more requests than run at once, on both routes, streamed or not; with long prompts for
    the moment "prefill" and long answers for "decode"."""
    if moment == "idle":
        return []
    length, tokens = (20_000, 5) if moment == "prefill" else (5, 20_000)
    futures = []
    for index in range(RUNNING + QUEUED):
        path, prompt = (
            (CHAT, {"messages": [{"role": "user", "content": "a" * length}]})
            if index % 3 == 2
            else (COMPLETIONS, {"prompt": [[5] * length] * (1 + index % 3)})
        )
        fields = {"max_tokens": tokens, "ignore_eos": True, "stream": bool(index % 2)}
        futures += server.post_all(path, [{**prompt, **fields}])
    return futures


def _die_loading(server: Server, signum: signal.Signals, rng: random.Random) -> None:
    """End an engine while it loads. A killed one ends the server. A stopped one counts as loading
    for as long as a slow machine may take to show a sign of life, and then it is killed."""

    def state() -> str | None:
        try:
            return str(server.get("/ready").json()["state"])
        except httpx.TransportError:
            return None

    until(lambda: server.named("minisrv-engine"), "the engine is there")
    time.sleep(rng.uniform(0, 0.5))
    os.kill(server.engine_pid(), signum)
    if signum == signal.SIGSTOP:
        until(lambda: state() == "loading", "it says so")
        time.sleep(ENGINE_TIMEOUT)
        assert state() == "loading"
        refused = server.post(COMPLETIONS, prompt="x")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert server.wait() == 1
        assert "the engine has shown no sign of life for 1" in server.log
    else:
        assert server.wait() == 1
    told = f"the engine did not start: the engine has ended unexpectedly, {HOW[signum]}"
    assert told in server.log
    assert "Traceback" not in server.log
    server.assert_nothing_left()


@pytest.mark.parametrize("seed", [0, 9, 10, 3, 4, 13, 14, 7])  # each signal at each moment
def test_the_engine_at_any_moment(start: Start, tiny: Path, seed: int) -> None:
    """Engines that are killed or stopped while idle, in prefill, in decode or loading, with
    requests of every kind running and waiting, behind one API worker and behind three. A stopped
    engine still receives messages and does nothing with them."""
    print(die(start, tiny, random_death(seed), seed))


def busy(server: Server, *, decodes: bool) -> bool:
    """Whether requests run in this phase (decode or before) and `QUEUED` or more of them wait."""
    metrics = server.metrics()
    if decodes != (metrics["generation_tokens_total"] > 0):
        return False
    return metrics["num_requests_running"] > 0 and metrics["num_requests_waiting"] >= QUEUED


def assert_dead(server: Server, how: str) -> None:
    """Check that the server is still up to report its dead engine: every request is refused, and
    the health routes and the metrics show it.

    how: how the engine ended, which every refusal says.
    """
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
            error = refused.json()["error"]
            assert error["code"] == "engine_dead"
            assert how in error["message"]


@pytest.mark.parametrize("phase", ["weights are", "capturing graphs"])
def test_the_engine_while_loading(start: Start, phase: str) -> None:
    """An engine that is killed while it reads weights or captures graphs ends the server."""
    server = start(*SMALL, "--port", free_port())
    engine = server.hold_engine()  # only an API worker hears that graphs are being captured
    os.kill(engine, signal.SIGCONT)
    until(lambda: phase in server.log, phase)
    os.kill(engine, signal.SIGKILL)
    assert server.wait() == 1
    how = HOW[signal.SIGKILL]
    assert f"the engine did not start: the engine has ended unexpectedly, {how}" in server.log
    assert "Traceback" not in server.log
    server.assert_nothing_left()


STOPPED = pytest.mark.parametrize(
    "stopped",
    [(), ("minisrv-engine",), ("minisrv-engine", "minisrv-api-0")],
    ids=["none", "engine", "all"],
)
"""Names of the processes that are stopped, so that they cannot notice that the launcher dies."""


def stop(server: Server, names: tuple[str, ...]) -> None:
    """Stop the server's processes of these names."""
    for name in names:
        os.kill(server.only(name), signal.SIGSTOP)


@STOPPED
def test_the_parent_under_load(start: Start, stopped: tuple[str, ...]) -> None:
    """If the launcher is killed with requests open, all its processes end, even the stopped
    ones."""
    server = start(*LONG).wait_ready()
    futures = open_requests(server)
    stop(server, stopped)
    server.send(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    for future in futures:
        assert isinstance(future.exception(GUARD_SECONDS), httpx.TransportError)
    until(lambda: not server.group(), "the engine ends by itself")
    until(lambda: not server.socket_dirs(), "the socket is gone")


@STOPPED
def test_the_parent_while_loading(start: Start, stopped: tuple[str, ...]) -> None:
    """If the launcher is killed while the engine loads, all its processes end, even the stopped
    ones."""
    server = start(*SMALL)
    until(lambda: "weights are" in server.log, "the engine loads")
    stop(server, stopped)
    server.send(signal.SIGKILL)
    until(lambda: not server.group(), "the engine ends by itself")
    until(lambda: not server.socket_dirs(), "the socket is gone")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_engine_leaves_signals_to_its_parent(start: Start, signum: signal.Signals) -> None:
    """SIGTERM and SIGINT to the engine itself do not end it: requests are still served."""
    server = start(*SMALL).wait_ready()
    os.kill(server.engine_pid(), signum)
    assert server.complete("x", max_tokens=4)["choices"]

"""A real server is put to sleep and woken up: under load, by any of its workers, and at its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import COMPLETIONS, SMALL, Server, until
from tests.e2e.test_api_workers import streams_on_both
from tests.e2e.test_start_and_stop import error_of, free_port

Start = Callable[..., Server]

FLAG = "--enable-sleep-mode"
LONG: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 30_000, "ignore_eos": True}
ASLEEP = {"is_sleeping": True, "level": 1, "released": ["weights", "kv_cache"]}
AWAKE = {"is_sleeping": False, "level": 0, "released": []}


def post(server: Server, path: str, *headers: tuple[str, str]) -> httpx.Response:
    return httpx.post(server.url + path, timeout=60, headers=list(headers))


def is_sleeping(server: Server) -> dict[str, Any]:
    return dict(server.get("/is_sleeping").json())


def state(server: Server) -> tuple[int, str]:
    answer = server.get("/ready")
    return answer.status_code, answer.json()["state"]


def text(server: Server, number: int = 0) -> str:
    return str(server.complete([5, 6, 7 + number], max_tokens=24, ignore_eos=True)["choices"])


def test_sleep_under_load(start: Start, tiny: Path) -> None:
    """Every request that runs or waits ends with the reason, none comes in while the server sleeps,
    and answers are the same when it is awake again."""
    server = start(str(tiny), *SMALL[:4], FLAG).wait_ready()
    before = [text(server, number) for number in range(4)]
    for level in (1, 2):
        requests = server.post_all(COMPLETIONS, [LONG | {"stream": bool(n % 2)} for n in range(12)])
        until(lambda: server.metrics()["num_requests_running"] == 8, "some run, and some wait")
        assert post(server, f"/sleep?level={level}").json() == ASLEEP | {"level": level}
        errors = [error_of(request) for request in requests]
        assert {error["code"] for error in errors} == {"asleep"}
        assert is_sleeping(server) == ASLEEP | {"level": level}
        until(lambda: state(server) == (503, "asleep"), "the worker has heard of it")
        assert server.get("/health").status_code == 200
        refused = server.post(COMPLETIONS, prompt="x")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "asleep"
        assert int(refused.headers["retry-after"]) > 0
        assert server.post("/tokenize", prompt="x").status_code == 200
        name = ("weights_offloaded", "discard_all")[level - 1]
        assert server.metrics()[f'engine_sleep_state{{sleep_state="{name}"}}'] == 1
        assert post(server, "/wake_up").json() == AWAKE
        assert [text(server, number) for number in range(4)] == before
        assert state(server) == (200, "ready")
    until(lambda: server.metrics()["kv_cache_usage_perc"] == 0, "no graph is being certified")
    found = server.metrics()
    assert found["num_requests_running"] == 0
    assert found["last_sleep_seconds"] > 0
    assert found["last_wake_up_seconds"] > 0
    until(lambda: server.log.count("asleep at level") == 2, "each is logged")
    until(lambda: server.log.count("awake after") == 2, "each is logged")
    assert "Traceback" not in server.log


def test_a_sleep_that_waits(start: Start, tiny: Path) -> None:
    """With mode=wait requests end as if nothing had been asked, and new ones are refused, which the
    server is not ready for."""
    server = start(str(tiny), *SMALL[:4], FLAG).wait_ready()
    body = LONG | {"max_tokens": 3000}
    [request] = server.post_all(COMPLETIONS, [body])
    until(lambda: server.metrics()["num_requests_running"] == 1, "it runs")
    asked = server._threads.submit(post, server, "/sleep?mode=wait")
    until(lambda: server.post(COMPLETIONS, prompt="x", max_tokens=1).status_code == 503, "refused")
    until(lambda: state(server) == (503, "asleep"), "the worker has heard of it")
    assert is_sleeping(server) == AWAKE
    assert not request.done()
    woken = server._threads.submit(post, server, "/wake_up")  # comes after the sleep
    assert request.result().json()["usage"]["completion_tokens"] == 3000
    assert asked.result().json() == ASLEEP
    assert woken.result().json() == AWAKE
    until(lambda: "asleep at level 1" in server.log, "it is logged")
    text(server)


def test_any_worker_and_a_new_one(start: Start, tiny: Path) -> None:
    """Requests of all workers end, every worker knows that the server sleeps, and so does one that
    takes the place of a dead one."""
    flags = ("--api-workers", "2", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    server = start(str(tiny), *flags, FLAG).wait_ready()
    before = text(server)
    with streams_on_both(server):
        assert post(server, "/sleep").json() == ASLEEP
        assert server.metrics()["num_requests_running"] == 0
    for _ in range(10):
        assert is_sleeping(server) == ASLEEP
        assert server.post(COMPLETIONS, prompt="x").json()["error"]["code"] == "asleep"
    for index in range(2):
        dead = server.worker_pid(index)
        os.kill(dead, signal.SIGKILL)
        until(lambda dead=dead, index=index: server.named(f"minisrv-api-{index}") - {dead}, "new")
    until(lambda: state(server) == (503, "asleep"), "a new worker knows")
    assert post(server, "/wake_up").json() == AWAKE
    assert {text(server) for _ in range(10)} == {before}


def test_commands_at_odd_moments(start: Start, tiny: Path) -> None:
    """What is asked for twice is done once; and who asks while the server loads may ask again."""
    port = free_port()
    server = start(str(tiny), *SMALL[:4], FLAG, "--port", port)

    def early() -> httpx.Response | None:
        try:
            return post(server, "/sleep")
        except httpx.TransportError:
            return None

    answer = until(early, "the port is open")
    if answer.status_code != 200:  # the engine was still loading
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "not_ready"
        assert int(answer.headers["retry-after"]) > 0
    else:
        post(server, "/wake_up")
    server.wait_ready()
    before = text(server)
    assert post(server, "/wake_up").json() == AWAKE
    for _ in range(2):
        assert post(server, "/sleep?level=1").json() == ASLEEP
    assert post(server, "/wake_up?tags=kv_cache").json() == ASLEEP | {"released": ["weights"]}
    assert state(server) == (503, "asleep")
    asked = [server._threads.submit(post, server, path) for path in ("/sleep", "/wake_up") * 10]
    assert {each.result().status_code for each in asked} == {200}
    post(server, "/wake_up")
    assert text(server) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_server_that_sleeps(start: Start, tiny: Path, signum: signal.Signals) -> None:
    """It ends in order when it is told to, and tells of an engine that dies."""
    server = start(str(tiny), *SMALL[:4], FLAG).wait_ready()
    post(server, "/sleep?level=2")
    if signum == signal.SIGKILL:
        os.kill(server.engine_pid(), signum)
        until(lambda: state(server) == (503, "dead"), "it is noticed")
        assert post(server, "/wake_up").json()["error"]["code"] == "engine_dead"
        assert server.get("/health").status_code == 503
    server.send(signal.SIGTERM)
    assert server.wait() == (1 if signum == signal.SIGKILL else 0)
    server.assert_nothing_left()
    assert "Traceback" not in server.log


def test_a_wait_that_a_shutdown_ends(start: Start, tiny: Path) -> None:
    """A sleep that waits for a long request is answered when the server ends."""
    server = start(str(tiny), *SMALL[:4], FLAG, "--shutdown-timeout", "1").wait_ready()
    [request] = server.post_all(COMPLETIONS, [LONG])
    until(lambda: server.metrics()["num_requests_running"] == 1, "it runs")
    asked = server._threads.submit(post, server, "/sleep?mode=wait")
    until(lambda: server.post(COMPLETIONS, prompt="x", max_tokens=1).status_code == 503, "refused")
    server.send(signal.SIGTERM)
    assert error_of(request)["code"] == "not_ready"
    assert asked.result().json()["error"]["code"] == "not_ready"
    assert server.wait() == 0
    server.assert_nothing_left()


def test_other_weights_end_the_server(start: Start, tmp_path: Path) -> None:
    """A checkpoint that has changed while the server slept is not served as if it had not."""
    from tests.checkpoints import make_checkpoint

    model = make_checkpoint(tmp_path / "model")
    server = start(str(model), *SMALL[:4], FLAG).wait_ready()
    post(server, "/sleep?level=2")
    make_checkpoint(model, seed=1)
    error = post(server, "/wake_up").json()["error"]
    assert error["code"] == "engine_dead"
    assert "does not compute what it did before it slept" in error["message"]
    assert server.get("/health").status_code == 503

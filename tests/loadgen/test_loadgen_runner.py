"""What the parent does about its client processes."""

import multiprocessing
import signal
from collections.abc import Callable

import pytest

from loadgen.errors import WorkerError
from loadgen.records import Leg, PromptKind, RunConfig
from loadgen.runner import run_legs
from tests.loadgen.scripted_server import ScriptedServer


class Watcher:
    """An observer that does one thing when the measurement begins, and keeps what it is told."""

    def __init__(self, at_begin: Callable[[], None]) -> None:
        self.at_begin = at_begin
        self.phases: list[tuple[int, bool]] = []
        self.updates: list[tuple[int, int, float]] = []

    def begin(self, leg: Leg, warmup: bool) -> None:
        self.phases.append((leg.concurrency, warmup))
        if not warmup:
            self.at_begin()

    def update(self, done: int, failed: int, share: float) -> None:
        self.updates.append((done, failed, share))


def config(url: str) -> RunConfig:
    return RunConfig(
        base_url=url + "/v1",
        model="m",
        concurrencies=(2,),
        prompt_kind=PromptKind.TOKENS,
        input_tokens=4,
        token_range=(100, 200),
        output_tokens=3,
        ignore_eos=True,
        requests=6,
        duration_s=None,
        warmup=1,
        processes=2,
        seed=0,
        timeout_s=20.0,
        label="",
    )


def test_the_observer_is_told_and_nothing_stays_behind() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    watcher = Watcher(lambda: None)
    with ScriptedServer() as server:
        (level,) = run_legs(Leg.of(config(server.url)), None, watcher)
    assert [record.failure for record in level.records] == [None] * 6
    starts = [record.start_s for record in level.records]
    assert starts == sorted(starts)
    assert watcher.phases == [(2, True), (2, False)]
    assert watcher.updates[-1] == (6, 0, 1.0)
    assert multiprocessing.active_children() == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_dead_client_process_ends_the_run() -> None:
    """Fails by hanging if the parent waits for an answer that cannot come."""

    def kill_one() -> None:
        child = multiprocessing.active_children()[0]
        child.kill()
        child.join()

    with ScriptedServer() as server, pytest.raises(WorkerError, match="died"):
        list(run_legs(Leg.of(config(server.url)), None, Watcher(kill_one)))
    assert multiprocessing.active_children() == []

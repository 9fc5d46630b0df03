"""The parent process looks after its client processes and reports what became of them."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from loadgen.errors import ConfigError, WorkerError
from loadgen.records import STREAMS_PER_PROCESS, ClientLoad, Leg, Load, PromptKind, RunConfig, clock
from loadgen.report import Environment, LevelReport, Report, print_report
from loadgen.rows import RawRows
from loadgen.runner import run_legs
from loadgen.stats import summarize
from tests.loadgen.scripted_server import ScriptedServer


class Watcher:
    """An observer that calls a function when the measurement begins, and records what it is
    told."""

    def __init__(self, at_begin: Callable[[], None]) -> None:
        self.at_begin = at_begin
        self.phases: list[tuple[str, bool]] = []
        self.updates: list[tuple[int, int, float]] = []

    def begin(self, leg: Leg, warmup: bool) -> None:
        self.phases.append((str(leg.load), warmup))
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
    assert watcher.phases == [("concurrency 2", True), ("concurrency 2", False)]
    assert watcher.updates[-1] == (6, 0, 1.0)
    assert multiprocessing.active_children() == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_dead_client_process_ends_the_run() -> None:
    """Fails by hanging if the parent waits for an answer that cannot come."""

    def kill_one() -> None:
        child = multiprocessing.active_children()[0]
        child.kill()
        child.join()

    with ScriptedServer() as server, pytest.raises(WorkerError, match=r"of 2 died \(killed"):
        list(run_legs(Leg.of(config(server.url)), None, Watcher(kill_one)))
    assert multiprocessing.active_children() == []


def test_the_load_is_shared_and_the_parts_are_one_result() -> None:
    """Three processes share 7 streams, and their results are one: a process without a stream would
    leave a hole in the indices, and a clock that differs from the parent's would put a request
    outside of the run."""
    with ScriptedServer() as server:
        asked = replace(config(server.url), concurrencies=(7,), processes=3, requests=28)
        before_s = clock()
        (level,) = run_legs(Leg.of(asked), None, Watcher(lambda: None))
        after_s = clock()
    assert [client.streams for client in level.clients] == [3, 2, 2]
    assert sorted(record.index for record in level.records) == list(range(28))
    for record in level.records:
        assert before_s < record.start_s < record.end_s < after_s


def test_prompts_do_not_depend_on_the_number_of_processes() -> None:
    sent = []
    for processes in (1, 2, 3):
        with ScriptedServer() as server:
            asked = replace(config(server.url), concurrencies=(3,), processes=processes)
            list(run_legs(Leg.of(asked), None, Watcher(lambda: None)))
        sent.append(sorted(json.dumps(body) for body in server.bodies))
    assert len(set(sent[0])) == 7  # 6 requests and a warm-up.
    assert sent[0] == sent[1] == sent[2]


def test_connections_that_cannot_be_opened_are_said_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that needs too many connections is refused before a process starts: 100 requests in
    flight are 50 for each of two processes, which may open 300 files, 256 of them for other
    uses."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (300, 300))
    asked = replace(config("http://unused"), concurrencies=(1, 100))
    with pytest.raises(ConfigError, match=r"100 requests in flight need 306 .* 300 are allowed"):
        list(run_legs(Leg.of(asked), None, Watcher(lambda: None)))


@pytest.mark.parametrize(
    ("asked", "cores", "concurrency", "processes"),
    [
        (None, 4, 1, 1),
        (None, 4, STREAMS_PER_PROCESS, 1),
        (None, 4, STREAMS_PER_PROCESS + 1, 2),
        (None, 4, 10_000, 4),
        (3, 1, 10_000, 3),
        (3, 4, 2, 2),
    ],
)
def test_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, cores: int, concurrency: int, processes: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert replace(config(""), processes=asked).processes_at(Load(concurrency)) == processes


def test_the_report_says_how_busy_the_client_was_and_warns_if_that_was_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real run whose client processes are then said to have been quiet or slow, so that no
    measured time is asserted."""
    with ScriptedServer() as server:
        asked = config(server.url)
        (level,) = run_legs(Leg.of(asked), None, Watcher(lambda: None))
    assert all(load.cpu_share > 0 for load in level.clients)
    quiet, slow = ClientLoad(1, 0.1, 0.0, 0.0), ClientLoad(1, 0.93, 0.5, 0.7)
    for clients, warnings in (([quiet, quiet], 0), ([quiet, slow], 2)):
        summary = summarize(replace(level, clients=clients))
        assert len(summary.warnings) == warnings
        print_report(
            Report(
                complete=True,
                simulated="",
                config=asked,
                environment=Environment.here(),
                levels=[LevelReport(summary, RawRows.of(level, 1))],
            )
        )
        out = capsys.readouterr().out
        assert out.count("warning: client-bound") == warnings
        assert ("; raise --processes where cores are idle" in out) == bool(warnings)
        assert f"client: 2 processes, {clients[1].cpu_share:.0%} of a core" in out

"""Throughput and queue in the log: what a line says, and when none is written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minisrv.engine import stats_log
from minisrv.engine.background import Background
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import BudgetCount, EngineStats, StepCount
from minisrv.engine.process import _EngineServer
from minisrv.engine.stats_log import SECONDS, StatsLog

BUSY = EngineStats(
    running=3,
    waiting=2,
    kv_blocks_used=25,
    kv_blocks_total=100,
    prompt_tokens=900,
    prefill_tokens=400,
    generated_tokens=200,
    prefix_cache_queries=90,
    prefix_cache_hits=45,
    steps=[
        StepCount("FULL", "pure_decode", 60, 180, 0),
        StepCount("FULL", "cheaper", 15, 45, 0),
        StepCount("PIECEWISE", "has_prefill", 25, 400, 9),
    ],
    budgets=[BudgetCount("all_waiting", 5, 30), BudgetCount("itl_target", 20, 370)],
)


class Engine:
    """An engine whose counters and clock the test sets."""

    def __init__(self) -> None:
        self.now, self.stats = 100.0, EngineStats()
        self.log = StatsLog(lambda: self.stats, lambda: self.now)

    def tick(self, after: float, stats: EngineStats) -> None:
        self.now, self.stats = self.now + after, stats
        self.log.tick()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the records that are logged."""
    found: list[Any] = []
    monkeypatch.setattr(stats_log.logger, "level", logging.INFO)
    monkeypatch.setattr(stats_log.logger, "handle", found.append)
    return found


def test_a_line_has_rates_since_the_last_one(records: list[Any]) -> None:
    engine = Engine()
    engine.tick(SECONDS / 2, BUSY)
    assert not records
    engine.tick(SECONDS * 1.5, BUSY)
    [record] = records
    assert record.getMessage() == (
        "Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 10.0 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 50.0%, "
        "Steps: FULL 75.0%, PIECEWISE 25.0%, "
        "Prefill budgets: itl_target 80.0%, all_waiting 20.0%"
    )
    assert record.json_fields["prompt_tokens_per_s"] == 20
    assert record.json_fields["steps_percent"] == {"FULL": 75, "PIECEWISE": 25}
    assert record.json_fields["prefill_budgets_percent"] == {"itl_target": 80, "all_waiting": 20}


def test_nothing_is_told_of_rest(records: list[Any]) -> None:
    """An idle engine logs nothing: its last line is about its last work, and the rates of the work
    after a long rest are not averaged over that rest."""
    engine = Engine()
    engine.tick(SECONDS, EngineStats())
    assert not records
    idle = EngineStats(generated_tokens=50, steps=[StepCount("NONE", "graphs_off", 50, 50, 0)])
    engine.tick(SECONDS, idle)
    [record] = records
    assert "Running: 0 reqs" in record.getMessage()
    for _ in range(3):
        engine.tick(SECONDS, idle)
    assert len(records) == 1
    more = EngineStats(generated_tokens=150, steps=[StepCount("NONE", "graphs_off", 150, 150, 0)])
    engine.tick(SECONDS, more)
    assert records[1].json_fields["generation_tokens_per_s"] == 10


def test_who_waits_is_told_without_a_step(records: list[Any]) -> None:
    engine = Engine()
    engine.tick(SECONDS, EngineStats(waiting=4))
    assert records[0].getMessage().endswith("Steps: none, Prefill budgets: none")


class _EndError(Exception):
    """Ends the engine's loop, which ends in no other way."""


class _Core:
    """An engine core that has work for three steps."""

    has_work = True

    def __init__(self) -> None:
        self.left = 3
        self.background = Background()

    def step(self) -> list[Any]:
        if not self.left:
            raise _EndError
        self.left -= 1
        return []

    def advance_background(self) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(running=1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_EngineServer]:
    server = _EngineServer(f"ipc://{tmp_path}/engine", Heartbeat(tmp_path / "heartbeat"))
    server.core = _Core()  # type: ignore[assignment]
    yield server
    server.close()


@pytest.mark.parametrize(("log_stats", "lines"), [(True, 3), (False, 0)])
def test_the_loop_tells_unless_told_not_to(
    server: _EngineServer,
    records: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    log_stats: bool,
    lines: int,
) -> None:
    monkeypatch.setattr(stats_log, "SECONDS", 0.0)
    with pytest.raises(_EndError):
        server.run(log_stats=log_stats)
    assert len(records) == lines

"""The engine's sign of life, seen from another process, by a clock that the test sets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from minisrv.engine import heartbeat
from minisrv.engine.heartbeat import Heartbeat
from tests.waiting import wait_until


class Clock:
    """The monotonic clock, in seconds, of the module under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_work_that_has_no_loop_shows_that_it_lives(tmp_path: Path, clock: Clock) -> None:
    watched = Heartbeat(tmp_path / "beats")
    with Heartbeat(tmp_path / "beats").beating(0.001):
        for _ in range(3):
            clock.now += 100
            wait_until(lambda: watched.age == 0)
    clock.now += 100
    assert watched.age == 100


def test_one_that_never_beats_is_seen(tmp_path: Path, clock: Clock) -> None:
    """The age grows for a process that never beats: it may be stopped before its first beat."""
    watched = Heartbeat(tmp_path / "beats")
    clock.now += 100
    assert watched.age == 100

"""The clock of a start-up: its phases add up to the whole time, over several processes too."""

from __future__ import annotations

import pytest

from minisrv import progress
from minisrv.processes import process_began
from minisrv.progress import StartupClock


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list with the time that `time.monotonic` returns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_phases_add_up(at: list[float]) -> None:
    launcher = StartupClock(began=97.0)
    launcher.end("launcher")
    engine = StartupClock()
    for phase, seconds in (("imports", 2.0), ("weights", 0.5), ("imports", 1.0)):
        at[0] += seconds
        engine.end(phase)
    at[0] += 0.25
    launcher.include(engine.seconds)
    launcher.end("API workers")
    assert launcher.seconds == {
        "launcher": 3.0,
        "imports": 3.0,
        "weights": 0.5,
        "API workers": 0.25,
    }
    assert sum(launcher.seconds.values()) == at[0] - 97.0


def test_a_process_knows_when_it_began() -> None:
    began = process_began()
    assert began < progress.time.monotonic()
    # It reads two clocks, one after the other, and may lose its processor in between.
    assert process_began() == pytest.approx(began, abs=1.0)

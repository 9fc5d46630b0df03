"""A sign of life, seen from the other end."""

from __future__ import annotations

import time
from pathlib import Path

from minisrv.engine.heartbeat import Heartbeat


def test_work_that_has_no_loop_shows_that_it_lives(tmp_path: Path) -> None:
    watched = Heartbeat(tmp_path / "beats")
    with Heartbeat(tmp_path / "beats").beating(0.01):
        time.sleep(1)
        assert watched.age < 0.5
    time.sleep(0.5)
    assert watched.age >= 0.5


def test_one_that_never_beats_is_seen(tmp_path: Path) -> None:
    """A process may be stopped before it comes to that."""
    watched = Heartbeat(tmp_path / "beats")
    time.sleep(0.1)
    assert watched.age >= 0.1

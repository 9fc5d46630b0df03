"""benchmarks/combinations.py with few requests, and with an engine that has a fault on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import combinations
from benchmarks.combinations import Changes, Combination
from benchmarks.random_requests import main
from minisrv.core.kv_events import RecordingBlockPool

SMALL = ["--first-engine", "10", "--engines", "1", "--requests", "200"]
"""Arguments for an engine with a prefix cache."""

CHANGES = Changes(
    verify=0.5,
    refits=True,
    covering=True,
    polls=0,
    mixed_graphs=False,
    timed_graphs=False,
    itl_target_ms=0.0,
    turn=0.0,
    failing=0.0,
    happens=("sleep", "quarantine", "embedding"),
)
"""Changes that depend little on a clock: turns of no time, and graphs that are not timed. So each
of the events comes in every run, however busy the machine is."""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(combinations, "draw_changes", lambda rng: CHANGES)
    out = tmp_path / "found.json"
    status = main([*SMALL, "--json", str(out)], Combination)
    return status, json.loads(out.read_text())


def test_an_engine_that_changes_gives_the_lone_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, found = run(tmp_path, monkeypatch)
    assert (status, found["faults"]) == (0, 0)
    assert found["compared"] > 20
    happens = "sleeps asked for", "graphs quarantined", "embeddings compared"
    for what in (*happens, "verified steps: agreed"):
        assert found["events"][what] > 0, what


def test_what_a_sleep_leaves_in_the_prefix_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of the prefix cache are still found behind it, but what they held is gone."""
    monkeypatch.setattr(RecordingBlockPool, "clear_prefix_cache", lambda pool: None)
    status, found = run(tmp_path, monkeypatch)
    assert status == 1
    assert found["of_each_engine"][0]["faults"]
    assert "DIFFERS: python benchmarks/combinations.py --seed 0" in capsys.readouterr().err

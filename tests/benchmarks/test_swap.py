"""benchmarks/swap.py: which phase a gap is counted in."""

from __future__ import annotations

import pytest

from benchmarks import swap
from loadgen.records import RequestRecord


def test_a_gap_belongs_to_the_phase_in_which_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 13.5])
    monkeypatch.setattr(swap, "clock", lambda: next(times))
    phases = swap.Phases("compiling")
    for phase in ("compiling", "certifying", "certifying", "compiled"):
        phases.note(phase)
    assert phases.seconds == {"compiling": 2.0, "certifying": 1.5}
    records = [
        RequestRecord(index, start_s=10.0, end_s=15.0, chunk_times_s=at, chunk_tokens=(), **ids)
        for index, at in enumerate([(10.5, 11.5, 12.25, 14.0), (13.0, 13.25)])
        for ids in [{"prompt_tokens": 4, "completion_tokens": len(at), "failure": None}]
    ]
    found = swap.summary(records, phases)
    assert (found["requests"], found["tokens"], found["failures"]) == (2, 6, [])
    most = {phase: (itl["tokens"], itl["max"]) for phase, itl in found["itl_ms"].items()}
    assert most == {"compiling": (1, 1000), "certifying": (2, 750), "compiled": (1, 1750)}
    assert found["largest"][0] == {"ms": 1750, "at_s": 4, "phase": "compiled"}


def test_streams_that_wait_together_are_one_gap() -> None:
    """One turn once took all places among the largest, and the others were not known."""
    waits = [(0.24, 51.77 + 0.0001 * stream) for stream in range(16)] + [(0.02, 40.0), (0.03, 60.0)]
    assert [gap for gap, _ in swap.largest(waits)] == [0.24, 0.03, 0.02]
    apart = [(0.001 * number, float(number)) for number in range(30)]
    assert len(swap.largest(apart)) == swap.LARGEST

"""benchmarks/step_costs.py: its quantiles, and that its two engines differ by the target alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_costs
from minisrv.engine.messages import Histogram
from tests.checkpoints import make_checkpoint


def test_a_quantile_of_errors_lies_in_its_bucket() -> None:
    errors = Histogram((0.01, 0.1, 1.0), (5, 10, 4, 1), 0.0)
    assert step_costs.error_quantile(errors, 0.25) == pytest.approx(0.01)
    assert step_costs.error_quantile(errors, 0.5) == pytest.approx(0.055)
    assert step_costs.error_quantile(errors, 0.95) == pytest.approx(1.0)
    assert step_costs.error_quantile(errors, 1.0) == pytest.approx(2.0)


def test_a_step_that_takes_longer_than_those_around_it_is_noise() -> None:
    times = step_costs.DecodeTimes()
    times.by_size[4] = [1.0] * 9 + [2.0] + [1.0] * 9
    times.by_size[8] = [3.0] * 5
    assert sorted(step_costs.noise(times)) == [0.0] * 23 + [0.5]


def test_both_engines_serve_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_costs, "PROMPTS", (5, 40))
    monkeypatch.setattr(step_costs, "OUTPUTS", (4, 8))
    made, found = make_checkpoint(tmp_path), tmp_path / "found.json"
    flags = "--max-num-seqs 4 --max-num-batched-tokens 32 --device cpu"
    loops = ("--concurrency", "1,3", "--requests", "5", "--rounds", "1", "--json", str(found))
    step_costs.main([str(made), "--engine-flags", flags, *loops])
    report = json.loads(found.read_text())
    ran = [(run["concurrency"], run["engine"]) for run in report["runs"]]
    assert ran == [(n, name) for n in (1, 3) for name in ("target", "no target")]
    predictions = report["predictions"]
    assert predictions["steps"] == sum(predictions["histogram"][1]) > 20

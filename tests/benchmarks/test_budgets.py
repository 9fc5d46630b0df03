"""benchmarks/budgets.py: loads that are served by turns, and what is simulated from their steps."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from benchmarks import budgets
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two budgets on a small engine."""
    directory = tmp_path_factory.mktemp("budgets")
    made, found = make_checkpoint(directory), directory / "found.json"
    flags = "--max-num-seqs 4 --max-num-batched-tokens 64 --device cpu --itl-target-ms 1000"
    loop = ("--loads", "50/4@1,3", "--requests-per-stream", "2", "--rounds", "1")
    loop = (*loop, "--budgets", "model", "16", "--json", str(found))
    budgets.main(["run", str(made), f"--engine-flags={flags}", *loop])
    gc.unfreeze()  # its process would end here
    return found


def test_every_budget_serves_every_load_and_its_steps_are_kept(report: Path) -> None:
    runs = json.loads(report.read_text())["runs"]
    assert [(run["load"]["concurrency"], run["budget"]) for run in runs] == [
        (1, "model"),
        (1, "16"),
        (3, "model"),
        (3, "16"),
    ]
    for run in runs:
        steps = [budgets.unpacked(step) for step in run["steps"]]
        assert all(step.ms > 0 for step in steps)
        prefills = [step for step in steps if not step.key[1].uniform_decode]
        longest = max(step.key[1].num_tokens for step in prefills)
        assert longest <= 16 if run["budget"] == "16" else longest > 48


def test_a_simulation_takes_the_steps_that_the_budget_says(report: Path, tmp_path: Path) -> None:
    found = tmp_path / "simulated.json"
    loop = ("--loads", "50/4@2", "--requests-per-stream", "3", "--budgets", "16", "64")
    budgets.main(["simulate", str(report), *loop, "--json", str(found)])
    small, large = json.loads(found.read_text())["runs"]
    assert small["prompt tokens a step"] < 16 < large["prompt tokens a step"]
    assert small["ITL p99 ms"] > 0


def test_a_simulated_device_takes_the_time_that_was_measured(report: Path) -> None:
    """All time of the simulation is that of its steps, one after the other."""
    content = json.loads(report.read_text())
    steps = [budgets.unpacked(step) for run in content["runs"] for step in run["steps"]]
    served = budgets.Simulation(content, budgets.CostModel(steps), "64")
    [load] = budgets.loads("50/4@2")
    found = budgets.closed_loop(served, load, 4)
    assert served.now_ms == pytest.approx(sum(ms for _, ms in served.steps))
    assert found["tokens/s"] == pytest.approx(1000 * 4 * 4 / served.now_ms)
    assert sum(tokens for tokens, _ in served.steps) == 4 * 50

"""The default model gives the same answers in every mode, and right ones.

The tasks are how the project measures accuracy: a damaged cache, or a padding row that reaches a
real one, shows here as a wrong answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / "models"
sys.path.insert(0, str(MODELS))

import eval as accuracy  # noqa: E402

CASES_PER_TASK = 12
LEAST = 0.95


@pytest.fixture(scope="module")
def held_out():
    prompts, cases = zip(*accuracy.held_out_cases(CASES_PER_TASK, seed=0), strict=True)
    return list(prompts), list(cases)


@pytest.fixture(scope="module")
def eager(held_out) -> list[str]:
    return accuracy.ask_minisrv(None, held_out[0], {"enforce_eager": True})


def test_eager_is_right(held_out, eager):
    table = accuracy.score(held_out[1], eager)
    assert table["total"]["accuracy"] >= LEAST, table


@pytest.mark.parametrize("mode", ["piecewise", "full-decode-only", "full-and-piecewise"])
def test_graphs_answer_as_eager_does(held_out, eager, mode):
    options = {"cudagraph_mode": mode, "max_num_seqs": 16, "async_scheduling": True}
    assert accuracy.ask_minisrv(None, held_out[0], options) == eager

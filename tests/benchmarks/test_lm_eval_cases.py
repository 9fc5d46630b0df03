"""The tasks of benchmarks/clients for lm-eval, and the comparison of the results that it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "clients"))

import compare_lm_eval
import lm_eval_cases


def test_cases_have_one_right_answer_and_depend_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        lm_eval_cases.write(tmp_path / name, cases_per_task=3, texts=4, seed=seed)
    a, b, c = ((tmp_path / name / "choice.jsonl").read_text() for name in "abc")
    assert a == b != c
    cases = [json.loads(line) for line in a.splitlines()]
    assert len(cases) == 3 * len(lm_eval_cases.TASKS)
    for case in cases:
        assert len(set(case["answers"])) == lm_eval_cases.WRONG_ANSWERS + 1
        assert {len(answer) for answer in case["answers"]} == {len(case["answers"][case["right"]])}
        assert case["question"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len((tmp_path / "a" / "rolling.jsonl").read_text().splitlines()) == 4


def test_every_kind_of_difference_is_seen():
    reference = {
        ("minisrv_choice", 0): [["-1.5", "True"], ["-20.0", "False"]],
        ("minisrv_rolling", 0): ["-300.0"],
        ("minisrv_generate", 0): ["42"],
    }
    same = compare_lm_eval.compare(reference, reference)
    assert (same["log_likelihoods"], same["texts"]) == (3, 1)
    assert not same["largest_difference"]
    assert not same["greedy_flags_that_differ"]
    assert not same["texts_that_differ"]
    other = {
        ("minisrv_choice", 0): [["-1.5", "False"], ["-20.5", "False"]],
        ("minisrv_rolling", 0): ["-300.25"],
        ("minisrv_generate", 0): ["43"],
    }
    found = compare_lm_eval.compare(reference, other)
    assert found["largest_difference"] == 0.5
    assert found["largest_relative_difference"] == pytest.approx(0.5 / 20)
    assert (found["greedy_flags_that_differ"], found["texts_that_differ"]) == (1, 1)

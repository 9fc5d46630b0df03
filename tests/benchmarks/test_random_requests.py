"""benchmarks/random_requests.py with a few requests, and with engines that have a fault on
purpose."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import random_requests
from benchmarks.questions import COMPLETIONS, Answer, Question
from benchmarks.random_requests import Alone, Outcome, near_tie
from minisrv.core import request_state
from minisrv.core.kv_cache import hash_block
from minisrv.core.scheduler import Scheduler
from minisrv.kernels import sample_op

SMALL = "--first-engine 110 --engines 1 --requests 40"
"""Arguments for an engine with a prefix cache, in which requests are preempted and clients go
away."""


def run(arguments: str, tmp_path: Any) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "found.json"
    status = random_requests.main([*shlex.split(arguments), "--json", str(out)])
    return status, json.loads(out.read_text())


def test_each_answer_is_compared_with_the_lone_one(tmp_path, capsys) -> None:
    status, found = run(SMALL, tmp_path)
    assert status == 0
    assert found["compared"] + found["aborted"] == found["requests"] == 40
    assert (found["faults"], found["errors"]) == (0, 0)
    assert 0 < found["lone_answers"] <= 8
    for name in ("aborted", "preemptions", "prefix_hit_tokens", "times_at_rest"):
        assert found[name] > 0, name
    assert found["features"]["streamed"] > 0
    assert found["of_each_engine"][0]["settings"]["engine"]["max_num_seqs"] > 1
    assert "prefix hit tokens" in capsys.readouterr().out


def test_an_answer_that_differs_is_found_and_can_be_repeated(tmp_path, monkeypatch, capsys) -> None:
    """With the fault that prompts of the same length count as equal in the prefix cache, wrong
    answers are found, and the printed command repeats one."""

    def careless(salt: Any, parent: bytes | None, token_ids: Any) -> bytes:
        return hash_block(salt, parent, [0] * len(token_ids))

    monkeypatch.setattr(request_state, "hash_block", careless)
    status, found = run(SMALL, tmp_path)
    assert status == 1
    faults = found["of_each_engine"][0]["faults"]
    assert 0 < len(faults) <= found["faults"]
    assert faults[0]["lone"] != faults[0]["answer"]
    assert faults[0]["repeat"] in capsys.readouterr().err

    command = shlex.split(faults[0]["repeat"])
    assert command[:2] == ["python", "benchmarks/random_requests.py"]
    assert random_requests.main(command[2:]) == 1
    out, err = capsys.readouterr()
    assert err.count("DIFFERS: ") == err.count(f"DIFFERS: {faults[0]['repeat']}") == 1
    assert re.search("compared +1 ", out)


def test_a_file_that_is_there_goes_on(tmp_path, monkeypatch) -> None:
    """A report that exists is continued: it holds the first of two engines with its results, so
    only the second runs."""
    ran = []

    def run_one(task: Any, finished: Any) -> dict[str, Any]:
        ran.append(task.number)
        names = ("lone_answers", "preemptions", "prompt_tokens", "prefix_hit_tokens")
        found: dict[str, Any] = dict.fromkeys((*names, "generated_tokens"), 1)
        counts = {"compared": 3, "aborted": 1}
        found |= {"engine": task.number, "counts": counts, "features": {}, "steps": {}}
        found |= {"events": {}}
        return found | {"near_ties": [{"request": 2, "margin": 1e-6}], "faults": []}

    monkeypatch.setattr(random_requests, "run", run_one)
    run("--engines 1 --requests 4", tmp_path)
    _, found = run("--engines 2 --requests 4", tmp_path)
    assert ran == [0, 1]
    assert (found["engines"], found["requests"], found["compared"]) == (2, 8, 6)
    assert found["near_ties_by_margin"] == {"1e-06": 2}
    with pytest.raises(SystemExit, match="another"):
        run("--engines 2 --requests 5", tmp_path)


def test_a_block_that_an_abort_leaves_behind_is_found(tmp_path, monkeypatch) -> None:
    abort = Scheduler.abort

    def leak(self: Scheduler, request_id: str) -> Any:
        event = abort(self, request_id)
        if event is not None and self.block_pool.num_free:
            self.block_pool.allocate()
        return event

    monkeypatch.setattr(Scheduler, "abort", leak)
    status, found = run(SMALL, tmp_path)
    assert status == 1
    assert "AssertionError" in found["of_each_engine"][0]["faults"][-1]["raised"]


class SamplesOnce:
    """An engine whose only step samples greedily from the given logits."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = torch.tensor([logits])

    def run_alone(self, *_: object) -> None:
        nought, none = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        out = torch.empty(1, dtype=torch.int64)
        sample_op(self._logits, none, none, nought, none, nought + 1, nought, none, out)


@pytest.mark.parametrize(
    ("logits", "margin"),
    [([1, 1 + 1e-6, 0], 1e-6), ([1, 1 + 1e-4, 0], 1e-4), ([1, 1.01, 0], None)],
)
def test_a_tie_is_near_if_rounding_could_tip_it(logits: list[float], margin: float | None) -> None:
    alone = Alone(SamplesOnce(logits))  # type: ignore[arg-type]
    question, prepared = Question(COMPLETIONS, {}), SimpleNamespace()

    def outcome(token: int, text: str = "", other: str = "b") -> Outcome:
        return Outcome(Answer([[{"text": text}, {"text": other}], None], []), [[token], [2]])

    found = near_tie(alone, question, prepared, outcome(1), outcome(0, "a"))  # type: ignore[arg-type]
    assert found == margin
    # Answers that differ in anything else too are no tie.
    found = near_tie(alone, question, prepared, outcome(1), outcome(0, "a", "c"))  # type: ignore[arg-type]
    assert found is None

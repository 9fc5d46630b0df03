"""benchmarks/prompt_heavy.py against scripted servers, and its plot."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prompt_heavy
from tests.loadgen.scripted_server import Script, ScriptedServer, answer


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prompt_heavy.py", *arguments])
    return prompt_heavy.main()


def test_two_servers_take_turns_and_see_each_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both servers get the same prompts, of the lengths that a load says, and each of them once;
    the report has a value for each load and server, and the plot a panel for each load."""
    asked: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {"a": [], "b": []}
    turns: list[str] = []

    def script(name: str) -> Script:
        def steps(number: int, body: dict[str, Any]) -> Any:
            asked[name].append((len(body["prompt"]), body["max_tokens"], tuple(body["prompt"])))
            turns.append(name)
            return answer(body["max_tokens"])

        return steps

    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    with ScriptedServer(script("a")) as a, ScriptedServer(script("b")) as b:
        load = ("--loads", "20/3@1,2", "--requests-per-stream", "2", "--rounds", "2")
        servers = (f"a={a.url}", f"b={b.url}")
        assert run(monkeypatch, "run", *servers, *load, "--json", str(report)) == 0
    assert {(length, most) for length, most, _ in asked["a"]} == {(20, 3)}
    assert sorted(asked["a"]) == sorted(asked["b"])
    assert len(set(asked["a"])) == len(asked["a"]) == 2 * (1 + 2) + 2 * (2 + 4)
    first = [turns[0]] + [new for old, new in pairwise(turns) if old != new]
    assert first == ["a", "b", "a", "b", "a"]  # A B B A, then A B B A
    found = json.loads(report.read_text())
    assert [(each["load"]["concurrency"], each["label"]) for each in found["loads"]] == [
        *((1, "a"), (1, "b"), (2, "a"), (2, "b")),
    ]
    assert all(each["medians"]["tokens/s"] > 0 for each in found["loads"])
    assert "20/3 x 2" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert run(monkeypatch, "plot", str(report), "--plot", str(plot)) == 0
    assert "20/3 x 1" in plot.read_text()


@pytest.mark.parametrize("text", ["1024", "1024/0@8", "1024/128@", "a/b@8"])
def test_what_is_no_load(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no load"):
        prompt_heavy.loads(text)

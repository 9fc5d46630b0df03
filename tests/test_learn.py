"""What docs/learn.md lets its readers run does what the page says.

Programs are run and print what the page shows behind them, and so are the commands that take
seconds; those that measure times or start servers are only parsed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from loadgen import options as loadgen_options
from minisrv import cli
from tests.checkpoints import make_checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "learn.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```\n\nSeen:\n\n```\n(.*?)^```", PAGE, re.M | re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.findall(r"^\$ (.*)$", PAGE, re.M)]
PLANS = [words[1:] for words in COMMANDS if words[:2] == ["minisrv", "plan"]]
BROKEN = [words[1:] for words in COMMANDS if words[:2] == ["minisrv", "certify"]]


def test_there_are_eight_exercises_and_each_asks_for_a_prediction() -> None:
    exercises = re.split(r"^## \d\. ", PAGE, flags=re.M)[1:]
    assert len(exercises) == 8
    assert all("**Predict**" in each and re.search("Seen", each) for each in exercises)
    assert len(PROGRAMS) == PAGE.count("```python")


@pytest.mark.parametrize(("program", "shown"), PROGRAMS)
def test_a_program_prints_what_the_page_shows(
    program: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(program, "docs/learn.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_plans_print_the_lines_that_the_page_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the table of the last plan for every batch, and the answer about each batch."""
    monkeypatch.setenv("COLUMNS", "100")
    shown = re.findall("^(?:│.*│|decode:33 .*)$", PAGE, re.M)
    assert len(shown) == 6
    for words in PLANS:
        assert cli.main(words) == 0
        printed = capsys.readouterr().out.splitlines()
        if "--batch" in words:
            assert printed == [shown.pop(3)]
        elif "--cudagraph-capture-sizes" in words:
            assert set(shown[:3]) <= set(printed)
    assert len(shown) == 3, "each answer is that of a command"


def test_a_broken_graph_is_found_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small model, whose words are the same."""
    monkeypatch.setenv("COLUMNS", "200")
    checkpoint = str(make_checkpoint(tmp_path, "qwen3"))
    shown = PAGE.partition("## 2.")[2].partition("## 3.")[0]
    for words in BROKEN:
        assert cli.main([*words, "--model", checkpoint, "--device", "cpu"]) == 1
        printed = capsys.readouterr().out
        assert "BROKEN ON PURPOSE" in printed
        why = re.search(r"the replay (on|with|behind) .* changed [a-z_]+|hidden states", printed)
        assert why is not None
        assert why[0] in shown
    assert len(BROKEN) == 3


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_can_be_parsed(words: list[str]) -> None:
    program, *arguments = words
    parser = {"minisrv": cli._parser, "loadgen": loadgen_options.parser}[program]()
    parser.parse_args(arguments)

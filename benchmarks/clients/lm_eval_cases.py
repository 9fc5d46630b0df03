"""Writes the cases of the tasks in lm_eval_tasks/, from the recipe of the default model.

Knows: the recipe's held-out cases and texts, and the files that the tasks read. Knows nothing of
lm-eval, servers or tokens.

    python benchmarks/clients/lm_eval_cases.py FOLDER [--cases-per-task 20] [--texts 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

from recipe import facts
from recipe.chat import Message, evaluation
from recipe.stories import story
from recipe.tasks import TASKS

WRONG_ANSWERS = 3


def write(folder: Path, cases_per_task: int, texts: int, seed: int) -> None:
    """Write choice.jsonl and rolling.jsonl to `folder`. Their content depends on the three numbers
    alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/lm-eval")
    _write(folder / "choice.jsonl", (choice(rng, t) for t in TASKS for _ in range(cases_per_task)))
    _write(folder / "rolling.jsonl", (text(rng, i) for i in range(texts)))


def choice(rng: random.Random, task: str) -> dict[str, Any]:
    """Return a held-out case of `task` in the format of the default model's chat template, with
    four answers, one of which is right."""
    messages, case = evaluation(rng, task)
    answers = [case.answer]
    while len(answers) <= WRONG_ANSWERS:
        wrong = _near_miss(rng, case.answer)
        if wrong not in answers:
            answers.append(wrong)
    rng.shuffle(answers)
    return {
        "question": _chat(messages),
        "answers": answers,
        "right": answers.index(case.answer),
    }


def text(rng: random.Random, number: int) -> dict[str, Any]:
    """Return a story for an even number, and a passage for an odd one."""
    return {"text": facts.passage(rng) if number % 2 else story(rng, episodes=1 + number % 3)}


def _near_miss(rng: random.Random, answer: str) -> str:
    """Return the answer with one letter or digit replaced by another."""
    places = [i for i, sign in enumerate(answer) if sign.isalnum()]
    place = rng.choice(places)
    kind = string.digits if answer[place].isdigit() else string.ascii_lowercase
    other = rng.choice([sign for sign in kind if sign != answer[place].lower()])
    return answer[:place] + other + answer[place + 1 :]


def _chat(messages: list[Message]) -> str:
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the files that the tasks read.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases-per-task", type=int, default=20)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.cases_per_task, args.texts, args.seed)


if __name__ == "__main__":
    main()

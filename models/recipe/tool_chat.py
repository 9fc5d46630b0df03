"""Conversations with tools, for training and for evaluation.

Knows: how questions that need tools and questions that need none make up a conversation, and which
of them are held out. Does not know the tools (`tools`), tokens or the template.
"""

from __future__ import annotations

import itertools
import random

from recipe.chat import (
    DECLINED,
    Message,
    evaluation,
    prose,
    small_talk,
    system_prompt,
    task_turn,
    training_case,
)
from recipe.tasks import Case
from recipe.tokenizer import written_calls
from recipe.tools import FAMILIES, Ask, Tool, Use, draw_families, rivals, toolbox

TOOL_TASKS = ("tool_call", "tool_calls", "tool_answer", "no_tool")
"""The tasks of the evaluation: one call, two at once, the answer behind a result, and a question
that no tool fits."""

_SUMS = frozenset({"add", "subtract", "multiply", "divide", "calculator"})
_UNFIT: dict[str, frozenset[str]] = {
    **dict.fromkeys(("add", "subtract", "multiply"), _SUMS),
    "lookup": frozenset({"table", "attribute"}),
}
"""The families of tools that would answer the questions of a task."""

_DECLINED = _SUMS | {"weather", "clock", "message", "search", "days", "convert"}
"""The families of tools for requests that small talk declines."""


def is_held_out(use: Use) -> bool:
    """Whether only the evaluation may ask this. A call without arguments may always be trained, as
    it has no content."""
    return bool(use.arguments) and Case("tool", use.question, "", use.key).held_out


def _training_use(ask: Ask) -> Use:
    """A use that training may see."""
    use = ask()
    while is_held_out(use):
        use = ask()
    return use


def _question(content: str) -> Message:
    return {"role": "user", "content": content}


def _calls(uses: list[Use]) -> Message:
    calls = [{"id": f"call_{i}", **use.call} for i, use in enumerate(uses)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _results(uses: list[Use]) -> list[Message]:
    return [
        {"role": "tool", "tool_call_id": f"call_{i}", "content": use.result}
        for i, use in enumerate(uses)
    ]


def _joined(rng: random.Random, uses: list[Use]) -> str:
    """Several questions as one, which names what they ask about if they ask the same."""
    first, *others = uses
    if first.frame and others and all(use.frame and use.name == first.name for use in others):
        *abouts, last = (use.about for use in uses)
        listed = f"{', '.join(abouts)}{rng.choice((' and ', ' and ', ', and '))}{last}"
        if rng.random() < 0.6:
            return listed.join(first.frame.rsplit("@", 1))
    glue = rng.choice((" ", " ", " And: ", " Also: ", "\n"))
    return glue.join(use.question for use in uses)


def _tool_turn(rng: random.Random, box: list[tuple[Tool, Ask]]) -> list[Message]:
    """A question, its calls, their results and the answer."""
    n = rng.choice((1, 1, 1, 1, 2, 2, 3)) if rng.random() < 0.5 else 1
    one = rng.choice(box)
    asked = [one] * n if rng.random() < 0.5 else [rng.choice(box) for _ in range(n)]
    uses = [_training_use(ask) for _, ask in asked]
    answer = " ".join(use.answer for use in uses)
    return [
        _question(_joined(rng, uses)), _calls(uses), *_results(uses),
        {"role": "assistant", "content": answer},
    ]  # fmt: skip


def _declined_turn(rng: random.Random) -> tuple[list[Message], frozenset[str]]:
    """A request for a tool that is not offered, and the families of tools that would serve it."""
    [family] = draw_families(rng, 1, _SUMS)
    use = _training_use(FAMILIES[family][1](rng)[1])
    answer = {"role": "assistant", "content": DECLINED}
    return [_question(use.question), answer], rivals(family) | {"search"}


def _plain_turns(rng: random.Random) -> tuple[list[list[Message]], frozenset[str]]:
    """Turns that no tool is for, and the families of tools that must not be there."""
    turns, unfit = [], frozenset[str]()
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        if rng.random() < 0.2:
            turns.append(small_talk(rng))
            if turns[-1][-1]["content"] == DECLINED:
                unfit |= _DECLINED
        elif rng.random() < 0.15:
            turns.append(prose(rng))
        elif rng.random() < 0.25:
            turn, families = _declined_turn(rng)
            turns.append(turn)
            unfit |= families
        else:
            case = training_case(rng)
            turns.append(task_turn(case))
            unfit |= _UNFIT.get(case.task, frozenset())
    return turns, unfit


def conversation(rng: random.Random) -> tuple[list[Message], list[Tool]]:
    """A training conversation and its tools: up to five turns, most of which need a tool. Now and
    then no tool is offered."""
    messages = [system_prompt(rng)] if rng.random() < 0.3 else []
    turns, unfit = _plain_turns(rng)
    if rng.random() < 0.12:
        turns += [_declined_turn(rng)[0] for _ in range(rng.randint(1, 3))]
        rng.shuffle(turns)
        return messages + [m for turn in turns for m in turn], []
    box: list[tuple[Tool, Ask]] = []
    while not box:
        box = toolbox(rng, rng.choice((1, 1, 2, 2, 3, 4)), unfit)
    turns += [_tool_turn(rng, box) for _ in range(rng.choice((1, 1, 2, 3) if turns else (1, 2, 3)))]
    rng.shuffle(turns)
    return messages + [m for turn in turns for m in turn], [tool for tool, _ in box]


def tool_evaluation(rng: random.Random, task: str) -> tuple[list[Message], list[Tool], Case]:
    """A held-out case with tools, below a system prompt in a quarter of the cases."""
    if task == "no_tool":
        plain = rng.choice(("add", "subtract", "sort_words", "count", "reverse", "copy", "json"))
        messages, case = evaluation(rng, plain)
        box: list[tuple[Tool, Ask]] = []
        while not box:
            box = toolbox(rng, rng.randint(1, 4), _UNFIT.get(plain, frozenset()))
        return messages, [tool for tool, _ in box], Case(task, case.prompt, case.answer, case.key)
    messages = [system_prompt(rng)] if rng.random() < 0.25 else []
    wanted = 2 if task == "tool_calls" else 1
    uses: list[Use] = []
    while len(uses) < wanted:
        box = toolbox(rng, rng.randint(1, 4))
        drawn = (rng.choice(box)[1]() for _ in range(64))
        uses = list(itertools.islice(filter(is_held_out, drawn), wanted))
    question = _joined(rng, uses)
    messages = [*messages, _question(question)]
    answer = written_calls([use.call for use in uses])
    if task == "tool_answer":
        messages += [_calls(uses), *_results(uses)]
        answer = uses[0].answer
    tools = [tool for tool, _ in box]
    return messages, tools, Case(task, question, answer, " ".join(use.key for use in uses))

"""The recipe's promises that can be tested without training: the split, the template, the loss
mask."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from minisrv.text.chat_deltas import ToolCallArguments, ToolCallStart
from minisrv.text.chat_format import ChatFormat
from minisrv.text.tool_parsers import HermesToolParser

MODELS = Path(__file__).resolve().parents[2] / "models"
sys.path.insert(0, str(MODELS))

from recipe import chat, data, tasks, tokenizer, tool_chat  # noqa: E402
from recipe.grammar import expand  # noqa: E402
from recipe.tools import Tool  # noqa: E402

CHECKPOINT = MODELS / "minisrv-default"


@pytest.fixture(scope="module")
def fast_tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_each_side_of_the_split_is_drawn_and_told_apart(task: str) -> None:
    rng = random.Random(0)
    for held_out in (True, False):
        assert all(tasks.draw(rng, task, held_out=held_out).held_out == held_out for _ in range(20))


def test_training_conversations_hold_no_held_out_sum() -> None:
    rng = random.Random(1)
    held_out = {tasks.draw(rng, "add", held_out=True).prompt for _ in range(3000)}
    for _ in range(3000):
        for message in chat.conversation(rng):
            assert message["content"] not in held_out


def test_the_split_ignores_phrasing_and_order_of_operands() -> None:
    one = tasks.Case("add", "3 + 4 =", "7", "3,4")
    other = tasks.Case("add", "What is 4 plus 3?", "7", "3,4")
    assert one.held_out == other.held_out


def test_the_cases_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import random; from recipe import tasks; rng = random.Random(3); "
        "print([tasks.draw(rng, t, held_out=True) for t in tasks.TASKS for _ in range(30)])"
    )
    one, other = (
        subprocess.run(
            [sys.executable, "-c", code], cwd=MODELS, env=os.environ | {"PYTHONHASHSEED": seed},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    )  # fmt: skip
    assert one == other


@pytest.mark.parametrize("task", ["copy", "reverse", "sort_words", "json"])
def test_careless_typing_never_changes_the_content(task: str) -> None:
    rng = random.Random(4)
    for _ in range(2000):
        case = tasks.draw(rng, task, held_out=False)
        for word in re.findall(r"\w+", case.answer):
            assert word in case.prompt


def test_the_longest_answer_fits_the_evaluations_limit(fast_tokenizer) -> None:
    rng = random.Random(5)
    for task in tasks.TASKS:
        for _ in range(1000):
            answer = tasks.draw(rng, task, held_out=True).answer
            assert len(fast_tokenizer.encode(answer).ids) < tasks.MAX_ANSWER_TOKENS
    for task in tool_chat.TOOL_TASKS:
        for _ in range(100):
            answer = tool_chat.tool_evaluation(rng, task)[2].answer
            assert len(fast_tokenizer.encode(answer).ids) < tasks.MAX_ANSWER_TOKENS


def test_grammar_chooses_fills_and_picks_the_article() -> None:
    rng = random.Random(0)
    assert expand("A(n) {name} and a(n) {other}[.|.]", {"name": "owl", "other": "fox"}, rng) == (
        "An owl and a fox."
    )
    assert expand("{He} ran.", {"he": "she"}, rng) == "She ran."


def template_renders(messages: list[chat.Message], tools: list[Tool]) -> str:
    """What the recipe's chat template makes of a conversation, in transformers' environment."""
    from minisrv.text.chat_template import ChatTemplate

    return ChatTemplate({"default": tokenizer.CHAT_TEMPLATE}, {}).render(messages, False, tools)


def test_the_checkpoints_template_is_the_recipes() -> None:
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == tokenizer.CHAT_TEMPLATE


def test_training_renders_as_the_template_does() -> None:
    rng = random.Random(2)
    for _ in range(20):
        messages = chat.conversation(rng)
        assert template_renders(messages, []) == tokenizer.render(messages)
        messages, tools = tool_chat.conversation(rng)
        assert template_renders(messages, tools) == tokenizer.render(messages, tools)


def test_without_tools_a_message_is_its_role_and_its_content() -> None:
    messages = chat.conversation(random.Random(3))
    plain = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert template_renders(messages, []) == plain


def test_the_servers_parser_finds_the_calls_that_training_writes() -> None:
    format = ChatFormat.of_template(tokenizer.CHAT_TEMPLATE)
    assert format.tool_parser is HermesToolParser
    assert format.knows_tools
    assert format.spells_calls
    rng = random.Random(7)
    for task in ("tool_call", "tool_calls") * 50:
        _, tools, case = tool_chat.tool_evaluation(rng, task)
        parser = HermesToolParser()
        deltas = parser.feed(case.answer) + parser.finish()
        calls: list[tuple[str, str]] = []
        for delta in deltas:
            match delta:
                case ToolCallStart(name=name):
                    calls.append((name, ""))
                case ToolCallArguments(text=text):
                    calls[-1] = (calls[-1][0], calls[-1][1] + text)
                case _:
                    pytest.fail(f"{delta} in {case.answer}")
        assert len(calls) == (2 if task == "tool_calls" else 1)
        schemas = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])


def test_training_with_tools_holds_no_held_out_call() -> None:
    rng = random.Random(8)
    held_out = {tool_chat.tool_evaluation(rng, "tool_call")[2].prompt for _ in range(1000)}
    for _ in range(1000):
        messages = tool_chat.conversation(rng)[0]
        for asked, answer in itertools.pairwise(messages):
            assert not (answer.get("tool_calls") and asked["content"] in held_out)


def test_any_text_survives_the_tokenizer(fast_tokenizer) -> None:
    text = "Naïve e\u0301 \u65e5\u672c \U0001f600 1234\t\n\n  x \u0000\u00ff"
    assert fast_tokenizer.decode(fast_tokenizer.encode(text).ids) == text


def test_only_the_assistants_words_are_learned(fast_tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
    ]
    import numpy as np

    ids = np.array(fast_tokenizer.encode(tokenizer.render(messages)).ids)
    learned = ids[data.answer_mask(ids, fast_tokenizer)].tolist()
    assert fast_tokenizer.decode(learned, skip_special_tokens=False) == (
        "2<|im_end|>Hello! How can I help you?<|im_end|>"
    )


def test_the_checkpoint_stays_small_enough_to_ship() -> None:
    files = list(CHECKPOINT.iterdir())
    assert all(f.stat().st_size <= 15_000_000 for f in files)
    assert sum(f.stat().st_size for f in files) <= 32_000_000

"""Parsers find tool calls and reasoning in a text, pass them on as they come, and never lose
text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minisrv.text.chat_deltas import (
    ChatMessage,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    assemble,
)
from minisrv.text.chat_format import ChatParser
from minisrv.text.reasoning import ReasoningParser
from minisrv.text.tool_parsers import HermesToolParser, Llama3JsonToolParser, ToolParser


def parse(parser: ChatParser | ToolParser | ReasoningParser, *pieces: str) -> ChatMessage:
    return assemble([*(d for piece in pieces for d in parser.feed(piece)), *parser.finish()])


def calls(message: ChatMessage) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in message.tool_calls]


def shape(message: ChatMessage) -> tuple[str, str, list[tuple[str, str]]]:
    """The content, the reasoning and the calls of a message without the ids of the calls, which are
    random."""
    return message.content, message.reasoning, calls(message)


A = '{"name": "a", "arguments": {"x": 1}}'
B = '{"name": "b", "arguments": {"y": "}</tool_call>{"}}'
CALL_A, CALL_B = (("a", '{"x": 1}'), ("b", '{"y": "}</tool_call>{"}'))


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ("Hello <b>there</b>\n", "Hello <b>there</b>\n", []),
        (f"<tool_call>\n{A}\n</tool_call>", "", [CALL_A]),
        (f"I look.\n\n<tool_call>{A}</tool_call>\n", "I look.", [CALL_A]),
        (f"<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>", "", [CALL_A, CALL_B]),
        (f"<tool_call>{A}</tool_call> Done.", "Done.", [CALL_A]),
        # Calls without the end marker, which is missing if it is the stop token.
        (f"<tool_call>\n{A}", "", [CALL_A]),
        (f"<tool_call>\n{A}</tool", "", [CALL_A]),
        (f"<tool_call>{A}\n<tool_call>{B}", "", [CALL_A, CALL_B]),
        (f"<tool_call>{A}</tool_response>", "</tool_response>", [CALL_A]),
        # Other forms of a call.
        ('<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', "", [CALL_A]),
        ('<tool_call>{"name":"a","parameters":{"x": 1},"id":[7]}</tool_call>', "", [CALL_A]),
        ('<tool_call>{"type": "function", "name": "a", "arguments": {"x": 1}}', "", [CALL_A]),
        ('<tool_call>{"name": "\\"{", "arguments": {}}</tool_call>', "", [('"{', "{}")]),
        ('<tool_call>{"id": {}, "name": "a", "arguments": {"x": 1}}</tool_call>', "", [CALL_A]),
        # Broken arguments are passed on to the client.
        ('<tool_call>{"name": "a", "arguments": {"x": 1}</tool_call>', "", [CALL_A]),
        ('<tool_call>{"name": "a", "arguments": {"x":</tool_call>!', "!", [("a", '{"x":')]),
        ('<tool_call>{"name": "a", "arguments": {"x": "tru', "", [("a", '{"x": "tru')]),
    ],
)
def test_hermes(text: str, content: str, expected: list[tuple[str, str]]) -> None:
    message = parse(HermesToolParser(), text)
    assert (message.content, calls(message)) == (content, expected)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call> \n",
        "<tool_ca",
        "a </tool_call> b",
        "<tool_call>{hello}</tool_call>",
        "<tool_call>get_weather(city)</tool_call>",
        '<tool_call>{"name": "a"}</tool_call>',
        '<tool_call>{"name": "a", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "a" "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "Bob", "address": {"city": "Ulm"}}</tool_call>',
        '<tool_call>{"name": "a", "argu',
        '<tool_call>["name", {"arguments": {}}]</tool_call>',
        '<tool_call>{"a": ' + "[" * 50_000 + "]" * 50_000 + "}</tool_call>",
        "text <tool_call> \n <tool_call> more \n",
    ],
)
def test_what_is_no_call_is_content_markers_included(text: str) -> None:
    assert shape(parse(HermesToolParser(), text)) == (text, "", [])


def test_a_call_behind_what_is_none() -> None:
    """A call is found after a marker that begins no call."""
    message = parse(HermesToolParser(), f"<tool_call>{{<tool_call>{A}</tool_call>")
    assert shape(message) == ("<tool_call>{", "", [CALL_A])


P = '{"name": "a", "parameters": {"x": 1}}'


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ("Hello; there {}", "Hello; there {}", []),
        (P, "", [CALL_A]),
        (f"\n<|python_tag|>{P}\n", "", [CALL_A]),
        (f"{P}; {A}", "", [CALL_A, CALL_A]),
        (f"{P};", "", [CALL_A]),
        (f"{P} That is it.", "That is it.", [CALL_A]),
        # A call is all of the answer or comes first.
        (f"I call {P}", f"I call {P}", []),
        ('{"answer": {"x": 1}} ok', '{"answer": {"x": 1}} ok', []),
        (' <|python_tag|>search("x")', ' <|python_tag|>search("x")', []),
        ("<|pyth", "<|pyth", []),
        (f"{{}} {P}", f"{{}} {P}", []),
        ('{"name": "Bob", "age": 3', '{"name": "Bob", "age": 3', []),
    ],
)
def test_llama3_json(text: str, content: str, expected: list[tuple[str, str]]) -> None:
    message = parse(Llama3JsonToolParser(), text)
    assert (message.content, calls(message)) == (content, expected)


def test_a_call_streams_as_soon_as_it_is_certain() -> None:
    """The start of a call is passed on once its name and the beginning of its arguments are known,
    and its arguments as they come."""
    parser = HermesToolParser()
    assert parser.feed("Ok\n<tool") == [ContentDelta("Ok")]
    assert parser.feed('_call>{"name": "a", "arguments": ') == []
    start, first = parser.feed('{"x')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "a")
    assert re.fullmatch(r"call_[0-9a-f]{24}", start.id)
    assert first == ToolCallArguments(0, '{"x')
    assert parser.feed('": 1}') == [ToolCallArguments(0, '": 1}')]
    assert parser.feed("}\n</tool_call>\n<tool_call>") == []
    second, arguments = parser.feed(B)
    assert isinstance(second, ToolCallStart)
    assert (second.index, second.name) == (1, "b")
    assert second.id != start.id
    assert arguments == ToolCallArguments(1, CALL_B[1])
    assert parser.finish() == []


@pytest.mark.parametrize("make", [HermesToolParser, Llama3JsonToolParser])
def test_text_that_can_begin_no_marker_is_not_held_back(make: type[ToolParser]) -> None:
    parser = make()
    assert parser.feed("Hello") == [ContentDelta("Hello")]
    assert parser.feed(" you") == [ContentDelta(" you")]


THINK = "<think>\nHm, <b> </thin\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "inside", "content", "reasoning"),
    [
        ("Hello <think>x</think>", False, "Hello <think>x</think>", ""),
        (THINK + "Yes.\n", False, "Yes.\n", "Hm, <b> </thin"),
        ("\n" + THINK + "Yes", False, "Yes", "Hm, <b> </thin"),
        ("\nHm\n</think>\n\nYes</think>", True, "Yes</think>", "Hm"),
        ("<think>\n\n</think>\n\nYes", False, "Yes", ""),
        ("<think>Hm, and", False, "", "Hm, and"),
        ("Hm, and\n</th", True, "", "Hm, and\n</th"),
        (" <thi", False, " <thi", ""),
        (" ", False, " ", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning(text: str, inside: bool, content: str, reasoning: str) -> None:
    message = parse(ReasoningParser(starts_inside=inside), text)
    assert shape(message) == (content, reasoning, [])


def test_reasoning_streams() -> None:
    parser = ReasoningParser(starts_inside=False)
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nHm, ") == [ReasoningDelta("Hm,")]
    assert parser.feed("well </") == [ReasoningDelta(" well")]
    assert parser.feed("b>") == [ReasoningDelta(" </b>")]
    assert parser.feed("\n</think>\n") == []
    assert parser.feed("\nYes ") == [ContentDelta("Yes ")]
    assert parser.finish() == []


def test_calls_in_reasoning_are_reasoning() -> None:
    """Calls inside the reasoning are part of the reasoning."""
    call = f"<tool_call>{A}</tool_call>"
    parser = ChatParser(ReasoningParser(starts_inside=False), HermesToolParser())
    message = parse(parser, f"<think>{call}</think>Ok.{call}")
    assert shape(message) == ("Ok.", call, [CALL_A])


PARSERS: list[Callable[[], ChatParser]] = [
    lambda: ChatParser(None, None),
    lambda: ChatParser(None, HermesToolParser()),
    lambda: ChatParser(None, Llama3JsonToolParser()),
    lambda: ChatParser(ReasoningParser(starts_inside=False), HermesToolParser()),
    lambda: ChatParser(ReasoningParser(starts_inside=True), Llama3JsonToolParser()),
]
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", ";", " ", "\n"),
    *(A, B, P, '{"name": "a", ', '"arguments": ', "{", "}", "[", '"', "\\", "<", "<t", "null"),
    *("text", "日本"),
]


@pytest.mark.parametrize("make", PARSERS)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.lists(st.integers(0, 200), max_size=12),
)
@example(f"<think>\nHm.\n</think>\n\n<tool_call>\n{A}\n</tool_call>", list(range(100)))
@example(f" <|python_tag|>{P} ; {A}", list(range(100)))
def test_pieces_do_not_matter(make: Callable[[], ChatParser], text: str, cuts: list[int]) -> None:
    """A message does not depend on how its text is cut into pieces."""
    whole = shape(parse(make(), text))
    ends = sorted({cut for cut in cuts if cut < len(text)})
    pieces = [text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert "".join(pieces) == text
    assert shape(parse(make(), *pieces)) == whole
    assert shape(parse(make(), *text)) == whole


@pytest.mark.parametrize("make", PARSERS)
@given(st.text('<>/thinktool_ca|py{}" \n;', max_size=60))
def test_any_text_is_parsed(make: Callable[[], ChatParser], text: str) -> None:
    """Text without a complete marker or call is content as it is."""
    message = parse(make(), *text)
    if not any(sign in text for sign in ("<think>", "</think>", "<tool_call>", '"arguments"')):
        assert message.content + message.reasoning in (text, text.strip())


def test_arguments_that_end_are_json() -> None:
    for line in (A, B, P):
        text = f"<tool_call>{line}</tool_call>"
        [call] = parse(HermesToolParser(), text).tool_calls
        assert json.loads(call.arguments) in json.loads(line).values()

"""The parsers of tool calls and reasoning that a chat template asks for."""

from __future__ import annotations

import pytest

from minisrv.request import StructuredOutput, StructuredOutputKind
from minisrv.text.chat_deltas import assemble
from minisrv.text.chat_format import ChatFormat
from minisrv.text.tool_parsers import HermesToolParser, Llama3JsonToolParser, ToolParser

# The lines of public templates by which their format is recognised.
QWEN3 = """
{{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
"""
QWEN3_CODER = "{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}"
LLAMA_31 = """
{{- "Environment: ipython\\n" }}{{- "<|python_tag|>" + tool_call.name + ".call(" }}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
"""
LLAMA_32 = """
{{- "Environment: ipython\\n" }}
{{- 'Respond in the format {"name": function name, "parameters": dictionary}.' }}
"""
DEEPSEEK_R1 = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
CHATML = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"


@pytest.mark.parametrize(
    ("template", "tool_parser", "reasons", "why"),
    [
        (QWEN3, HermesToolParser, True, "<tool_call>"),
        (QWEN3_CODER, None, False, "XML"),
        (LLAMA_31, Llama3JsonToolParser, False, "<|python_tag|>"),
        (LLAMA_32, Llama3JsonToolParser, False, "Environment: ipython"),
        (DEEPSEEK_R1, None, True, "no marker"),
        (CHATML, None, False, "no marker"),
    ],
)
def test_detection(
    template: str, tool_parser: type[ToolParser] | None, reasons: bool, why: str
) -> None:
    """The parser of tool calls, whether the model reasons, and the reason given, for public
    templates."""
    found = ChatFormat.of_template(template)
    assert (found.tool_parser, found.reasons) == (tool_parser, reasons)
    assert why in found.why


THINK = "<|im_start|>assistant\n<think>\n"
THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
START = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "prompt", "tools", "content", "reasoning", "num_calls"),
    [
        (QWEN3, THINK, HermesToolParser, "", "x", 1),
        (QWEN3, START, HermesToolParser, "x</think>", "", 1),
        (QWEN3, THOUGHT, HermesToolParser, "x</think>", "", 1),
        (QWEN3, THINK, None, "CALL", "x", 0),
        (CHATML, THINK, HermesToolParser, "x</think>", "", 1),
    ],
)
def test_the_parser_for_an_answer(
    template: str,
    prompt: str,
    tools: type[ToolParser] | None,
    content: str,
    reasoning: str,
    num_calls: int,
) -> None:
    """The answer has reasoning only if the template knows it and the prompt leaves it open or the
    answer opens it, and calls only with tools."""
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    parser = ChatFormat.of_template(template).parser(prompt, tools=tools)
    assert parser is not None
    message = assemble([*parser.feed("x</think>" + call), *parser.finish()])
    assert message.content == content.replace("CALL", call)
    assert message.reasoning == reasoning
    assert len(message.tool_calls) == num_calls


@pytest.mark.parametrize(
    ("template", "prompt"), [(CHATML, START), (CHATML, THINK), (QWEN3, THOUGHT)]
)
def test_an_answer_that_is_all_content_has_no_parser(template: str, prompt: str) -> None:
    assert ChatFormat.of_template(template).parser(prompt) is None


def test_where_a_structured_output_begins() -> None:
    """The markers that may come before a structured output depend on whether the prompt has opened
    or ended the reasoning."""
    spec = StructuredOutput(kind=StructuredOutputKind.JSON_OBJECT)
    for template, prompt, markers in (
        (QWEN3, START, ("<think>", "</think>")),
        (QWEN3, THINK, ("", "</think>")),
        (QWEN3, THOUGHT, ("", "")),
        (CHATML, THINK, ("", "")),
    ):
        found = ChatFormat.of_template(template).behind_reasoning(spec, prompt)
        assert (found.reasoning_start, found.reasoning_end) == markers


def test_one_call_where_no_more_are_wanted() -> None:
    """With parallel=False only the first call is passed on, however the text is cut."""
    call = '<tool_call>{"name": "a", "arguments": {"x": NUMBER}}</tool_call>'
    text = "one " + call.replace("NUMBER", "1") + "\n" + call.replace("NUMBER", "2")
    for size in (1, 7, len(text)):
        parser = ChatFormat.of_template(QWEN3).parser(
            THOUGHT, tools=HermesToolParser, parallel=False
        )
        assert parser is not None
        deltas = [d for i in range(0, len(text), size) for d in parser.feed(text[i : i + size])]
        message = assemble([*deltas, *parser.finish()])
        assert message.content == "one"
        assert [found.arguments for found in message.tool_calls] == ['{"x": 1}']

"""Which parsers a chat template asks for."""

from __future__ import annotations

import pytest

from minisrv.text.chat_deltas import assemble
from minisrv.text.chat_format import ChatFormat
from minisrv.text.tool_parsers import HermesToolParser, Llama3JsonToolParser, ToolParser

# The telling lines of public templates.
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
    found = ChatFormat.of_template(template)
    assert (found.tool_parser, found.reasons) == (tool_parser, reasons)
    assert why in found.why[0]
    assert ("has </think>" in found.why[1]) == reasons


@pytest.mark.parametrize(
    ("template", "prompt", "tools", "content", "reasoning", "num_calls"),
    [
        (QWEN3, "<|im_start|>assistant\n<think>\n", True, "", "x", 1),
        (QWEN3, "<|im_start|>assistant\n", True, "x</think>", "", 1),
        (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", True, "x</think>", "", 1),
        (QWEN3, "<|im_start|>assistant\n<think>\n", False, "CALL", "x", 0),
        (CHATML, "<|im_start|>assistant\n<think>\n", False, "x</think>CALL", "", 0),
    ],
)
def test_the_parser_for_an_answer(
    template: str, prompt: str, tools: bool, content: str, reasoning: str, num_calls: int
) -> None:
    call = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    parser = ChatFormat.of_template(template).parser(prompt, tools=tools)
    message = assemble([*parser.feed("x</think>" + call), *parser.finish()])
    assert message.content == content.replace("CALL", call)
    assert message.reasoning == reasoning
    assert len(message.tool_calls) == num_calls

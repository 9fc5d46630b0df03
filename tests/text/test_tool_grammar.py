"""Forced tool calls: the parser reads every text that the grammar lets through as the call that it
is."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import msgspec
import pytest
import tokenizers

from minisrv.checkpoint import resolve_checkpoint
from minisrv.errors import RequestError
from minisrv.request import MAX_GRAMMAR_LENGTH, StructuredOutput, StructuredOutputKind
from minisrv.text.chat_deltas import assemble
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tool_grammar import Tool, tool_call_grammar
from minisrv.text.tool_parsers import HermesToolParser, Llama3JsonToolParser, ToolParser
from tests.text.random_schemas import random_schema
from tests.text.walks import EOS, follow, walk

PARSERS = [HermesToolParser, Llama3JsonToolParser]
TOOLS = [
    Tool(name="get_weather", parameters=random_schema(3)),
    Tool(name="get", parameters=random_schema(4)),
    Tool(name="now"),
]
ROME = Tool(
    name="rome",
    parameters={"type": "object", "properties": {"city": {"const": "Rome"}}, "required": ["city"]},
)


@pytest.fixture(scope="module", params=["markers are text", "markers are tokens"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    raw = tokenizers.Tokenizer.from_file(str(resolve_checkpoint(None) / "tokenizer.json"))
    if request.param == "markers are tokens":
        markers = ("<tool_call>", "</tool_call>", "</think>")
        raw.add_tokens([tokenizers.AddedToken(marker, special=False) for marker in markers])
    return Tokenizer(raw)


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> GrammarBackend:
    return GrammarBackend(tokenizer, tokenizer.vocab_size, [EOS])


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("parallel", [True, False])
def test_whatever_is_sampled_is_calls_of_the_tools(
    backend: GrammarBackend, tokenizer: Tokenizer, parser: type[ToolParser], parallel: bool
) -> None:
    """Random texts are calls of given tools with valid arguments, and more than one only with
    `parallel`."""
    spec = tool_call_grammar(TOOLS, parser, tokenizer, parallel=parallel)
    names, most = set(), 0
    for seed in range(30):
        finder = parser()
        text = walk(backend, tokenizer, spec, random.Random(seed))
        message = assemble([*finder.feed(text), *finder.finish()])
        assert message.content == ""
        for call in message.tool_calls:
            [tool] = [tool for tool in TOOLS if tool.name == call.name]
            arguments = json.loads(call.arguments)
            schema = tool.parameters or {"type": "object", "maxProperties": 0}
            jsonschema.validate(arguments, schema, jsonschema.Draft202012Validator)
            names.add(call.name)
        assert message.tool_calls
        most = max(most, len(message.tool_calls))
    assert names == {"get_weather", "get", "now"}
    assert (most > 1) == parallel


@pytest.mark.parametrize("parser", PARSERS)
def test_a_named_tool_is_the_only_one(
    backend: GrammarBackend, tokenizer: Tokenizer, parser: type[ToolParser]
) -> None:
    spec = tool_call_grammar(TOOLS[2:], parser, tokenizer, parallel=False)
    for seed in range(5):
        finder = parser()
        text = walk(backend, tokenizer, spec, random.Random(seed))
        [call] = assemble([*finder.feed(text), *finder.finish()]).tool_calls
        assert call.name == "now"


def test_the_calls_are_spelled_as_the_templates_spell_them(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    """A grammar accepts the calls as the template of the model writes them."""
    now = TOOLS[2:]
    hermes = tool_call_grammar(now, HermesToolParser, tokenizer, parallel=True)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert follow(backend, tokenizer, hermes, f"{call}\n{call}")
    llama = tool_call_grammar(now, Llama3JsonToolParser, tokenizer, parallel=True)
    call = '{"name": "now", "parameters": {}}'
    assert follow(backend, tokenizer, llama, f"{call}; {call}")


def test_reasoning_comes_before_the_calls(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    forced = tool_call_grammar(TOOLS[2:], HermesToolParser, tokenizer, parallel=False)
    spec = msgspec.structs.replace(forced, reasoning_end="</think>")
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert follow(backend, tokenizer, spec, f"Let me see.\n</think>\n\n{call}")
    assert not follow(backend, tokenizer, spec, call)


FORMS = [
    StructuredOutput(
        kind=StructuredOutputKind.JSON_SCHEMA,
        text='{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}',
    ),
    StructuredOutput(kind=StructuredOutputKind.JSON_OBJECT),
    StructuredOutput(kind=StructuredOutputKind.REGEX, text='\\{"n": [0-9]+\\}|<tool_call>!'),
    StructuredOutput(kind=StructuredOutputKind.CHOICE, choices=('{"n": 3}', "<tool_call>!")),
    StructuredOutput(kind=StructuredOutputKind.GRAMMAR, text='start: "{\\"n\\": " /[0-9]+/ "}"'),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.kind)
@pytest.mark.parametrize("reasoning_end", ["", "</think>"])
@pytest.mark.parametrize("parser", PARSERS)
def test_calls_or_a_text_in_a_form(
    backend: GrammarBackend,
    tokenizer: Tokenizer,
    parser: type[ToolParser],
    reasoning_end: str,
    form: StructuredOutput,
) -> None:
    """A form with calls beside it allows either and nothing else, behind the reasoning if there is
    any."""
    tools = [*TOOLS[2:], ROME]
    spec = tool_call_grammar(tools, parser, tokenizer, parallel=True, form=form)
    spec = msgspec.structs.replace(spec, reasoning_end=reasoning_end)
    reasoning = f"Let me see.{reasoning_end}" if reasoning_end else ""
    begin, end = "".join(parser.opening), "".join(parser.closing)

    def call(arguments: str) -> str:
        return f'{begin}{{"name": "rome", "{parser.arguments_name}": {arguments}}}{end}'

    good = call('{"city": "Rome"}')
    for text in ('{"n": 3}', good, f"{good}{parser.separator}{good}"):
        assert follow(backend, tokenizer, spec, reasoning + text), text
    bad = ["Let me see.", f'{{"n": 3}}{good}', f'{good}{{"n": 3}}', call('{"city": "Oslo"}')]
    if form.kind is StructuredOutputKind.JSON_OBJECT and not parser.opening:
        bad.pop()  # such a call is any JSON object as well
    for text in bad:
        assert not follow(backend, tokenizer, spec, reasoning + text), text
    lowered = backend.lower(spec)
    assert lowered.calls == ""
    assert follow(backend, tokenizer, lowered, reasoning + good)


def test_parameters_cannot_change_how_they_are_read(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    """llguidance reads options from a schema, and with these the arguments would be no JSON."""
    tool = Tool(name="f", parameters={"x-guidance": {"key_separator": "="}})
    spec = tool_call_grammar([tool], Llama3JsonToolParser, tokenizer, parallel=False)
    assert follow(backend, tokenizer, spec, '{"name": "f", "parameters": {"a": 1}}')
    assert not follow(backend, tokenizer, spec, '{"name": "f", "parameters": {"a"=1}}')


def test_arguments_hold_what_is_declared(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    city = {"city": {"$ref": "#/$defs/name"}}
    parameters = {"properties": city, "$defs": {"name": {"enum": ["Rome"]}}}
    spec = tool_call_grammar(
        [Tool(name="f", parameters=parameters)], Llama3JsonToolParser, tokenizer, parallel=False
    )
    assert follow(backend, tokenizer, spec, '{"name": "f", "parameters": {"city": "Rome"}}')
    for arguments in ('{"x": 1}', '{"city": "Rome", "x": 1}', '{"city": "Oslo"}'):
        assert not follow(backend, tokenizer, spec, f'{{"name": "f", "parameters": {arguments}}}')


def nested(depth: int) -> dict[str, Any]:
    """A schema of this many objects within objects."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "parameters",
    [{"type": "array"}, {"description": "x" * MAX_GRAMMAR_LENGTH}, nested(500), nested(2000)],
)
def test_parameters_that_cannot_be_arguments_are_refused(
    tokenizer: Tokenizer, parameters: dict[str, Any]
) -> None:
    tools = [Tool(name="a", parameters=parameters)]
    with pytest.raises(RequestError) as raised:
        tool_call_grammar(tools, HermesToolParser, tokenizer, parallel=False)
    assert raised.value.param == "tools"


def test_parameters_are_kept_or_refused_as_schemas_are(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    """Parameters get the same treatment as the schemas of structured output, and an error names
    `tools`."""
    declared = {
        "properties": {"score": {"const": "</tool_call>"}},
        "required": ["score"],
        "patternProperties": {"^score$": {}},
        "additionalProperties": False,
    }
    tools = [Tool(name="f", parameters=declared)]
    spec = tool_call_grammar(tools, Llama3JsonToolParser, tokenizer, parallel=False)
    for seed in range(5):
        call = json.loads(walk(backend, tokenizer, spec, random.Random(seed)))
        assert call == {"name": "f", "parameters": {"score": "</tool_call>"}}
    tools = [Tool(name="f", parameters={"properties": {"a": {"const": 2**64 + 1}}})]
    spec = tool_call_grammar(tools, Llama3JsonToolParser, tokenizer, parallel=False)
    with pytest.raises(RequestError, match="18446744073709551617 cannot be kept") as raised:
        backend.compile(spec)
    assert raised.value.param == "tools"

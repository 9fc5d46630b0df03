"""The grammar of an answer that must be tool calls, spelled as the model has learned them.

Knows: how a parser's model spells calls, and JSON schemas. Knows nothing of masks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from minisrv.errors import RequestError, shown
from minisrv.request import StructuredOutput, StructuredOutputKind
from minisrv.text.structured import json_rule, literal, marker
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tool_parsers import ToolParser

_JSON = (StructuredOutputKind.JSON_OBJECT, StructuredOutputKind.JSON_SCHEMA)


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that a model may call.

    parameters: the JSON schema of its arguments, which are an object; None for a function without
        arguments.
    """

    name: str
    parameters: dict[str, Any] | None = None


def tool_call_grammar(
    tools: Sequence[Tool],
    parser: type[ToolParser],
    tokenizer: Tokenizer,
    *,
    parallel: bool,
    form: StructuredOutput | None = None,
) -> StructuredOutput:
    """Return the structured output that forces a call of one of `tools`: these are all of the
    request's tools unless its `tool_choice` names one.

    parallel: whether more than one call is allowed.
    form: the form of a text that is allowed instead of a call; None if a call is required.

    Raises RequestError, naming `tools`, if they are too large, or have parameters that are not an
    object's.
    """
    beside_json = form is not None and form.kind in _JSON
    call = [
        *(marker(text, tokenizer) for text in parser.opening),
        "(" + " | ".join(f"call_{i}" for i in range(len(tools))) + ")",
        *(marker(text, tokenizer) for text in parser.closing),
    ]
    more = f" ({literal(parser.separator)} call)*" if parallel else ""
    rules = [f"start: call{more}", f"call: {' '.join(call)}"]
    for i, tool in enumerate(tools):
        pieces = ["{", '"name"', ":", " ", json.dumps(tool.name), ",", " "]
        pieces += [f'"{parser.arguments_name}"', ":", " "]
        # NOTE: of lexemes that begin alike, llguidance follows only the longest that fits, so that
        # a call that is one lexeme would rule out JSON, whose lexemes these pieces are.
        head = " ".join(map(literal, pieces if beside_json else ["".join(pieces)]))
        # A rule of its own keeps `$ref` within the tool's schema.
        rules.append(f"call_{i}: {head} arguments_{i} {literal('}')}")
        rules.append(f"arguments_{i}: {_arguments_rule(tool)}")
    text = "\n".join(rules)
    if form is not None:
        return msgspec.structs.replace(form, calls=text)
    return StructuredOutput(kind=StructuredOutputKind.GRAMMAR, text=text, param="tools")


def _arguments_rule(tool: Tool) -> str:
    try:
        return json_rule(_arguments_schema(tool))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise RequestError(
            f"tools: the parameters of {tool.name!r} cannot be followed: {reason}.", param="tools"
        ) from error


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    if tool.parameters is None:
        return {"type": "object", "additionalProperties": False}
    schema = {"type": "object", **tool.parameters}
    if schema["type"] != "object":
        raise RequestError(
            f"tools: the parameters of {tool.name!r} have the type {shown(schema['type'])}; "
            "the arguments of a function are an object.",
            param="tools",
        )
    return schema

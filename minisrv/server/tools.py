"""The fields of a chat request about tools: those that the model may call, which it must call, and
the calls and results of earlier turns. They are OpenAI's fields, as far as functions go.

Knows: the fields and their bounds. How a model spells a call is the matter of `text.tool_parsers`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, PlainValidator, Tag, ValidationInfo
from pydantic_core import from_json

from minisrv.server.strict import HistoryObject, Strict, Text
from minisrv.server.structured import Schema
from minisrv.server.value_budget import ValueBudget

MAX_TOOLS = 128
MAX_CALLS = 4096
"""Maximum number of calls in one message: more than fit into an answer."""

Name: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
LongName: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
"""Name of a function in the APIs that allow longer ones than chat completions do."""


class Function(Strict):
    """A function that the model may call."""

    name: Name
    """Name of the function."""
    description: Text | None = None
    """Description of the function, which the model sees."""
    parameters: Schema | None = None
    """JSON schema of the arguments, which are an object. If absent, the function has no
    arguments."""
    strict: bool | None = None
    """Has no effect: the arguments of a required call always follow the schema, as a
    `response_format` does, and those of other calls need not."""

    def for_template(self) -> dict[str, Any]:
        """Return the function as chat templates expect it."""
        fields: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            fields["description"] = self.description
        if self.parameters is not None:
            fields["parameters"] = json.loads(self.parameters)
        return fields


class Tool(Strict):
    """A tool. The only kind is a function."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        return {"type": "function", "function": self.function.for_template()}


class FunctionName(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """Those of the tools that the model may call, and whether it must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(Strict):
    """A choice among some of the tools; the model is told of these only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "allowed" if kind == "allowed_tools" else "named"


ChoiceObject: TypeAlias = Annotated[
    Annotated[NamedTool, Tag("named")] | Annotated[AllowedToolsChoice, Tag("allowed")],
    Discriminator(_kind_of_choice),
]
ToolChoice: TypeAlias = Literal["none", "auto", "required"] | ChoiceObject


def _arguments(value: Any, info: ValidationInfo) -> dict[str, Any] | str:
    """Return the arguments of a call, which clients send back as a JSON object or its text. Text
    that is not a JSON object, such as that of a call cut off by `max_tokens`, stays as it is.

    Values inside the text count towards the limits of the request: see `ValueBudget`.
    """
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a JSON object, or its text")
    budget = info.context or ValueBudget()
    budget.spend(value.encode(errors="replace"))
    try:
        arguments = json.loads(value) if value.strip() else {}
        json.dumps(arguments, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except (ValueError, RecursionError):
        return value
    return arguments if isinstance(arguments, dict) else value


Arguments: TypeAlias = Annotated[
    dict[str, Any] | str,
    PlainValidator(_arguments, json_schema_input_type=str | dict[str, Any]),
]


class CalledFunction(HistoryObject):
    """The function that was called, and its arguments."""

    name: Text
    """Name of the function, as the model wrote it."""
    arguments: Arguments = Field(default={})
    """The arguments: a JSON object, or its text. Text that is not a JSON object is passed to the
    model unchanged."""


class ToolCall(HistoryObject):
    """A tool call in an earlier answer."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self, *, whole: bool) -> dict[str, Any]:
        """Return the call as chat templates expect it, with the arguments as an object if they are
        one.

        whole: give the arguments as an object in any case, of what can be parsed of them.
        """
        arguments = self.function.arguments
        if whole and isinstance(arguments, str):
            arguments = readable_arguments(arguments)
        fields: dict[str, Any] = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": arguments}
        return {**fields, "type": "function", "function": function}


def readable_arguments(arguments: str) -> dict[str, Any]:
    """Return what can be parsed of a JSON object that was cut off; an empty object for anything
    else."""
    try:
        found = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

"""What a chat request may say of tools: those the model may call, which it must, and the calls and
results of earlier turns. OpenAI's fields, as far as functions go.

Knows: the fields and their bounds. How a model spells a call is `text.tool_parsers`' matter.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PlainValidator

from minisrv.server.strict import ShortText, Strict, Text
from minisrv.server.structured import Schema

MAX_TOOLS = 128
MAX_CALLS = 128
"""Of one message."""

Name: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    """What the model is told of it."""
    parameters: Schema | None = None
    """The JSON schema of its arguments, which are an object; absent, it has none."""
    strict: bool | None = None
    """Arguments follow the schema where a call is required in any case, and nowhere else."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        told: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            told["description"] = self.description
        if self.parameters is not None:
            told["parameters"] = json.loads(self.parameters)
        return told


class Tool(Strict):
    """A tool, of which functions are the one kind there is."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return {"type": "function", "function": self.function.for_template()}


class FunctionName(Strict):
    """Names a function."""

    name: Name


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool


def _arguments(value: Any) -> dict[str, Any]:
    """Arguments as a client sends them back, a JSON object's text."""
    try:
        arguments = json.loads(value) if isinstance(value, str) and value.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError("must be a JSON object, as a string") from error
    if not isinstance(value, str) or not isinstance(arguments, dict):
        raise ValueError("must be a JSON object, as a string")
    return arguments


class CalledFunction(Strict):
    """A function that was called, and how."""

    name: Name
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments, json_schema_input_type=str)]
    """JSON, as a string."""


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, arguments as an object."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}

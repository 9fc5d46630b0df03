"""The fields by which a request asks for a structured output: `response_format`, as OpenAI has it,
and `structured_outputs`, as vLLM has it.

An object of a schema that declares properties holds those and no others, whether it is `strict` or
not, unless the schema sets `additionalProperties` itself: as in xgrammar, which vLLM and SGLang
use.

Whether a schema or a grammar can be followed is not checked here: it is compiled elsewhere before
the request reaches the engine.

Knows: the fields and their bounds. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PlainValidator, model_validator

from minisrv.request import MAX_CHOICES, MAX_GRAMMAR_LENGTH, StructuredOutput, StructuredOutputKind
from minisrv.server.strict import Strict, Text, refuse
from minisrv.server.unsupported import STRUCTURED_OUTPUTS


def _schema(value: Any) -> str:
    """Return a JSON schema that was sent as an object as JSON text."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema, which is an object")
    try:
        return json.dumps(value)
    except RecursionError as error:
        raise ValueError("must not be nested so deeply") from error


def _schema_or_text(value: Any) -> str:
    return value if isinstance(value, str) else _schema(value)


Schema: TypeAlias = Annotated[str, PlainValidator(_schema, json_schema_input_type=dict[str, Any])]
SchemaOrText: TypeAlias = Annotated[
    str, PlainValidator(_schema_or_text, json_schema_input_type=str | dict[str, Any])
]
Choices: TypeAlias = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
GrammarText: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_LENGTH)]


class JsonSchema(Strict):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """Name of the schema. Ignored, because the model does not see it."""
    description: Text | None = None
    """Ignored, because the model does not see it."""
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None
    """Has no effect: the text always follows the schema, and objects have only the properties that
    it declares, unless it allows others."""


class ResponseFormat(Strict):
    """Format that the text of an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    """The schema that the text must follow. Needed with type json_schema, and allowed only
    there."""

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refuse(
                "json_schema", 'json_schema is needed with type "json_schema", and only there.'
            )
        return self

    def as_spec(self) -> StructuredOutput | None:
        """Return the specification for the engine; None if any text is allowed. Raises RequestError
        for a schema that is too large."""
        if self.type == "text":
            return None
        text = "" if self.json_schema is None else self.json_schema.schema_
        return StructuredOutput(
            kind=StructuredOutputKind(self.type), text=text, param="response_format"
        )


class StructuredOutputs(Strict):
    """Format that the text must have. Exactly one of the fields must be set."""

    unsupported = STRUCTURED_OUTPUTS
    param: ClassVar[str] = "structured_outputs"
    """The field of the request that errors name."""

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    """The text is JSON that follows this JSON schema, which is sent as an object or as its text."""
    regex: GrammarText | None = None
    """The whole text matches this regular expression, in Rust's syntax."""
    choice: Choices | None = None
    """The text is one of these texts."""
    grammar: GrammarText | None = None
    """The text follows this grammar: in llguidance's dialect of Lark, or as GBNF or EBNF, whose
    rules are written `root ::= ...`."""
    json_object: Literal[True] | None = None
    """The text is any JSON object."""

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("must hold exactly one of json, regex, choice, grammar, json_object")
        return self

    def as_spec(self, param: str = "") -> StructuredOutput:
        """Return the specification for the engine. Raises RequestError if a text or all choices
        together are too large.

        param: the field of the request, if it is another one than usually.
        """
        kinds, param = StructuredOutputKind, param or self.param
        if self.choice is not None:
            choices = tuple(self.choice)
            return StructuredOutput(kind=kinds.CHOICE, choices=choices, param=param)
        texts = {
            kinds.JSON_SCHEMA: self.json_,
            kinds.REGEX: self.regex,
            kinds.GRAMMAR: self.grammar,
            kinds.JSON_OBJECT: self.json_object and "",
        }
        [(kind, text)] = [(kind, text) for kind, text in texts.items() if text is not None]
        return StructuredOutput(kind=kind, text=text, param=param)

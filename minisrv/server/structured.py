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
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PlainValidator, model_validator

from minisrv.request import MAX_CHOICES, MAX_GRAMMAR_LENGTH, StructuredOutput, StructuredOutputKind
from minisrv.server.strict import Strict, Text, refuse


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
GrammarText: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_LENGTH)]


class JsonSchema(Strict):
    """A schema with its name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """Ignored, as is the description: the model sees neither."""
    description: Text | None = None
    """Ignored."""
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None
    """The schema is kept in any case, and objects hold only what it declares."""


class ResponseFormat(Strict):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    """With type json_schema."""

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refuse(
                "json_schema", 'json_schema is needed with type "json_schema", and only there.'
            )
        return self

    def as_spec(self) -> StructuredOutput | None:
        """Return what the engine is asked for; None for any text. Raises RequestError for a schema
        that is too large."""
        if self.type == "text":
            return None
        text = "" if self.json_schema is None else self.json_schema.schema_
        return StructuredOutput(
            kind=StructuredOutputKind(self.type), text=text, param="response_format"
        )


class StructuredOutputs(Strict):
    """What the text must be: exactly one of these."""

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    """JSON that follows this schema, an object or its text."""
    regex: GrammarText | None = None
    """What this regular expression (Rust's syntax) matches from end to end."""
    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    """One of these texts."""
    grammar: GrammarText | None = None
    """What this grammar (Lark, in llguidance's dialect) describes."""
    json_object: Literal[True] | None = None
    """Any JSON object."""

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("must hold exactly one of json, regex, choice, grammar, json_object")
        return self

    def as_spec(self) -> StructuredOutput:
        """Return what the engine is asked for. Raises RequestError for what is too large."""
        kinds = StructuredOutputKind
        if self.choice is not None:
            choices = tuple(self.choice)
            return StructuredOutput(kind=kinds.CHOICE, choices=choices, param="structured_outputs")
        texts = {
            kinds.JSON_SCHEMA: self.json_,
            kinds.REGEX: self.regex,
            kinds.GRAMMAR: self.grammar,
            kinds.JSON_OBJECT: self.json_object and "",
        }
        [(kind, text)] = [(kind, text) for kind, text in texts.items() if text is not None]
        return StructuredOutput(kind=kind, text=text, param="structured_outputs")

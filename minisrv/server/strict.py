"""The base classes of every JSON object in a request: strict types, and no field that is ignored,
except in objects of earlier answers that clients send back.

Knows: pydantic. Knows no field.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError

from minisrv.server.unsupported import is_neutral, refusal

MAX_TEXT = 1 << 24
"""Maximum number of characters of one text; the limit on the body's bytes is reached first."""

ShortText: TypeAlias = Annotated[str, Field(max_length=512)]
Text: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT)]


def refuse(field: str, message: str) -> PydanticCustomError:
    """Return a validation error of the model that `field` belongs to."""
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


def at_most(count: int) -> BeforeValidator:
    """Return a validator that refuses an object of more than `count` members before any member is
    validated, as each of them may be wrong."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            limits = {"field_type": "Object", "max_length": count, "actual_length": len(value)}
            raise PydanticKnownError("too_long", limits)
        return value

    return BeforeValidator(check)


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a field that may also be null."""
    about = {"title", "description", "default"}
    values = {name: value for name, value in field.items() if name not in about}
    either = values.pop("anyOf", None) if values.keys() == {"anyOf"} else [values]
    null = {"type": "null"}
    kept = {name: value for name, value in field.items() if name in about}
    return {"anyOf": either if null in either else [*either, null], **kept}


class Strict(BaseModel):
    """A JSON object with strict types and no unknown fields, in which null equals absent."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
    )
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    _names: ClassVar[frozenset[str]]
    """Names of the fields, as clients write them."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        cls._names = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the JSON schema of what is accepted: null where a field may be absent, under any
        name, and for fields that are not supported the values that ask for nothing."""
        schema = handler(core_schema)
        own = handler.resolve_ref_schema(schema)
        for name, field in own["properties"].items():
            if name not in own.get("required", ()):
                own["properties"][name] = _or_null(field)
        if cls.model_config["extra"] == "forbid":
            own["additionalProperties"] = {"type": "null"}
        for name, neutral in cls.unsupported.items():
            own["properties"][name] = {
                "enum": [*neutral, None],
                "description": "Not supported: these values ask for nothing.",
            }
        return schema

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_asked_for(cls, data: Any) -> Any:
        """Drop fields that ask for nothing, refuse fields that are not supported, and of unknown
        fields keep only the first, as pydantic would make an error of each."""
        if not isinstance(data, dict):
            return data
        kept = {}
        knows_all = True
        for name, value in data.items():
            if value is None:
                continue
            if name in cls._names:
                kept[name] = value
            elif name in cls.unsupported:
                if not is_neutral(value, cls.unsupported[name]):
                    raise refuse(name, refusal(name, cls.unsupported[name]))
            elif knows_all:
                knows_all = False
                kept[name] = value
        return kept


class RequestBody(Strict):
    """The body of a request."""

    _num_bytes: int = PrivateAttr(default=0)

    @classmethod
    @cache  # every request asks for them
    def required_fields(cls) -> frozenset[str]:
        """Return the names of the fields that every body of this kind has."""
        return frozenset(name for name, field in cls.model_fields.items() if field.is_required())

    @property
    def num_bytes(self) -> int:
        """Size of the body in bytes, as it was sent; 0 if it did not come from a client."""
        return self._num_bytes

    def with_num_bytes(self, num_bytes: int) -> Self:
        """Set the size of the body in bytes, as it was sent, and return the body."""
        self._num_bytes = num_bytes
        return self


class HistoryObject(Strict):
    """A JSON object of a chat's history, which clients send back as some server gave it to them.

    Unknown fields are ignored: servers add fields to their answers, and clients add fields of their
    own. Fields that hold something that the model would have to see are known, and refused by name.
    """

    model_config = ConfigDict(extra="ignore")

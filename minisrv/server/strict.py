"""What every JSON object of a request has in common: strict types, and no field that is ignored.

Knows: pydantic. Knows no field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from minisrv.server.unsupported import asks_for_nothing, refusal

MAX_TEXT = 1 << 24
"""Characters of one text; the limit on the body's bytes bites first."""

ShortText: TypeAlias = Annotated[str, Field(max_length=512)]
Text: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT)]


def refuse(field: str, message: str) -> PydanticCustomError:
    """A validation error of the model that `field` belongs to."""
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


class Strict(BaseModel):
    """A JSON object: strict types, no unknown fields, null equals absent."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
    )
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if name not in cls.unsupported:
                kept[name] = value
            elif not asks_for_nothing(value, cls.unsupported[name]):
                raise refuse(name, refusal(name, cls.unsupported[name]))
        return kept

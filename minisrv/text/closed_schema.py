"""Closes JSON schemas: their objects may hold the properties that they declare and no others.

JSON Schema lets an object have any property beside those that are declared, and a model that may
write others now and then does: `{"sum": 17, ": ": 17}`. OpenAI demands `additionalProperties:
false` of strict schemas; xgrammar (the default of vLLM and SGLang), llama.cpp and guidance assume
it for each. So it is here: a schema that declares properties and does not say whether there may be
others is closed. A schema that does say so (`additionalProperties`) is kept, and so is one that
declares nothing.

An object that is composed (allOf, $ref beside other keywords) may have what all of its parts
declare, as with JSON Schema's `unevaluatedProperties: false`, which llguidance does not know. Each
alternative of anyOf and oneOf is closed by itself.

Knows: JSON Schema's keywords. Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

MAX_COPIES = 100
"""Maximum number of copies of definitions, which are made where a definition is part of several
composed objects."""

MAX_NAMES = 50_000
"""Maximum number of properties that all objects of a schema may have together."""

_TOO_MANY = "its allOf, anyOf and $ref put objects together in too many ways"
_COPY = "closed-definition-"
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("prefixItems",)
_ONES = ("additionalProperties", "items", "contains")
_ALTERNATIVES = ("anyOf", "oneOf")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with its objects closed. What is not a valid schema stays as it is.

    Raises ValueError if it is nested too deeply, or composed in too many ways.
    """
    closer = _Closer(schema)
    try:
        result: dict[str, Any] = closer.close(schema, _Declared())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if closer.copies:
        _add(result, "$defs", dict(closer.copies.values()))
    return result


@dataclass(frozen=True)
class _Declared:
    """The properties of an object that some parts of a schema declare.

    names: the names that are declared, in order.
    patterns: the patterns for names that are declared, in order.
    open: whether any other properties are allowed expressly.
    """

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    open: bool = False

    @classmethod
    def of_all(cls, parts: Iterable[_Declared]) -> _Declared:
        """Combine the declarations of several parts."""
        found = tuple(parts)
        return cls(
            tuple(dict.fromkeys(name for part in found for name in part.names)),
            tuple(dict.fromkeys(pattern for part in found for pattern in part.patterns)),
            any(part.open for part in found),
        )


class _Closer:
    """Closes the parts of one schema.

    copies: new definitions with their names, for each `$ref` to a schema that is part of a composed
        object; by pointer and what the other parts declare.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self.copies: dict[object, tuple[str, Any]] = {}
        self._num_names = 0

    def close(self, schema: Any, others: _Declared) -> Any:
        """Return `schema`, closed.

        others: what other schemas that apply to the same object declare.
        """
        if not isinstance(schema, dict):
            return schema
        pieces = self._pieces(schema)

        def beside(key: str, number: int = 0) -> _Declared:
            """Return what is declared for the same object by all pieces but one."""
            rest = (declared for place, declared in pieces.items() if place != (key, number))
            return _Declared.of_all([others, *rest])

        result: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _MAPS and isinstance(value, dict):
                result[key] = {name: self.close(one, _Declared()) for name, one in value.items()}
            elif key in _LISTS and isinstance(value, list):
                result[key] = [self.close(one, _Declared()) for one in value]
            elif key in _ONES:
                result[key] = self.close(value, _Declared())
            elif key == "allOf" and isinstance(value, list):
                result[key] = [self.close(one, beside(key, i)) for i, one in enumerate(value)]
            elif key in _ALTERNATIVES and isinstance(value, list):
                result[key] = [self.close(one, beside(key)) for one in value]
            elif key == "$ref" and isinstance(value, str):
                result[key] = self._reference(value, beside(key))
            else:
                result[key] = value
        allowed = _Declared.of_all([*pieces.values(), others])
        if _leaves_open(schema) and not allowed.open:
            self._close_here(result, allowed)
        return result

    def _close_here(self, schema: dict[str, Any], allowed: _Declared) -> None:
        """Close this schema, and allow in it what other parts declare; those parts describe the
        values."""
        self._num_names += len(allowed.names) + len(allowed.patterns)
        if self._num_names > MAX_NAMES:
            raise ValueError(_TOO_MANY)
        _add(schema, "properties", dict.fromkeys(allowed.names, True))
        _add(schema, "patternProperties", dict.fromkeys(allowed.patterns, True))
        schema["additionalProperties"] = False

    def _pieces(
        self, schema: dict[str, Any], seen: set[str] | None = None
    ) -> dict[tuple[str, int], _Declared]:
        """Return what the parts of a schema that apply to the same object declare, by keyword and
        number.

        seen: pointers that have been followed already, and need not be followed again.
        """
        seen = set() if seen is None else seen
        pieces = {("own", 0): _own(schema)}
        for number, one in enumerate(_list(schema, "allOf")):
            pieces["allOf", number] = self._declared(one, seen)
        for key in _ALTERNATIVES:
            found = [self._declared(one, seen) for one in _list(schema, key)]
            pieces[key, 0] = _Declared.of_all(found)
        pointer = schema.get("$ref")
        if isinstance(pointer, str) and pointer not in seen:
            seen.add(pointer)
            target = self._target(pointer)
            # A schema that cannot be found may declare anything.
            declared = _Declared(open=True) if target is None else self._declared(target, seen)
            pieces["$ref", 0] = declared
        return pieces

    def _declared(self, schema: Any, seen: set[str]) -> _Declared:
        if not isinstance(schema, dict):
            return _Declared()
        return _Declared.of_all(self._pieces(schema, seen).values())

    def _reference(self, pointer: str, others: _Declared) -> str:
        """Return a pointer to the same schema, closed beside the others."""
        target = self._target(pointer)
        if target is None:
            return pointer
        if others == _Declared() and (pointer == "#" or pointer.split("/")[1] in _MAPS):
            return pointer  # it is closed where it stands
        key = (pointer, frozenset(others.names), frozenset(others.patterns), others.open)
        if key not in self.copies:
            if len(self.copies) == MAX_COPIES:
                raise ValueError(_TOO_MANY)
            name = f"{_COPY}{len(self.copies)}"
            self.copies[key] = name, None  # reserves the name, as it may refer to itself
            self.copies[key] = name, self.close(target, others)
        return f"#/$defs/{self.copies[key][0]}"

    def _target(self, pointer: str) -> Any:
        """Return the schema that a pointer leads to; None if there is none."""
        if pointer != "#" and not pointer.startswith("#/"):
            return None
        place: Any = self._root
        for part in pointer.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(place, dict):
                place = place.get(name)
            elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
                place = place[int(name)]
            else:
                return None
        return place


def _add(schema: dict[str, Any], key: str, more: Mapping[str, Any]) -> None:
    """Add the entries that are missing to the object under `key`, if it is one."""
    known = schema.get(key, {})
    if more and isinstance(known, dict):
        schema[key] = {**known, **{name: one for name, one in more.items() if name not in known}}


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _own(schema: dict[str, Any]) -> _Declared:
    """Return what a schema itself declares; a property that it requires counts as declared."""
    names, patterns = schema.get("properties"), schema.get("patternProperties")
    required = [name for name in _list(schema, "required") if isinstance(name, str)]
    return _Declared(
        tuple(dict.fromkeys([*(names if isinstance(names, dict) else ()), *required])),
        tuple(patterns if isinstance(patterns, dict) else ()),
        schema.get("additionalProperties", False) is not False,
    )


def _leaves_open(schema: dict[str, Any]) -> bool:
    """Whether a schema declares properties, and does not say whether there may be others."""
    is_settled = "additionalProperties" in schema or "unevaluatedProperties" in schema
    declares = any(isinstance(schema.get(key), dict) for key in ("properties", "patternProperties"))
    return declares and not is_settled

"""Rewrites a JSON schema so that llguidance keeps its meaning: what llguidance would round, or
could not finish, is expressed otherwise, or refused by name.

Three things of a schema would come out wrong, or end in the middle of a text, if llguidance read
them as they are written:

- Numbers are rounded (`text.json_numbers`).
- A pattern for property names is offered even if declared properties have used up all names that it
  matches: a comma is allowed, and then nothing can follow. A pattern that matches only names which
  the schema declares somewhere is expressed as properties of these names. Any other pattern always
  has a name left.
- A definition that requires itself has no document that ends. Where it may be left out, it is.
  Where it may not, no text satisfies the schema.

Knows: JSON Schema's keywords, and how llguidance reads them. Knows nothing of tokens or masks.
"""

from __future__ import annotations

import decimal
import functools
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, TypeAlias
from urllib.parse import unquote

import llguidance
import numpy as np

from minisrv.text.json_numbers import EXACT, is_number, plain, restate_numbers

Schema: TypeAlias = Any
"""A schema: an object of keywords, a boolean, or anything else, which llguidance refuses."""

_MAX_NAME_BYTES = 100
"""Maximum number of bytes, in JSON, of a property name that is searched for."""
_MAX_TRIED_BYTES = 5000
"""Maximum number of bytes that are tried for all names of one pattern, which takes a tenth of a
second."""
_PATTERN_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=50_000, step_lexer_fuel=10_000, verbose_errors=False
)

_ANNOTATIONS = ("default", "example", "examples")
"""Keywords that may hold any value, and restrict nothing."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords that hold schemas by name. Other keywords that hold objects hold a schema or a list of
schemas; unknown keywords may do so for a `$ref`."""


_LARK = re.compile(
    r"""
    "(?:\\.|[^"\\])*"         # what may hold anything: strings,
    | /(?:\\.|[^/\\])+/       # regular expressions,
    | (?:\#|//)[^\n]*         # and comments
    | %json\s*(?P<schema>\{)
    """,
    re.VERBOSE | re.DOTALL,
)
_decode = json.JSONDecoder(parse_float=Decimal).raw_decode


def parse_schema(text: str) -> dict[str, Any]:
    """Parse a schema, keeping its numbers as they are written: those with a fraction or an exponent
    become Decimal. Raises ValueError for text that is not a schema."""
    text = text.strip(" \t\r\n")
    schema, end = _parse(text, 0)
    if end != len(text):
        raise ValueError(f"there is more behind its end, at character {end}")
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    return schema


def _parse(text: str, start: int) -> tuple[Any, int]:
    """Parse the JSON that begins at `start`; return it and its end."""
    try:
        return _decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except decimal.InvalidOperation:
        raise ValueError("an exponent of a number is out of range") from None


def restate(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema in the form that llguidance keeps; see the module. The result can be written
    as JSON.

    schema: as `parse_schema` returns it; it is not changed.

    Raises ValueError for a number that cannot be kept, and if no text satisfies the schema.
    """
    try:
        declared = frozenset(name for part in _parts(schema) for name in _declared(part))

        def restate_part(part: dict[str, Any]) -> Schema:
            restate_numbers(part)
            _restate_patterns(part, declared)
            _check_forbidden_names(part)
            return part

        restated: dict[str, Any] = _map_schemas(schema, restate_part)
        finite = _Finite(restated)
        if not finite(restated):
            raise ValueError("no text satisfies it, as it needs itself within itself")

        def end_part(part: dict[str, Any]) -> Schema:
            _check_forbidden_names(part)
            return part if finite.ends(part) else False

        if finite.all:
            return restated
        ends: dict[str, Any] = _map_schemas(restated, end_part)
        return ends
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def restate_lark(text: str) -> str:
    """Return a grammar in Lark with its schemas, each of which follows a `%json`, rewritten by
    `restate`. Raises ValueError as `parse_schema` and `restate` do."""
    pieces = []
    done = 0
    at = _LARK.search(text)
    while at is not None:
        end = at.end()
        if at["schema"]:
            start = at.start("schema")
            schema, end = _parse(text, start)
            pieces += [text[done:start], json.dumps(restate(schema))]
            done = end
        at = _LARK.search(text, end)
    return "".join([*pieces, text[done:]])


def _map_schemas(schema: Schema, change: Callable[[dict[str, Any]], Schema]) -> Schema:
    """Return a schema with `change` applied to all schemas that it holds, the inner ones first, and
    without annotations."""
    if isinstance(schema, list):
        return [_map_schemas(part, change) for part in schema]
    if not isinstance(schema, dict):
        return plain(schema) if is_number(schema) else schema
    changed = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
    for key, value in changed.items():
        if key in _NAMED and isinstance(value, dict):
            changed[key] = {name: _map_schemas(part, change) for name, part in value.items()}
        elif isinstance(value, dict | list) and key not in EXACT:
            changed[key] = _map_schemas(value, change)
    return change(changed)


def _parts(schema: Schema) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas that it holds, in no particular order."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in _NAMED and isinstance(value, dict):
                    left += value.values()
                elif isinstance(value, dict | list) and key not in (*EXACT, *_ANNOTATIONS):
                    left.append(value)


# ---- names ---------------------------------------------------------------------------------------


def _declared(schema: dict[str, Any]) -> list[str]:
    """Return the names of properties that a schema declares or requires."""
    properties = schema.get("properties")
    names = list(properties) if isinstance(properties, dict) else []
    return names + [name for name in _listed(schema, "required") if isinstance(name, str)]


def _restate_patterns(schema: dict[str, Any], declared: frozenset[str]) -> None:
    """Express patterns whose names are all declared, here or elsewhere in the schema, as
    properties.

    If the number of properties is limited, llguidance wants every property to be required: a
    pattern then stays if one of its names is not declared here.
    """
    patterns = schema.get("patternProperties")
    properties = schema.get("properties", {})
    if not isinstance(patterns, dict) or not isinstance(properties, dict) or not declared:
        return
    if "minProperties" in schema or "maxProperties" in schema:
        declared = frozenset(_declared(schema))
    properties, left = dict(properties), dict(patterns)
    for pattern, value in patterns.items():
        names = _names_within(pattern, declared)
        if names is None:
            continue
        del left[pattern]
        for name in sorted(names):
            both = [properties[name], value] if name in properties else [value]
            properties[name] = {"allOf": both} if both[1:] else value
    schema["properties"], schema["patternProperties"] = properties, left


def _check_forbidden_names(schema: dict[str, Any]) -> None:
    """Raise ValueError if names of a pattern are forbidden and other names are not. llguidance
    would notice only when such a name has been written, and then let it go on for ever."""
    patterns = schema.get("patternProperties")
    if schema.get("additionalProperties") is False or not isinstance(patterns, dict):
        return
    forbidden = next((pattern for pattern, value in patterns.items() if value is False), None)
    if forbidden is not None:
        raise ValueError(
            f"patternProperties: that no value is allowed for names that match {forbidden!r} can "
            "be kept only with additionalProperties: false"
        )


def _names_within(pattern: str, names: frozenset[str]) -> set[str] | None:
    """Return the names that a regular expression of `patternProperties` matches, as llguidance
    reads it. None if it matches any name outside of `names`, or cannot be read, or takes too long
    to examine."""
    grammar = {"grammars": [{"json_schema": {"type": "string", "pattern": pattern}}]}
    text = json.dumps(grammar)
    matcher = llguidance.LLMatcher(_bytes(), text, log_level=0, limits=_PATTERN_LIMITS)
    found: set[str] = set()
    name = bytearray()
    left = [_next_bytes(matcher)]
    """For the start and for each byte of `name`: the bytes that may follow and are still to be
    tried."""
    tried = 0
    while left and not matcher.is_error():
        if not left[-1]:
            left.pop()
            if name:
                name.pop()
                matcher.rollback(1)
            continue
        tried += 1
        name.append(left[-1].pop())
        matcher.consume_token(name[-1])
        left.append([])
        if matcher.is_accepting():  # the closing quotation mark was read
            found.add(json.loads(name))
        elif len(name) < _MAX_NAME_BYTES:
            left[-1] = _next_bytes(matcher)
        else:
            return None
        if tried > _MAX_TRIED_BYTES or not found <= names:
            return None
    return None if matcher.is_error() else found


@functools.cache
def _bytes() -> llguidance.LLTokenizer:
    """Return a tokenizer whose tokens are the 256 bytes and a few special ones."""
    return llguidance.LLTokenizer("byte")


def _next_bytes(matcher: llguidance.LLMatcher) -> list[int]:
    """Return the bytes that may come next, the quotation mark that ends a string last."""
    row = np.zeros((_bytes().vocab_size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    found = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    return sorted((byte for byte in found if byte < 256), key=lambda byte: byte == ord('"'))


# ---- recursion -----------------------------------------------------------------------------------


class _Finite:
    """Tells whether some finite document satisfies a schema, as far as its references decide
    that."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._finite: set[str] = set()
        self._targets = {}
        for part in _parts(root):
            reference = part.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#"):
                continue
            try:
                self._targets[reference] = _target(root, reference)
            except (LookupError, TypeError, ValueError):
                continue  # llguidance reports that it does not exist
        # Repeat until no more references are found to be finite, as each may make others finite.
        # Passes alternate in direction, as definitions mostly refer to those behind them or to
        # those before them.
        left = [*self._targets]
        while left:
            still = []
            for reference in reversed(left):
                if self(self._targets[reference]):
                    self._finite.add(reference)
                else:
                    still.append(reference)
            if len(still) == len(left):
                break
            left = still

    @property
    def all(self) -> bool:
        """Whether every schema that is referred to has a finite document."""
        return self._finite == self._targets.keys()

    def ends(self, schema: dict[str, Any]) -> bool:
        """Whether a schema does not refer to one without a finite document."""
        reference = schema.get("$ref")
        return not isinstance(reference, str) or (
            reference in self._finite or reference not in self._targets
        )

    def __call__(self, schema: Schema) -> bool:
        if not isinstance(schema, dict):
            return True  # or no document satisfies it, which llguidance finds
        if not self.ends(schema):
            return False
        if "const" in schema or "enum" in schema:
            return True
        if not all(map(self, _listed(schema, "allOf"))):
            return False
        for key in ("anyOf", "oneOf"):
            choices = _listed(schema, key)
            if choices and not any(map(self, choices)):
                return False
        types = schema.get("type")
        types = types if isinstance(types, list) else [types]
        return any(self._of_type(schema, kind) for kind in types)

    def _of_type(self, schema: dict[str, Any], kind: Any) -> bool:
        if kind == "object":
            properties = schema.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            required = (name for name in _listed(schema, "required") if isinstance(name, str))
            return all(self(properties.get(name, True)) for name in required)
        if kind == "array":
            least = schema.get("minItems", 0)
            least = least if isinstance(least, int) else 0
            first = _listed(schema, "prefixItems") or _listed(schema, "items")
            others = schema.get("additionalItems" if "items" in schema and first else "items", True)
            others = others if not isinstance(others, list) else True
            return all(map(self, first[:least])) and (least <= len(first) or self(others))
        return True


def _listed(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _target(root: dict[str, Any], reference: str) -> Schema:
    """Return what a JSON pointer in a fragment (RFC 6901) points to. Raises LookupError, TypeError
    or ValueError if it points to nothing."""
    _, *steps = unquote(reference[1:]).split("/")
    if reference != "#" and not reference.startswith("#/"):
        raise LookupError(reference)  # an anchor
    found: Any = root
    for step in steps:
        key = step.replace("~1", "/").replace("~0", "~")
        found = found[int(key) if isinstance(found, list) else key]
    return found

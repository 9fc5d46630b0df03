"""A JSON schema in words that llguidance keeps: what it would round, or could not finish, is said
otherwise, or refused by name.

Three things of a schema would come out wrong, or end in the middle, if llguidance read them as they
are written:

- Numbers are rounded (`text.json_numbers`).
- A pattern for names is offered although declared properties have taken all names that it matches:
  a comma is allowed, and then nothing. A pattern that matches no name but such as the schema
  declares somewhere is said as properties of these names. Every other pattern has a name left.
- A definition that cannot do without itself has no document that ends. Where it may be left out, it
  is. Where it may not, no text satisfies the schema.

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
"""An object of keywords, or a boolean; or something else, which llguidance refuses."""

_MAX_NAME_BYTES = 100
"""Of a name that is looked for, in JSON."""
_MAX_TRIED_BYTES = 5000
"""Of all names of a pattern; a tenth of a second."""
_PATTERN_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=50_000, step_lexer_fuel=10_000, verbose_errors=False
)

_ANNOTATIONS = ("default", "example", "examples")
"""Keywords that hold anything, and ask for nothing."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords that hold schemas by name. Others hold a schema or a list of them, if they hold objects:
those that are unknown may do so for a `$ref`."""


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
    """A schema with its numbers as they are written: those with a fraction or an exponent are
    Decimal. Raises ValueError for what is no schema."""
    text = text.strip(" \t\r\n")
    schema, end = _parse(text, 0)
    if end != len(text):
        raise ValueError(f"there is more behind its end, at character {end}")
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    return schema


def _parse(text: str, start: int) -> tuple[Any, int]:
    """The JSON from `start` on, and its end."""
    try:
        return _decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except decimal.InvalidOperation:
        raise ValueError("an exponent of a number is out of range") from None


def restate(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as llguidance keeps it; see the module. It can be written as JSON.

    schema: as `parse_schema` gives it. Not changed.

    Raises ValueError for a number that cannot be kept, and where no text satisfies the schema.
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
    """A grammar in Lark whose schemas, each behind a `%json`, are restated. Raises ValueError as
    `parse_schema` and `restate` do."""
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
    """A schema with all that it holds changed, the inner ones first; without annotations."""
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
    """A schema and all that it holds, in no order."""
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
    """The names of properties that a schema knows."""
    properties = schema.get("properties")
    names = list(properties) if isinstance(properties, dict) else []
    return names + [name for name in _listed(schema, "required") if isinstance(name, str)]


def _restate_patterns(schema: dict[str, Any], declared: frozenset[str]) -> None:
    """Say patterns whose names are all declared, here or elsewhere, as properties.

    Where members are counted, llguidance wants every property to be required: there a pattern
    stays if one of its names is not declared here.
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
    """Raise ValueError where names of a pattern are forbidden and others are not. llguidance would
    find out when such a name is written, and let it go on for ever."""
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
    """The names that a regular expression of `patternProperties` matches, as llguidance reads it.
    None if it matches any but `names`, or cannot be read, or is too much to be looked at."""
    grammar = {"grammars": [{"json_schema": {"type": "string", "pattern": pattern}}]}
    text = json.dumps(grammar)
    matcher = llguidance.LLMatcher(_bytes(), text, log_level=0, limits=_PATTERN_LIMITS)
    found: set[str] = set()
    name = bytearray()
    left = [_next_bytes(matcher)]
    """Behind each byte of `name`, and before the first, the bytes that are still to be tried."""
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
        if matcher.is_accepting():  # behind the quotation mark
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
    """A tokenizer whose tokens are the 256 bytes, and a few special ones."""
    return llguidance.LLTokenizer("byte")


def _next_bytes(matcher: llguidance.LLMatcher) -> list[int]:
    """The bytes that may come next, the end of a string last."""
    row = np.zeros((_bytes().vocab_size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    found = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    return sorted((byte for byte in found if byte < 256), key=lambda byte: byte == ord('"'))


# ---- recursion -----------------------------------------------------------------------------------


class _Finite:
    """Whether some document that ends satisfies a schema, as far as its references decide that."""

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
                continue  # llguidance says that there is none
        # Of what is known to end, more follows, until no more does. Both directions, as
        # definitions mostly refer to those behind them or to those before them.
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
        """Whether everything that is referred to may end."""
        return self._finite == self._targets.keys()

    def ends(self, schema: dict[str, Any]) -> bool:
        """Whether it refers to nothing that has no end."""
        reference = schema.get("$ref")
        return not isinstance(reference, str) or (
            reference in self._finite or reference not in self._targets
        )

    def __call__(self, schema: Schema) -> bool:
        if not isinstance(schema, dict):
            return True  # or satisfied by nothing, which llguidance finds
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
    """What a JSON pointer in a fragment (RFC 6901) points to. Raises LookupError, TypeError or
    ValueError if it points to nothing."""
    _, *steps = unquote(reference[1:]).split("/")
    if reference != "#" and not reference.startswith("#/"):
        raise LookupError(reference)  # an anchor
    found: Any = root
    for step in steps:
        key = step.replace("~1", "/").replace("~0", "~")
        found = found[int(key) if isinstance(found, list) else key]
    return found

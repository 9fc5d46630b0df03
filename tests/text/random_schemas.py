"""JSON schemas drawn at random: nested, bounded and recursive ones, and odd ones, whose parts
conflict. The same arguments give the same schema.

Knows how long an answer may get (`longest`): models are known to go on for as long as they may, so
every string, array and object has a maximum size, and every number has a step, without which its
fraction may have any number of digits. Only recursion may go to any depth. Knows no tokenizer: a
token is assumed to have at least one byte.
"""

from __future__ import annotations

import json
import random
from typing import Any

_PATTERNS = [
    {"pattern": "^[a-z]{2,5}$", "maxLength": 5},
    {"pattern": "^(red|green)[0-9]*$", "maxLength": 8},
    {"pattern": "[0-9]{3}", "maxLength": 7},
    {"pattern": "^a[^b]*$", "maxLength": 9},
    {"pattern": r"^\d{4}-\d{2}$", "maxLength": 7},
]
_WORDS = ["alpha", "beta", 'quo"te', "back\\slash", "ünï", "日本", "new\nline", ""]
_NAME = 8
"""Maximum number of characters of a property name that the model may choose."""

_CHARACTER = 6
"""Maximum number of bytes of a character in JSON: the escape of a control character."""

_RECURSIVE = ("list", "tree")


def random_schema(seed: int, tokens: int = 1000) -> dict[str, Any]:
    """A schema of JSON Schema 2020-12 that some document satisfies. A document without recursion
    has at most `tokens` bytes, and so at most as many tokens."""
    rng = random.Random(seed)
    while longest(schema := _draw(rng)) > tokens:
        pass
    return schema


def recurses(schema: dict[str, Any]) -> bool:
    """Whether this random schema has documents of any depth."""
    used = json.dumps({**schema, "$defs": None})
    return any(f"#/$defs/{name}" in used for name in _RECURSIVE)


def longest(schema: dict[str, Any], defs: dict[str, Any] | None = None) -> int:
    """Maximum number of bytes of a document, with a space wherever JSON allows one; recursion is
    not followed.

    schema: a random schema, or a part of one.
    defs: its definitions, without those that the part lies in; None takes those of `schema`.
    """
    defs = schema.get("$defs", {}) if defs is None else defs
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        others = {other: schema for other, schema in defs.items() if other != name}
        return longest(defs[name], others) if name in defs else 0
    if "anyOf" in schema:
        return max(longest(choice, defs) for choice in schema["anyOf"])
    if "enum" in schema:
        return max(longest({"const": value}) for value in schema["enum"])
    if "const" in schema:
        text = json.dumps(schema["const"], ensure_ascii=False, separators=(" , ", " : "))
        escaped = text.replace(r"\n", r"\u000a")
        return len(escaped.encode()) + 2
    match schema["type"]:
        case "object":
            members = [
                len(name) + 2 + longest(value, defs) for name, value in schema["properties"].items()
            ]
            for value in schema.get("patternProperties", {}).values():
                more = schema["maxProperties"] - len(members)
                members += [_NAME + 2 + longest(value, defs)] * more
            return 4 + sum(members) + 6 * len(members)
        case "array" if "prefixItems" in schema:
            return 4 + sum(longest(item, defs) + 3 for item in schema["prefixItems"])
        case "array":
            return 4 + schema["maxItems"] * (longest(schema["items"], defs) + 3)
        case "string":
            return 2 + _CHARACTER * schema["maxLength"]
        case _:
            return 8


def _draw(rng: random.Random) -> dict[str, Any]:
    schema = _object(rng, depth=3)
    schema["$defs"] = {
        "leaf": _leaf(rng),
        "list": {
            "type": "object",
            "properties": {
                "value": _leaf(rng),
                "next": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]},
            },
            "required": ["value"],
            "additionalProperties": False,
        },
        "tree": {
            "type": "object",
            "properties": {
                "value": _leaf(rng),
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3},
            },
            "required": ["value"],
            "additionalProperties": False,
        },
    }
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0:
        return _leaf(rng)
    kind = rng.choice(["leaf", "object", "array", "tuple", "anyOf", "ref", "recursive"])
    if kind == "object":
        return _object(rng, depth - 1)
    if kind == "array":
        least = rng.randrange(3)
        return {
            "type": "array",
            "items": _any(rng, depth - 1),
            "minItems": least,
            "maxItems": least + rng.randrange(4),
        }
    if kind == "tuple":
        items = [_any(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if kind == "anyOf":
        return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}
    if kind == "ref":
        return {"$ref": "#/$defs/leaf"}
    if kind == "recursive":
        return {"$ref": f"#/$defs/{rng.choice(_RECURSIVE)}"}
    return _leaf(rng)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [f"key{i}" for i in range(rng.randrange(5))]
    schema = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }
    if rng.random() < 0.5:
        # llguidance limits the number of members only where every named property is required.
        schema["required"] = names
        schema["patternProperties"] = {f"^[a-z]{{1,{_NAME}}}$": _leaf(rng)}
        schema["maxProperties"] = len(names) + rng.randrange(1, 4)
    return schema


def _leaf(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(
        ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    )
    if kind == "string":
        least = rng.randrange(5)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(20)}
    if kind == "pattern":
        return {"type": "string", **rng.choice(_PATTERNS)}
    if kind == "integer":
        least = rng.randrange(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(5000)}
    if kind == "number":
        least = rng.randrange(-10, 10) + 0.5
        limits = {"exclusiveMinimum": least, "maximum": least + rng.randrange(1, 100)}
        return {"type": "number", **limits, "multipleOf": rng.choice([0.5, 0.25])}
    if kind == "enum":
        return {"enum": rng.sample([*_WORDS, 1, 2.5, None, True, [1, "x"], {"a": 1}], 4)}
    if kind == "const":
        return {"const": rng.choice(_WORDS)}
    return {"type": kind}


def odd_schema(seed: int) -> dict[str, Any]:
    """A schema of JSON Schema 2020-12 whose parts may rule each other out: patterns that match
    declared names, bounds with no number between them, definitions that never end. Some of these
    schemas have no document at all."""
    rng = random.Random(seed)
    schema = _odd_object(rng, depth=3)
    endless = {"type": "object", "properties": {"n": {"$ref": "#/$defs/endless"}}}
    schema["$defs"] = {
        "leaf": _odd_leaf(rng),
        "endless": {**endless, "required": ["n"]},
        "may end": {"anyOf": [{"$ref": "#/$defs/endless"}, _odd_leaf(rng)]},
    }
    return schema


def _odd_object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b", "ab", "c1"], rng.randrange(4))
    patterns = ["^a$", "^(a|b)$", "^a", "b", r"^c\d$", "^c1", "^[a-c]$"]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _odd(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.4],
        "additionalProperties": rng.choice([False, False, _odd_leaf(rng)]),
    }
    # Some value satisfies each of these, since a pattern that forbids names is refused beside
    # others.
    values = [{"const": "a"}, {"type": "integer", "maximum": 3}, {"maxLength": 1}, _object(rng, 0)]
    if rng.random() < 0.7:
        schema["patternProperties"] = {rng.choice(patterns): rng.choice(values)}
    if schema["additionalProperties"] is False and rng.random() < 0.4:
        more = {"patternProperties": {rng.choice(patterns): rng.choice(values)}}
        return {"allOf": [schema, more]}
    return schema


def _odd(rng: random.Random, depth: int) -> Any:
    if depth <= 0:
        return _odd_leaf(rng)
    match rng.choice(["object", "object", "array", "tuple", "anyOf", "ref", "leaf"]):
        case "object":
            return _odd_object(rng, depth)
        case "array":
            least = rng.randrange(2)
            items = _odd(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": 2}
        case "tuple":
            items = [_odd(rng, depth - 1) for _ in range(2)]
            least = rng.randrange(3)
            return {"type": "array", "prefixItems": items, "items": False, "minItems": least}
        case "anyOf":
            return {"anyOf": [_odd(rng, depth - 1) for _ in range(2)]}
        case "ref":
            return {"$ref": f"#/$defs/{rng.choice(['leaf', 'endless', 'may end'])}"}
        case _:
            return _odd_leaf(rng)


def _odd_leaf(rng: random.Random) -> Any:
    least = rng.randrange(-3, 9)
    bounds = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    number = dict(zip(bounds, (least, least + rng.randrange(4)), strict=True))
    # Only steps that doubles represent exactly, since jsonschema computes in doubles.
    step = {"multipleOf": rng.choice([1, 5, 7, 0.5, 2.5, 0.75])}
    string = {"type": "string", "maxLength": rng.randrange(3)}
    return rng.choice(
        [
            {"type": "integer", **number},
            {"type": ["integer", "null"], **number, **step},
            {"type": "integer", **number, **step},
            {"type": "number", **number, **step},
            {**string, "pattern": rng.choice(["^[ab]*$", "^ab$", "^a{3}$", "^$"])},
            {"enum": rng.sample(["a", "b", 1, 2.5, None, True], 3), "type": "string"},
            {"const": rng.choice(["a", 3, None, [], {}])},
            False,
        ]
    )

"""JSON schemas drawn at random: nested, bounded, recursive. The same seed gives the same schema."""

from __future__ import annotations

import random
from typing import Any

_PATTERNS = ["^[a-z]{2,5}$", "^(red|green)[0-9]*$", "[0-9]{3}", "^a[^b]*$", r"^\d{4}-\d{2}$"]
_WORDS = ["alpha", "beta", 'quo"te', "back\\slash", "ünï", "日本", "new\nline", ""]


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of JSON Schema 2020-12 that some document satisfies."""
    rng = random.Random(seed)
    schema = _object(rng, depth=3)
    schema["$defs"] = {
        "leaf": _leaf(rng),
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
        return {"$ref": "#/$defs/tree"}
    return _leaf(rng)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [f"key{i}" for i in range(rng.randrange(5))]
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": rng.choice([False, _leaf(rng)]),
    }


def _leaf(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(
        ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    )
    if kind == "string":
        least = rng.randrange(5)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(20)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind == "integer":
        least = rng.randrange(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(5000)}
    if kind == "number":
        return {"type": "number", "exclusiveMinimum": rng.randrange(-10, 10) + 0.5}
    if kind == "enum":
        return {"enum": rng.sample([*_WORDS, 1, 2.5, None, True, [1, "x"], {"a": 1}], 4)}
    if kind == "const":
        return {"const": rng.choice(_WORDS)}
    return {"type": kind}

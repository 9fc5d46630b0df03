"""Objects have only the properties that their schemas declare, as with `unevaluatedProperties:
false`, and a grammar lets nothing else through."""

from __future__ import annotations

import copy
import json
import re
from itertools import combinations
from typing import Any

import jsonschema
import pytest

from minisrv.checkpoint import resolve_checkpoint
from minisrv.request import StructuredOutput
from minisrv.request import StructuredOutputKind as Kind
from minisrv.server.structured import ResponseFormat
from minisrv.text.closed_schema import closed
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizer import tokenizer_of
from tests.text.walks import EOS, follow

INT = {"type": "integer"}
NAMES = ("a", "b", "c", "d", "z")
REST = {"additionalProperties": {"type": "integer"}}


def has(*names: str, **more: Any) -> dict[str, Any]:
    """A schema of objects with these integer properties."""
    return {"type": "object", "properties": dict.fromkeys(names, INT), **more}


def objects(*names: str) -> list[dict[str, int]]:
    """Objects with the properties that each of these strings names, one letter each."""
    return [dict.fromkeys(some, 1) for some in names]


PUT_TOGETHER: dict[str, dict[str, Any]] = {
    "alone": has("a", "b"),
    "patterns": {"type": "object", "patternProperties": {"^[ab]$": INT}},
    "nothing is declared": {"type": "object"},
    "no properties": has(),
    "open": has("a", additionalProperties=True),
    "the rest is described": has("a", **REST),
    "allOf": {"allOf": [has("a"), has("b", required=["b"])]},
    "allOf of one": {"allOf": [has("a")]},
    "allOf beside properties": has("a", allOf=[has("b"), {"allOf": [has("c")]}]),
    "allOf, one open": {"allOf": [has("a"), has("b", additionalProperties=True)]},
    "allOf beside what declares nothing": {"allOf": [{"minProperties": 1}, {"type": "object"}]},
    "anyOf": {
        "anyOf": [has("a", required=["a"]), has("b", required=["b"])],
        "expected": {"enum": objects("a", "b")},
    },
    "anyOf beside properties": has(
        "a",
        anyOf=[has("b", required=["b"]), has("c")],
        expected={"enum": objects("", "a", "b", "c", "ab", "ac")},
    ),
    "anyOf in allOf": {
        "allOf": [{"anyOf": [has("a", required=["a"]), has("b")]}, has("c")],
        "expected": {"enum": objects("", "a", "b", "c", "ac", "bc")},
    },
    "two alternatives": {
        "anyOf": [has("a"), has("b")],
        "allOf": [{"anyOf": [has("c"), has("d")]}],
        "expected": {"enum": objects("", "a", "b", "c", "d", "ac", "ad", "bc", "bd")},
    },
    "oneOf": {
        "oneOf": [
            has(properties={"a": INT, "b": INT}, required=["a"]),
            has(properties={"a": {"type": "string"}, "c": INT}, required=["a"]),
        ],
        "expected": {"enum": objects("a", "ab")},
    },
    "a reference": {"$ref": "#/$defs/x", "$defs": {"x": has("a", "b")}},
    "an escaped reference": {"$ref": "#/$defs/a~1%20b", "$defs": {"a/ b": has("a", "b")}},
    "a base": {
        "allOf": [{"$ref": "#/definitions/base"}, has("b")],
        "definitions": {"base": has("a", required=["a"])},
    },
    "a base of a base": {
        "allOf": [{"$ref": "#/$defs/middle"}, has("c")],
        "$defs": {"middle": {"allOf": [{"$ref": "#/$defs/base"}, has("b")]}, "base": has("a")},
    },
    "a reference beside properties": has("b", **{"$ref": "#/$defs/x", "$defs": {"x": has("a")}}),
    "a reference elsewhere": {"$ref": "#/components/x", "components": {"x": has("a")}},
    "a loop": {
        "$ref": "#/$defs/x",
        "$defs": {"x": has("a", allOf=[{"$ref": "#/$defs/y"}]), "y": {}},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(resolve_checkpoint(None))


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> GrammarBackend:
    return GrammarBackend(tokenizer, tokenizer.vocab_size, [EOS])


def instances() -> list[dict[str, int]]:
    """All objects with up to three of the names."""
    return [dict.fromkeys(some, 1) for n in range(4) for some in combinations(NAMES, n)]


def valid(schema: dict[str, Any], instance: object) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(instance)


@pytest.mark.parametrize("schema", PUT_TOGETHER.values(), ids=PUT_TOGETHER)
def test_an_object_holds_what_is_declared(
    backend: GrammarBackend, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    """`closed` and the grammar accept the same objects as jsonschema does with
    `unevaluatedProperties: false`, or as `expected` says."""
    before = copy.deepcopy(schema)
    expected = schema.pop("expected", None)
    if expected is None:
        declares = re.search('"(p|patternP)roperties"', json.dumps(schema))
        expected = {**schema, "unevaluatedProperties": False} if declares else schema
    spec = StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(schema))
    followed = 0
    for instance in instances():
        wanted = valid(expected, instance)
        assert valid(closed(schema), instance) == wanted, instance
        if wanted:
            followed += follow(backend, tokenizer, spec, json.dumps(instance))
        else:
            assert not follow(backend, tokenizer, spec, json.dumps(instance)), instance
    assert followed, "a grammar fixes the order of properties, so that not all can be followed"
    assert schema == {name: value for name, value in before.items() if name != "expected"}


@pytest.mark.parametrize("strict", [None, True])
def test_a_strict_schema_has_no_property_that_a_model_makes_up(
    backend: GrammarBackend, tokenizer: Tokenizer, strict: bool | None
) -> None:
    """Models make up properties such as ": " in objects that their schema leaves open."""
    schema = has("sum", required=["sum"])
    named = {"name": "s", "schema": schema, "strict": strict}
    form = ResponseFormat.model_validate({"type": "json_schema", "json_schema": named})
    spec = form.as_spec()
    assert spec is not None
    assert follow(backend, tokenizer, spec, '{"sum": 17}')
    assert not follow(backend, tokenizer, spec, '{"sum": 17, ": " :17, " or" :17}')
    assert not follow(backend, tokenizer, spec, '{": " :17, "sum": 17}')


def test_objects_within_objects_are_closed() -> None:
    """Schemas inside properties, items, definitions and additionalProperties are closed too, and
    unknown keywords are left alone."""
    inner = has("a")
    schema = has(
        more={"not": {"a": "keyword"}},
        properties={"x": inner, "y": {"type": "array", "items": inner, "prefixItems": [inner]}},
        additionalProperties=inner,
        **{"$defs": {"d": inner}},
    )
    found = closed(schema)
    shut = {**inner, "additionalProperties": False}
    assert found["properties"]["x"] == found["additionalProperties"] == found["$defs"]["d"] == shut
    assert found["properties"]["y"]["items"] == found["properties"]["y"]["prefixItems"][0] == shut
    assert found["more"] == schema["more"]


def test_values_are_no_schemas() -> None:
    """Objects inside enum, const, default and examples are values and are not changed."""
    value = has("a")
    schema = {"enum": [value], "const": value, "default": value, "examples": [value]}
    assert closed(schema) == schema
    assert closed(has("properties")) == has("properties", additionalProperties=False)


def test_a_definition_is_open_to_its_other_parts_only_where_it_has_any() -> None:
    """A definition allows the properties of the parts beside its reference only where there are
    such parts."""
    base = {"$ref": "#/$defs/base"}
    schema = has(
        properties={"x": base, "y": {"allOf": [base, has("b")]}}, **{"$defs": {"base": has("a")}}
    )
    shut = closed(schema)
    assert valid(shut, {"x": {"a": 1}, "y": {"a": 1, "b": 1}})
    assert not valid(shut, {"x": {"a": 1, "b": 1}})
    assert not valid(shut, {"y": {"a": 1, "b": 1, "c": 1}})


def test_what_is_required_is_declared() -> None:
    assert valid(closed(has("a", required=["a", "b"])), {"a": 1, "b": "x"})


def test_a_schema_that_refers_to_itself() -> None:
    node = has("value", required=["value"])
    node["properties"]["next"] = {"$ref": "#"}
    assert valid(closed(node), {"value": 1, "next": {"value": 2}})
    assert not valid(closed(node), {"value": 1, "next": {"value": 2, "z": 3}})
    tree = {"$defs": {"t": {"allOf": [{"$ref": "#/$defs/t"}, has("a")]}}, "$ref": "#/$defs/t"}
    assert "additionalProperties" in json.dumps(closed(tree))


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": 1, "required": 2, "allOf": 3, "$ref": 4, "$defs": 5, "items": 6},
        {"properties": {"a": 1}, "allOf": [1, None], "anyOf": {}, "$ref": "#/a/b", "required": [1]},
        {"$ref": "other.json#/x", "properties": {"a": True}},
        {"patternProperties": {}, "properties": 1, "required": ["a"]},
        {"$ref": "#anchor", "properties": {"a": True}, "$defs": {"x": {"$anchor": "anchor"}}},
    ],
)
def test_what_is_no_schema_that_can_be_followed_stays(schema: dict[str, Any]) -> None:
    """A malformed schema, or one whose references cannot be followed, raises no error and is not
    opened."""
    assert closed(schema).get("additionalProperties", False) is False


def test_too_many_ways_and_too_deep() -> None:
    """Each level of references could double the number of definitions, so their number and depth
    are limited."""
    definitions = {
        f"l{i}": {
            "anyOf": [
                {"allOf": [{"$ref": f"#/$defs/l{i + 1}"}, has(f"{letter}{i}")]} for letter in "pq"
            ]
        }
        for i in range(30)
    }
    schema = {"$ref": "#/$defs/l0", "$defs": {**definitions, "l30": has("end")}}
    with pytest.raises(ValueError, match="too many ways"):
        closed(schema)
    with pytest.raises(ValueError, match="too many ways"):
        closed({"allOf": [has(f"p{i}") for i in range(5000)]})
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(ValueError, match="too deeply"):
        closed(deep)

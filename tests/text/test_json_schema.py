"""Schemas that are restated for llguidance: the texts that they then allow are those that were
asked for."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import jsonschema
import pytest

from minisrv.checkpoint import resolve_checkpoint
from minisrv.errors import RequestError
from minisrv.request import StructuredOutput
from minisrv.request import StructuredOutputKind as Kind
from minisrv.text.json_schema import parse_schema, restate, restate_lark
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.text.random_schemas import odd_schema
from tests.text.tiny_tokenizer import tokenizer_of
from tests.text.walks import EOS, follow, walk


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(resolve_checkpoint(None))


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> GrammarBackend:
    return GrammarBackend(tokenizer, tokenizer.vocab_size, [EOS])


def restate_text(schema: str) -> dict[str, Any]:
    return restate(parse_schema(schema))


def spec_of(schema: str) -> StructuredOutput:
    return StructuredOutput(kind=Kind.JSON_SCHEMA, text=schema)


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_an_odd_schema_is_kept_to_the_end_or_refused_at_the_start(
    backend: GrammarBackend, tokenizer: Tokenizer, first: int
) -> None:
    """Each schema of `odd_schema` either gives valid documents only or is refused when it is
    compiled."""
    walked = 0
    for seed in range(first, first + 40):
        schema = odd_schema(seed)
        spec = spec_of(json.dumps(schema))
        try:
            backend.compile(spec)
        except RequestError:
            continue
        walked += 1
        for draw in range(4):
            document = json.loads(walk(backend, tokenizer, spec, random.Random(draw)))
            jsonschema.validate(document, schema, jsonschema.Draft202012Validator)
    assert walked >= 15


NOTE = {"type": "string", "maxLength": 20}
SCORE = {"type": "integer", "minimum": 0, "maximum": 9}
DECLARED = {
    "type": "object",
    "properties": {"note": NOTE, "score": SCORE},
    "required": ["note", "score"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "patterns",
    [
        {"^score$": {"type": "integer"}},
        {"^(score|note)$": {}},
        {"^scor[e]$": {"maximum": 5}, "^n(?:o)te$": {"minLength": 3}},
        {"^(?:s|sc)core$|^note$": {}},
        {"^note$": {"pattern": "^[ab]+$"}},
        {"^x": {"type": "null"}},
    ],
)
def test_nothing_is_offered_behind_the_last_property_but_what_can_follow(
    backend: GrammarBackend, tokenizer: Tokenizer, patterns: dict[str, Any]
) -> None:
    """A pattern that matches declared names adds to their schemas and offers no further
    property."""
    schema = {**DECLARED, "patternProperties": patterns}
    spec = spec_of(json.dumps(schema))
    for draw in range(10):
        document = json.loads(walk(backend, tokenizer, spec, random.Random(draw)))
        jsonschema.validate(document, schema, jsonschema.Draft202012Validator)


def test_a_pattern_that_is_left_is_still_a_pattern() -> None:
    """A pattern whose names are all declared moves into their properties, and other patterns
    stay."""
    patterns = {"^score$": {"maximum": 5}, "^x": {}, "^(score|note|z)$": {}}
    counted = {**DECLARED, "patternProperties": patterns, "maxProperties": 3}
    restated = restate_text(json.dumps(counted))
    assert restated["patternProperties"] == {"^x": {}, "^(score|note|z)$": {}}
    assert restated["properties"]["score"] == {"allOf": [SCORE, {"maximum": 5}]}


def test_a_pattern_of_very_many_or_long_names_is_left_as_it_is() -> None:
    names = [f"{i} name" for i in range(2000)]
    patterns = {f"^({'|'.join(names)})$": {}, "^n{90,}$": {}}
    schema = {"required": names, "patternProperties": patterns}
    assert restate_text(json.dumps(schema))["patternProperties"] == patterns


def test_a_name_that_is_required_elsewhere_counts_as_declared(
    backend: GrammarBackend, tokenizer: Tokenizer
) -> None:
    """A property that another part of an allOf requires is declared by a pattern that matches
    it."""
    schema = {
        "allOf": [
            {"type": "object", "required": ["score"]},
            {"patternProperties": {"^score$": SCORE}, "additionalProperties": False},
        ]
    }
    for draw in range(10):
        spec = spec_of(json.dumps(schema))
        document = json.loads(walk(backend, tokenizer, spec, random.Random(draw)))
        assert document.keys() == {"score"}


# ---- numbers -------------------------------------------------------------------------------------


def number_texts(seed: int, count: int) -> list[str]:
    """Numbers in JSON's notation, most of them at the limits of doubles and of 64-bit integers."""
    rng = random.Random(seed)
    found = []
    while len(found) < count:
        integer = rng.choice([10, 2**31, 2**53, 2**60, 2**63, 2**64, 10**22, 10**30])
        integer = rng.choice([-1, 1]) * (integer + rng.randrange(-3, 4))
        fraction = rng.choice(["", "", ".0", ".5", ".10", f".{rng.randrange(10**20)}"])
        exponent = rng.choice(["", "", "", "e0", "E-2", "e+3", "e-20"])
        found.append(f"{integer}{fraction}{exponent}")
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_number_comes_out_as_it_was_written_or_is_refused(
    backend: GrammarBackend, tokenizer: Tokenizer, seed: int
) -> None:
    """Constants keep their exact value, and only numbers that are large or have many digits are
    refused."""
    kept = 0
    refused = set()
    for number in number_texts(seed, 80):
        integer = Decimal(number) == Decimal(number).to_integral_value()
        for schema in (
            f'{{"const": {number}}}',
            f'{{"enum": ["x", {number}]}}',
            f'{{"const": [{{"a": {number}}}]}}',
            f'{{"type": "{"integer" if integer else "number"}", "enum": [{number}]}}',
        ):
            try:
                backend.compile(spec_of(schema))
            except RequestError:
                refused.add(number)
                continue
            kept += 1
            for draw in range(2):
                text = walk(backend, tokenizer, spec_of(schema), random.Random(draw))
                values = json.loads(text, parse_float=Decimal)
                while not isinstance(values, int | Decimal | str):
                    [values] = values.values() if isinstance(values, dict) else values
                assert values in ("x", Decimal(number))
    assert kept > 50
    assert all(abs(Decimal(number)) > 2**53 or len(number) > 15 for number in refused)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_within_its_bounds_is_within_those_that_were_written(
    backend: GrammarBackend, tokenizer: Tokenizer, seed: int
) -> None:
    """Bounds of any size and notation are kept exactly, or the schema is refused."""
    rng = random.Random(seed)
    walked = 0
    for low, high in zip(number_texts(seed, 60), number_texts(seed + 100, 60), strict=True):
        low, high = sorted((low, high), key=Decimal)
        kind = rng.choice(["integer", "number"])
        keys = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        least, most = keys if rng.random() < 0.7 else (keys[0], "maximum")
        schema = f'{{"type": "{kind}", "{least}": {low}, "{most}": {high}, "multipleOf": 1}}'
        try:
            backend.compile(spec_of(schema))
        except RequestError:
            continue
        walked += 1
        for draw in range(4):
            text = walk(backend, tokenizer, spec_of(schema), random.Random(draw))
            assert Decimal(low) <= Decimal(text) <= Decimal(high)
            assert Decimal(text) != Decimal(low) or least == "minimum"
            assert Decimal(text) != Decimal(high) or most == "maximum"
    assert walked > 20


@pytest.mark.parametrize("seed", range(3))
def test_a_double_comes_out_as_itself(
    backend: GrammarBackend, tokenizer: Tokenizer, seed: int
) -> None:
    """A double is kept exactly or refused: llguidance's reader turns one in ten of those with 16 or
    17 digits into another number."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(100):
        value = rng.uniform(-1, 1) * 10 ** rng.randrange(-8, 12)
        spec = spec_of(json.dumps({"const": value}))
        try:
            assert json.loads(walk(backend, tokenizer, spec, rng)) == value
        except RequestError:
            refused += 1
    assert refused < 20


INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
UINT64 = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}


@pytest.mark.parametrize("schema", [INT64, UINT64])
@pytest.mark.parametrize("value", [0, 1, 2**53 + 1, 2**62])
def test_integers_of_machines_are_integers(
    backend: GrammarBackend, tokenizer: Tokenizer, schema: dict[str, Any], value: int
) -> None:
    """The bounds of 64-bit integers, which doubles cannot represent, do not make integers fail."""
    assert follow(backend, tokenizer, spec_of(json.dumps(schema)), str(value))
    assert not follow(backend, tokenizer, spec_of(json.dumps(schema)), str(2**64))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"const": 12345678901234567890123}', "const: the number 12345678901234567890123 cannot"),
        ('{"properties": {"a": {"enum": [1, 1e400]}}}', "enum: the number 1E\\+400 cannot"),
        ('{"const": Infinity}', "const: the number Infinity cannot"),
        ('{"maximum": NaN}', "NaN is no number"),
        ('{"const": 1e99999999999999999999}', "exponent"),
        ('{"const": ' + "1" * 5000 + "}", "4300 digits"),
        ('{"type": "integer", "minimum": 1e19}', "minimum: 1E\\+19 leaves no integer"),
        ('{"minimum": 1e400}', "minimum: 1E\\+400 leaves no number"),
        ('{"type": "integer", "multipleOf": 1e-999999999}', "multipleOf: the number 1E-999999999"),
        ('{"multipleOf": 0}', "multipleOf: 0 is not allowed"),
        ('{"patternProperties": {"^x": false}}', "names that match '\\^x' can be kept only with"),
        ('{"type": "number"} {}', "more behind its end"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(schema: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        restate_text(schema)


def test_annotations_ask_for_nothing() -> None:
    """Keywords such as `default` and `examples` are dropped, whatever their values."""
    text = '{"type": "null", "default": 1e400, "examples": [12345678901234567890123]}'
    assert restate_text(text) == {"type": "null"}


def test_an_integer_is_a_multiple_of_one(backend: GrammarBackend, tokenizer: Tokenizer) -> None:
    """A step of 0.3 between -3 and -1 leaves no integer, so that the optional property never
    appears."""
    part = {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1, "multipleOf": 0.3}
    schema = {"type": "object", "properties": {"a": part, "b": {"const": 1}}}
    for draw in range(5):
        spec = spec_of(json.dumps({**schema, "additionalProperties": False}))
        text = walk(backend, tokenizer, spec, random.Random(draw))
        assert "a" not in json.loads(text)


# ---- recursion -----------------------------------------------------------------------------------


def definitions(**parts: Any) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{next(iter(parts))}", "$defs": parts}


def needs(name: str, **more: Any) -> dict[str, Any]:
    part = {"type": "object", "properties": {"n": {"$ref": name}}, "required": ["n"]}
    return {**part, "additionalProperties": False, **more}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        needs("#"),
        needs("#/properties/n"),
        definitions(a=needs("#/$defs/b"), b=needs("#/$defs/a")),
        definitions(a={"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a"}}),
        definitions(a={"type": "array", "minItems": 2, "prefixItems": [True, needs("#")]}),
        definitions(a={"anyOf": [needs("#/$defs/a"), {"$ref": "#/$defs/a"}]}),
        definitions(a={"allOf": [{"type": "object"}, needs("#/$defs/a")]}),
        {**needs("#/components/~1a%20~0"), "components": {"/a ~": needs("#")}},
    ],
)
def test_what_has_no_end_is_refused(schema: dict[str, Any]) -> None:
    """A schema whose documents would be infinite is refused."""
    with pytest.raises(ValueError, match="no text satisfies it"):
        restate_text(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "properties": {"n": needs("#/properties/n"), "a": {"const": 1}},
            "additionalProperties": False,
        },
        definitions(a={"anyOf": [needs("#/$defs/a"), {"const": 1}]}),
        definitions(a={"type": "array", "items": needs("#/$defs/a/items")}),
        definitions(a=needs("#/$defs/b"), b=needs("#/$defs/b", type=["object", "null"])),
    ],
)
def test_what_may_end_ends(
    backend: GrammarBackend, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    """A recursion that may end gives valid documents."""
    spec = spec_of(json.dumps(schema))
    for draw in range(10):
        document = json.loads(walk(backend, tokenizer, spec, random.Random(draw)))
        jsonschema.validate(document, schema, jsonschema.Draft202012Validator)


def test_what_nothing_satisfies_is_refused_for_what_it_is(backend: GrammarBackend) -> None:
    """If the cause is no recursion, the error of llguidance is passed on."""
    nothing = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    with pytest.raises(RequestError, match="required property 'a' is unsatisfiable"):
        backend.compile(spec_of(json.dumps(nothing)))


# ---- Lark ----------------------------------------------------------------------------------------


def test_the_schemas_of_a_grammar_are_restated_and_nothing_else() -> None:
    """In a Lark grammar, schemas after %json are restated, but not what looks like one in strings,
    regular expressions and comments."""
    inside = r'start: "%json {\"const\": 1.50}" /%json {"const": 1.50}/ // %json {"const": 1.50}'
    text = f'{inside}\n  | %json {{"const": 1.50}} "x" | %json\n{{"enum": ["}}", 2.0]}} # %json {{'
    expected = f'{inside}\n  | %json {{"const": 1.5}} "x" | %json\n{{"enum": ["}}", 2]}} # %json {{'
    assert restate_lark(text) == expected
    with pytest.raises(ValueError, match="cannot be kept exactly"):
        restate_lark('start: "a" %json {"const": 12345678901234567890}')

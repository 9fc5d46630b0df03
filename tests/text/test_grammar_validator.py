"""Grammars that would stop an engine are refused by a process that survives them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import pytest

from minisrv.checkpoint import resolve_checkpoint
from minisrv.errors import EngineError, RequestError
from minisrv.request import StructuredOutput
from minisrv.request import StructuredOutputKind as Kind
from minisrv.text import grammar_validator
from minisrv.text.grammar_validator import GrammarValidator
from minisrv.text.tokenizer import Tokenizer
from tests.text.random_schemas import random_schema


@pytest.fixture(scope="module")
def validator() -> Iterator[GrammarValidator]:
    validator = GrammarValidator(Tokenizer.from_directory(resolve_checkpoint(None)), 4096, [2])
    yield validator
    validator.close()


def schema(document: dict[str, Any]) -> StructuredOutput:
    return StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(document))


def properties(number: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {} for i in range(number)}, **more}


@pytest.mark.parametrize(
    "spec",
    [
        StructuredOutput(kind=Kind.JSON_OBJECT),
        StructuredOutput(kind=Kind.CHOICE, choices=("yes", "no")),
        StructuredOutput(kind=Kind.REGEX, text=""" ("a"|'b')* """),
        *(schema(random_schema(seed)) for seed in range(5)),
        schema({"enum": [f"value{i}" for i in range(4000)]}),
        schema(properties(240)),
        schema(properties(1000, required=[f"p{i}" for i in range(1000)])),
        # As large as texts may be, and harmless: nothing is unfolded.
        schema({"type": "array", "items": {"type": "string"}, "maxItems": 10**6}),
        schema({"type": "string", "minLength": 10**9}),
        StructuredOutput(kind=Kind.REGEX, text="((((a*)*)*)*)*b"),
        StructuredOutput(kind=Kind.REGEX, text="(a|b)*a(a|b){200}"),
        StructuredOutput(kind=Kind.REGEX, text="((a{1000}){1000}){1000}"),
        StructuredOutput(kind=Kind.REGEX, text="a{1000000}"),
    ],
)
def test_what_can_be_compiled_passes(validator: GrammarValidator, spec: StructuredOutput) -> None:
    validator.validate(spec).result()


def patterns(number: int) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": f"x.*y.*z{i}"} for i in range(number)]}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (schema({"$ref": "#/$defs/nope"}), "does not exist"),
        (schema({"$ref": "#"}), "no text satisfies it"),
        (schema(properties(2000)), "Too many items"),
        (schema({"allOf": [{"anyOf": [properties(i) for i in range(5)]}] * 8}), "too large"),
        # Minutes, and gigabytes, if nobody ended them.
        (schema({"type": "integer", "multipleOf": 1_000_003}), "processor time"),
        (schema({"allOf": [{"multipleOf": p} for p in (7, 11, 13, 17, 19, 23)]}), "processor time"),
        (schema(patterns(30)), "processor time"),
        # What may come before it does not hide it.
        (
            msgspec.structs.replace(schema(properties(2000)), reasoning_end="</think>"),
            "Too many items",
        ),
    ],
)
def test_what_would_stop_an_engine_is_refused(
    validator: GrammarValidator, spec: StructuredOutput, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as raised:
        validator.validate(spec).result()
    assert raised.value.param == "response_format"
    validator.validate(StructuredOutput(kind=Kind.JSON_OBJECT)).result()


def test_many_at_once(validator: GrammarValidator) -> None:
    good, bad = StructuredOutput(kind=Kind.JSON_OBJECT), schema({"type": 1})
    futures = [validator.validate(spec) for spec in [good, bad] * 10]
    assert [future.exception() is None for future in futures] == [True, False] * 10


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_killed_process_is_replaced(validator: GrammarValidator) -> None:
    first, another = (schema({"const": name}) for name in ("first", "another"))
    validator.validate(first).result()
    [process] = multiprocessing.active_children()
    kill(process)
    with pytest.raises(EngineError):
        validator.validate(another).result()
    validator.validate(another).result()


def test_what_has_passed_is_not_tried_again(validator: GrammarValidator) -> None:
    good, bad = schema({"const": "good"}), schema({"const": "bad", "type": 1})
    validator.validate(good).result()
    hostile = validator.validate(schema({"type": "integer", "multipleOf": 1_000_003}))
    assert validator.validate(good).done()
    assert not hostile.done(), "nobody waits behind it"
    for _ in range(2):
        with pytest.raises(RequestError):
            validator.validate(bad).result()
    [process] = multiprocessing.active_children()
    kill(process)
    validator.validate(good).result()
    with pytest.raises(EngineError):
        validator.validate(msgspec.structs.replace(good, reasoning_end="</think>")).result()


def test_as_many_are_remembered_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_validator, "_REMEMBERED", 2)
    specs = [schema({"const": f"one of three: {number}"}) for number in range(3)]
    another = GrammarValidator(Tokenizer.from_directory(resolve_checkpoint(None)), 4096, [2])
    for spec in specs:
        another.validate(spec).result()
    assert [another.validate(spec).done() for spec in reversed(specs)] == [True, True, False]
    another.close()


def test_closing_ends_the_process(validator: GrammarValidator) -> None:
    another = GrammarValidator(Tokenizer.from_directory(resolve_checkpoint(None)), 4096, [2])
    before = set(multiprocessing.active_children())
    another.validate(StructuredOutput(kind=Kind.JSON_OBJECT)).result()
    [process] = set(multiprocessing.active_children()) - before
    another.close()
    process.join(60)
    assert process.exitcode == 0

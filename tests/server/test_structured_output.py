"""response_format and structured_outputs: the grammars that reach the engine, and the requests that
are refused before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.config import ServerConfig
from minisrv.request import MAX_GRAMMAR_LENGTH, FinishReason, StructuredOutput
from minisrv.request import StructuredOutputKind as Kind
from minisrv.server.unsupported import STRUCTURED_OUTPUTS
from minisrv.text.chat_template import ChatTemplate
from minisrv.text.fairness import TokenBucket
from minisrv.text.grammar_validator import GrammarValidator
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.server.conftest import GENERATION
from tests.server.fake_engine import INFO, FakeEngine, outputs
from tests.text import tiny_tokenizer

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"name": "thing", "schema": SCHEMA}
UNKNOWN_TYPE = {**NAMED, "schema": {"type": 1}}
CHAT = "/v1/chat/completions"
PATHS = {"/v1/completions": {"prompt": "x"}, CHAT: {"messages": [{"role": "user", "content": "x"}]}}


def engine() -> FakeEngine:
    return FakeEngine(outputs([65, 2], FinishReason.STOP))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("response_format", {"type": "text"}, None),
        ("response_format", {"type": "json_object"}, StructuredOutput(kind=Kind.JSON_OBJECT)),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {**NAMED, "strict": True}},
            StructuredOutput(kind=Kind.JSON_SCHEMA, text=json.dumps(SCHEMA)),
        ),
        ("structured_outputs", {"json": SCHEMA}, (Kind.JSON_SCHEMA, json.dumps(SCHEMA))),
        ("structured_outputs", {"json": "{}"}, (Kind.JSON_SCHEMA, "{}")),
        ("structured_outputs", {"regex": "a+", "json": None}, (Kind.REGEX, "a+")),
        ("structured_outputs", {"grammar": 'start: "a"'}, (Kind.GRAMMAR, 'start: "a"')),
        ("structured_outputs", {"json_object": True}, (Kind.JSON_OBJECT, "")),
        (
            "structured_outputs",
            {"choice": ["yes", "no"]},
            StructuredOutput(kind=Kind.CHOICE, choices=("yes", "no"), param="structured_outputs"),
        ),
    ],
)
async def test_what_the_engine_is_told(
    connect: Connect,
    tokenizer: Tokenizer,
    path: str,
    field: str,
    value: object,
    expected: Any,
) -> None:
    """The engine gets the form of output as a grammar that has been compiled before."""
    if isinstance(expected, tuple):
        kind, text = expected
        expected = StructuredOutput(kind=kind, text=text, param="structured_outputs")
    fake = engine()
    async with connect(fake) as client:
        answer = await client.post(path, json=PATHS[path] | {field: value})
    assert answer.status_code == 200
    told = fake.requests[0].structured_output
    assert told == (expected and in_llguidances_words(expected, told.compile_seconds, tokenizer))


def in_llguidances_words(
    spec: StructuredOutput, seconds: float, tokenizer: Tokenizer
) -> StructuredOutput:
    """The grammar in the form that llguidance reads, as the engine gets it."""
    backend = GrammarBackend(tokenizer, INFO.vocab_size, GENERATION.eos_token_ids)
    return msgspec.structs.replace(backend.lower(spec), compile_seconds=seconds)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """The owners of the grammars that have been tried, in the order of the trials."""
    owners: list[int | str] = []
    real = GrammarValidator._try

    def count(self: GrammarValidator, grammar: Any, owner: int | str) -> None:
        owners.append(owner)
        real(self, grammar, owner)

    monkeypatch.setattr(GrammarValidator, "_try", count)
    return owners


async def test_all_choices_have_one_grammar(connect: Connect, trials: list[int | str]) -> None:
    """The choices of two equal requests share one grammar, which is tried once."""
    fake = engine()
    body = {"prompt": ["x", "y"], "n": 3, "response_format": {"type": "json_object"}}
    async with connect(fake) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for _ in range(2))
        )
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(fake.requests) == 12
    assert len({request.structured_output for request in fake.requests}) == 1
    assert len(trials) == 1


async def test_keys_and_addresses_take_turns_and_keys_have_a_budget(
    connect: Connect, trials: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grammars are tried in turn by key, or by address where there are no keys; a key with no
    budget left gets 429 for new grammars only."""

    def body(name: str) -> dict[str, Any]:
        return {"prompt": "x", "structured_outputs": {"choice": [name]}}

    settings = ServerConfig(api_keys=("a", "b"), max_grammar_seconds_per_key=1)
    async with connect(engine(), settings=settings) as client:
        for key in ("a", "b"):
            header = {"authorization": f"Bearer {key}"}
            answer = await client.post("/v1/completions", json=body(key), headers=header)
            assert answer.status_code == 200
        # Every budget seems to be used up.
        monkeypatch.setattr(TokenBucket, "left", lambda self, now: -1.0)
        refused = await client.post("/v1/completions", json=body("new"), headers=header)
        known = await client.post("/v1/completions", json=body("a"), headers=header)
    error = refused.json()["error"]
    assert refused.status_code == 429
    assert (error["type"], error["code"]) == ("rate_limit_error", "grammar_limit")
    assert error["param"] == "structured_outputs"
    assert int(refused.headers["retry-after"]) >= 1
    assert known.status_code == 200
    async with connect(engine()) as client:
        answer = await client.post("/v1/completions", json=body("new"))
        assert answer.status_code == 200, "nobody is charged where there are no keys"
    assert trials == [0, 1, "127.0.0.1"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": NAMED}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a" * MAX_GRAMMAR_LENGTH] * 2}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"const": 2**64 + 1}}}, "structured_outputs"),
        ({"structured_outputs": {"json": '{"enum": [1e400]}'}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        (
            {"response_format": {"type": "json_schema", "json_schema": UNKNOWN_TYPE}},
            "response_format",
        ),
    ],
)
async def test_what_is_refused(
    connect: Connect, path: str, body: dict[str, Any], param: str
) -> None:
    fake = engine()
    async with connect(fake) as client:
        answer = await client.post(path, json=PATHS[path] | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not fake.requests, "the engine never hears of it"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"structured_outputs": {"choice": [" hello"]}}, " hello"),
        ({}, "hello"),
    ],
)
async def test_a_blank_that_was_asked_for_is_there(
    connect: Connect, form: dict[str, Any], text: str
) -> None:
    """SentencePiece drops the first space of a text that begins by itself, as a chat's answer does;
    a space that the requested form begins with is kept."""
    raw = tiny_tokenizer.byte_fallback()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = Tokenizer(raw, ChatTemplate({"default": template}, {}))
    fake = FakeEngine(outputs([raw.token_to_id("▁hello"), 2], FinishReason.STOP))
    async with connect(fake, tokenizer=tokenizer) as client:
        answer = await client.post(CHAT, json=PATHS[CHAT] | form)
    assert answer.json()["choices"][0]["message"]["content"] == text


async def test_a_deep_schema_is_refused(connect: Connect) -> None:
    schema = '{"a":' * 900 + "{}" + "}" * 900
    async with connect(engine()) as client:
        body = f'{{"prompt": "x", "structured_outputs": {{"json": {schema}}}}}'
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text


async def test_the_openapi_document_tells_of_it(connect: Connect) -> None:
    async with connect(engine()) as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for body in ("CompletionRequest", "ChatCompletionRequest"):
        assert {"response_format", "structured_outputs"} <= set(schemas[body]["properties"])
    assert schemas["StructuredOutputs"]["properties"].keys() - STRUCTURED_OUTPUTS.keys() == {
        "json",
        "regex",
        "choice",
        "grammar",
        "json_object",
    }
    assert "schema" in schemas["JsonSchema"]["properties"]

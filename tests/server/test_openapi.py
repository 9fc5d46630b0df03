"""The OpenAPI document and the server agree: requests that it allows or forbids give no 5xx, and
the answers are as declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.openapi import from_asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from minisrv.config import ServerConfig
from minisrv.request import EngineOutput, EngineRequest, FinishReason
from minisrv.server.app import create_app
from minisrv.server.response_schemas import (
    Body,
    ChatCompletionStreamResponse,
    CompletionStreamResponse,
)
from minisrv.text.tokenizer import Tokenizer
from tests.server.conftest import GENERATION
from tests.server.fake_engine import GRAPH_STATS, STEPS, FakeEngine, outputs, sse, token_logprobs

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def everything_asked_for(request: EngineRequest) -> Iterable[EngineOutput]:
    """A script of one token, with everything else that the request asks to be reported."""
    params = request.params
    scored: list[Any] = []
    if params.prompt_logprobs is not None:
        scored = [token_logprobs(i, params.prompt_logprobs) for i in request.prompt_token_ids[1:]]
    tokens = [300] if params.max_tokens else []
    logprobs = None
    if params.logprobs is not None:
        logprobs = [token_logprobs(300, params.logprobs)] * len(tokens)
    yield EngineOutput(
        request_id=request.request_id,
        token_ids=tokens,
        logprobs=logprobs,
        prompt_logprobs=scored,
        finish_reason=FinishReason.LENGTH,
        graph_steps=STEPS,
        graph_stats=GRAPH_STATS,
    )


def make(tokenizer: Tokenizer, **options: Any) -> FastAPI:
    engine: Any = FakeEngine(everything_asked_for)
    names = ("tiny", "org/tiny")
    return create_app(engine, tokenizer, served_model_names=names, generation=GENERATION, **options)


SETTINGS = settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def described(tokenizer: Tokenizer) -> Iterator[Any]:
    """The document of one application, which answers the requests of all tests."""
    app = make(tokenizer)
    yield from_asgi("/openapi.json", app)
    app.state.close()


POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/invocations",
    "/tokenize",
    "/detokenize",
)
STORED = "/v1/responses/{response_id}"
GETS = (
    "/v1/models",
    "/v1/models/{model_id}",
    STORED,
    f"{STORED}/input_items",
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/debug/steps",
    *("/ping", "/load", "/tokenizer_info"),
)


def hold(case: schemathesis.Case) -> None:
    """Check the answer to one generated case. A body may be so large that it is not read at all."""
    response = case.call()
    checks = CHECKS[:-1] if response.status_code == 413 else CHECKS
    case.validate_response(response, checks=checks)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_the_document_allows_or_forbids(
    described: Any, path: str, mode: GenerationMode
) -> None:
    """Random bodies within the schema and outside of it get answers that the document declares."""
    cases = described[path]["POST"].as_strategy(generation_mode=mode)
    SETTINGS(given(case=cases)(hold))()


@pytest.mark.parametrize(
    ("method", "path"),
    [*(("GET", path) for path in GETS), ("DELETE", STORED), ("POST", f"{STORED}/cancel")],
)
def test_a_request_without_a_body(described: Any, method: str, path: str) -> None:
    SETTINGS(given(case=described[path][method].as_strategy())(hold))()


EVERYTHING = {
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "include_graph_steps": True,
    "model": "tiny",
}
MESSAGES = [{"role": "user", "content": "hi"}]
REPORTED = {"return_token_ids": True, "include_graph_steps": True}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": ["hi", "ho"], "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": "hi", "logprobs": 2, "echo": True, **EVERYTHING}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 0, "echo": True}),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **EVERYTHING},
        ),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/responses", {"input": "hi", "stream": True}),
        (
            "/v1/responses",
            {"input": MESSAGES, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        ),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "stream": True}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
        ("/detokenize", {"tokens": [300]}),
    ],
)
def test_all_that_can_be_asked_for_is_described(
    described: Any, path: str, body: dict[str, Any]
) -> None:
    """Answers with every optional part match their schema."""
    case = described[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call()
    assert response.status_code == 200, response.text
    case.validate_response(response, checks=CHECKS[:-1])


@pytest.mark.parametrize(
    ("path", "body", "chunk"),
    [
        ("/v1/completions", {"prompt": "hi"}, CompletionStreamResponse),
        (
            "/v1/completions",
            {"prompt": "hi", "logprobs": 2, **REPORTED},
            CompletionStreamResponse,
        ),
        ("/v1/chat/completions", {"messages": MESSAGES}, ChatCompletionStreamResponse),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **REPORTED},
            ChatCompletionStreamResponse,
        ),
    ],
)
@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.anyio
async def test_every_chunk_is_one_of_the_structs(
    connect: Callable[..., httpx.AsyncClient],
    path: str,
    body: dict[str, Any],
    chunk: type[Body],
    usage: dict[str, Any],
) -> None:
    """Chunks have the fields of their structs and no others, also where bytes are spliced."""
    engine = outputs([300, 301, 302], logprobs=2 if "logprobs" in body else None)
    async with connect(engine) as client:
        response = await client.post(path, json={**body, **usage, "stream": True})
    events = sse(response.text)
    assert len(events) >= 3
    for event in events:
        msgspec.convert(event, chunk)


def test_every_response_is_described(tokenizer: Tokenizer) -> None:
    document = make(tokenizer).openapi()
    assert document["paths"].keys() == {*POSTS, *GETS, f"{STORED}/cancel"}
    assert document["paths"][STORED].keys() == {"get", "delete"}
    assert document["paths"]["/ping"].keys() == {"get", "post"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        responses = document["paths"][path]["post"]["responses"]
        assert responses.keys() == {"200", "4XX", "5XX"}
        assert responses["200"]["content"].keys() == {"application/json", "text/event-stream"}


def test_the_document_tells_of_keys_where_there_are_any(tokenizer: Tokenizer) -> None:
    closed = make(tokenizer, settings=ServerConfig(api_keys=("key",))).openapi()
    assert closed["security"] == [{"key": []}, {"header": []}]
    assert closed["paths"]["/health"]["get"]["security"] == []
    assert "security" not in make(tokenizer).openapi()

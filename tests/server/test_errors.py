"""Every error is OpenAI's error object with the right status, and no fault of a client gives a
500."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisrv.checkpoint import GenerationConfig
from minisrv.engine.client import EngineState
from minisrv.errors import (
    BodiesFullError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineNotReadyError,
    GrammarFullError,
    GrammarUnavailableError,
    GraphError,
    QueueFullError,
    RequestError,
)
from minisrv.request import EngineOutput, FinishReason
from minisrv.server.request_schemas import ChatCompletionRequest, CompletionRequest
from minisrv.server.unsupported import EVERYWHERE
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
JSON = {"content-type": "application/json"}
ROUTES = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, which must have this status."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


async def post(client: httpx.AsyncClient, route: str, **fields: Any) -> httpx.Response:
    async with client:
        return await client.post(route, json=ROUTES[route] | fields)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"what": 1}, "what", "Unrecognized request argument supplied: what"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens", "from 0 to max_tokens, which is 16"),
        ({"logit_bias": {str(INFO.vocab_size): 1}}, "logit_bias", "token id 400; this model's"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "the key 'x' must be a token id"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "the bias of token 7 must be a number from"),
        ({"logit_bias": [5]}, "logit_bias", "must be an object that maps token ids"),
        ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65, "at most 64 characters"),
        ({"stop": 5}, "stop", "it must be a string or a list of strings"),
        ({"stream_options": 5}, "stream_options", "Input should be an object (got 5)"),
        ({"best_of": 2}, "best_of", "is not supported by this server; leave it out or send 1."),
        ({"stream_options": {}}, "stream_options", "only allowed when stream is true"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer (got '5')"),
        ({"stop_token_ids": [INFO.vocab_size]}, "stop_token_ids", "from 0 to 399"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
    ],
)
async def test_a_bad_field_is_named(
    connect: Connect, route: str, fields: dict[str, Any], param: str, words: str
) -> None:
    """A value that is refused is reported with its field as `param`, and nothing reaches the
    engine."""
    engine = FakeEngine(outputs([300]))
    error = error_of(await post(connect(engine), route, **fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("/v1/completions", {"logprobs": -1}),
        ("/v1/completions", {"prompt_logprobs": -1}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": -1}),
        ("/v1/chat/completions", {"prompt_logprobs": -1}),
    ],
)
async def test_all_tokens_are_more_alternatives_than_are_reported(
    connect: Connect, url: str, fields: dict[str, Any]
) -> None:
    """vLLM's -1 is refused with the bound that it exceeds, as it is by vLLM's own default."""
    response = await post(connect(outputs([300])), url, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, list(fields)[-1])
    assert "from 0 to 20" in error["message"]
    assert "all tokens of the vocabulary" in error["message"]


F = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
            "tool_choice.allowed_tools.tools",
            "Missing required",
        ),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type", "Input should be 'function'"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required', or an object"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "Missing required"),
        ({"tool_choice": {**F, "x": 1}}, "tool_choice.x", "Unrecognized request argument"),
        (
            {"chat_template_kwargs": {"a": [1]}},
            "chat_template_kwargs.a",
            "a valid boolean, or a valid integer, or a valid number, or a valid string (got [1])",
        ),
        (
            {"chat_template_kwargs": {"a": {"int": 1}}},
            "chat_template_kwargs.a",
            "or a valid integer",
        ),
        ({"messages": ["hi"]}, "messages[0]", "Input should be an object (got 'hi')"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "a string or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "Input should be 'text' or 'refusal' (got 'image_url')",
        ),
    ],
)
async def test_a_bad_field_of_a_chat_is_named_as_the_client_wrote_it(
    connect: Connect, fields: dict[str, Any], param: str, words: str
) -> None:
    """The path of the field is as in the request, whatever classes, unions and validators stand
    behind it."""
    response = await post(connect(outputs([300])), "/v1/chat/completions", tools=[F], **fields)
    error = error_of(response, 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_empty_model_is_the_served_one(connect: Connect, route: str) -> None:
    """An empty model name stands for the served model."""
    response = await post(connect(outputs([300])), route, model="")
    assert response.json()["model"] == "tiny"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "send at least one token"),
        (["hi", ""], "send at least one token"),
        ([], "not empty"),
        ([[1], []], "at least one"),
        ([400], "from 0 to 399"),
        ([[1], [2, 400]], "from 0 to 399"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_prompts(connect: Connect, prompt: object, words: str, stream: bool) -> None:
    engine = FakeEngine(outputs([300]))
    response = await post(connect(engine), "/v1/completions", prompt=prompt, stream=stream)
    error = error_of(response, 400)
    assert words in error["message"]
    assert error["param"] == "prompt"
    assert engine.requests == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "hi", "\\ud800": 1}',
        b'{"prompt": "hi", "model": "\\ud800"}',
        b'{"prompt": "hi", "stop": ["\\udfff"]}',
        b'{"prompt": "hi", "user": "\\ud800"}',
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "temperature": 1e999}',
        b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "hi", "seed": ' + b"9" * 400 + b"}",
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"prompt": "hi", "logit_bias": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
@pytest.mark.parametrize("route", ROUTES)
async def test_bodies_that_make_no_sense(connect: Connect, route: str, content: bytes) -> None:
    """Bodies that are no JSON, no object, no valid Unicode or too deep get a 400 in OpenAI's
    form."""
    async with connect(outputs([300])) as client:
        response = await client.post(route, content=content, headers=JSON)
    error = error_of(response, 400)
    if b'"\\ud800": 1' in content and route == "/v1/completions":
        assert error["message"] == "A name in the request body is not valid Unicode."


@pytest.mark.parametrize(
    ("length", "max_tokens", "words"),
    [
        (200, None, "your prompt resulted in 200 tokens"),
        (201, 1, "your prompt resulted in 201 tokens"),
        (150, 51, "you requested 201 tokens (150 in the prompt, 51 in the completion)"),
    ],
)
async def test_context_overflow_in_openai_s_words(
    connect: Connect, length: int, max_tokens: int | None, words: str
) -> None:
    fields = {"prompt": [7] * length, "max_tokens": max_tokens}
    error = error_of(await post(connect(outputs([300])), "/v1/completions", **fields), 400)
    assert error["code"] == "context_length_exceeded"
    start = "This model's maximum context length is 200 tokens. However, "
    assert error["message"].startswith(start + words)
    assert "Please reduce the length of the prompt" in error["message"]


@pytest.mark.parametrize(
    ("route", "param", "cut"),
    [
        ("/v1/completions", "prompt", {"truncate_prompt_tokens": 5}),
        ("/v1/chat/completions", "messages", {"truncate_prompt_tokens": 5}),
        ("/v1/messages", "messages", None),
        ("/v1/responses", "input", {"truncation": "auto"}),
        ("/v1/embeddings", "input", {"truncate_prompt_tokens": 5}),
        ("/tokenize", "prompt", {}),
    ],
)
async def test_a_text_that_no_context_holds_is_not_tokenised(
    connect: Connect,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    param: str,
    cut: dict[str, Any] | None,
) -> None:
    """Some megabytes take seconds. Where the text is to be cut, or its tokens only counted, it has
    to be tokenised all the same."""
    lengths: list[int] = []

    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        return [7] * 10

    monkeypatch.setattr(tokenizer, "encode", encode)
    most = 200 * tokenizer.longest_token
    text = "a" * (most + 1)
    body = {param: [{"role": "user", "content": text}] if param == "messages" else text}
    if route == "/v1/messages":
        body |= {"model": "tiny", "max_tokens": 1}
    async with connect(outputs([300])) as client:
        if cut != {}:
            refused = await client.post(route, json=body)
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert f"and so many tokens have at most {most}." in error["message"]
            assert not lengths
        if cut is not None:
            await client.post(route, json=body | cut)
            assert max(lengths) > most


async def test_what_just_fits_is_accepted(connect: Connect) -> None:
    fields = {"prompt": [7] * 150, "max_tokens": 50}
    response = await post(connect(outputs([300])), "/v1/completions", **fields)
    assert response.status_code == 200


@pytest.mark.parametrize("route", ROUTES)
async def test_unknown_model(connect: Connect, route: str) -> None:
    error = error_of(await post(connect(outputs([300])), route, model="gpt-9"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (QueueFullError("full", retry_after=3), 429, "queue_full", "3"),
        (ContextLengthError("never fits"), 400, "context_length_exceeded", None),
        (RequestError("no", param="seed"), 400, None, None),
        (EngineDeadError("gone"), 503, "engine_dead", None),
        (EngineNotReadyError("draining"), 503, "not_ready", "2"),
        (BodiesFullError("no room"), 503, "too_many_bodies", "2"),
        (GrammarUnavailableError("unknown"), 503, "grammar_not_tried", "2"),
        (GrammarFullError("send it again"), 503, "grammar_full", "1"),
    ],
)
async def test_a_refusal_of_the_engine_is_never_a_200(
    connect: Connect,
    route: str,
    stream: bool,
    error: Exception,
    status: int,
    code: str | None,
    retry: str | None,
) -> None:
    """An error of the engine before the first output sets the status, even for a stream."""
    response = await post(connect(lambda request: [error]), route, stream=stream)
    assert error_of(response, status)["code"] == code
    assert response.headers.get("retry-after") == retry


@pytest.mark.parametrize("error", [GraphError("buffer at 0xdead"), ValueError("/etc/secret")])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_internal_error_is_logged_and_not_shown(
    connect: Connect, caplog: pytest.LogCaptureFixture, error: Exception, stream: bool
) -> None:
    """The client of an internal error gets a 500 without the error's message, which is logged."""
    client = connect(lambda request: [error])
    with caplog.at_level(logging.ERROR):
        response = await post(client, "/v1/completions", stream=stream)
    shown = error_of(response, 500)
    assert str(error) not in shown["message"]
    assert str(error) in caplog.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("error", [EngineDeadError("gone"), ValueError("secret")])
async def test_an_error_inside_a_stream(connect: Connect, route: str, error: Exception) -> None:
    """An error after the first output ends the stream with an error event and [DONE]."""

    def script(request: Any) -> Any:
        return [EngineOutput(request_id=request.request_id, token_ids=[300]), error]

    response = await post(connect(script), route, stream=True)
    assert response.status_code == 200
    *_, shown, done, rest = response.text.split("\n\n")
    assert shown.startswith('data: {"error":{"message":')
    assert "secret" not in shown
    assert (done, rest) == ("data: [DONE]", "")
    assert '"finish_reason":"' not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_drops_is_an_error(connect: Connect, stream: bool) -> None:
    """A request that the engine aborts by itself ends with 503."""
    script = outputs([300], FinishReason.ABORT)
    response = await post(connect(script), "/v1/completions", stream=stream)
    assert error_of(response, 503)["code"] == "not_ready"


async def test_a_generation_without_an_end_is_an_error(connect: Connect) -> None:
    """A stream of outputs that ends without a finish reason is an internal error."""
    response = await post(connect(lambda request: []), "/v1/completions")
    error_of(response, 500)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("state", ["loading", "draining", "dead"])
async def test_an_engine_that_is_not_ready(connect: Connect, route: str, state: str) -> None:
    engine = FakeEngine(outputs([300]))
    engine.state = EngineState(state)
    if state == "loading":
        engine.info = None
    response = await post(connect(engine), route)
    error = error_of(response, 503)
    assert error["code"] == ("engine_dead" if state == "dead" else "not_ready")
    assert ("retry-after" in response.headers) == (state != "dead")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
    ],
)
async def test_unknown_routes_and_methods(
    connect: Connect, method: str, path: str, status: int
) -> None:
    async with connect(outputs([300])) as client:
        error = error_of(await client.request(method, path), status)
    assert f"({method} {path})" in error["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("route", ROUTES)
async def test_other_content_types(connect: Connect, route: str, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    async with connect(outputs([300])) as client:
        response = await client.post(route, content=b'{"prompt": "hi"}', headers=headers)
    assert "application/json" in error_of(response, 415)["message"]


async def test_a_charset_is_fine(connect: Connect) -> None:
    """A charset parameter and upper case in the content type are accepted."""
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    async with connect(outputs([300])) as client:
        response = await client.post(
            "/v1/completions", content=b'{"prompt": "hi"}', headers=headers
        )
    assert response.status_code == 200


@pytest.mark.parametrize("declared", [True, False])
async def test_bodies_that_are_too_large(connect: Connect, declared: bool) -> None:
    body = b'{"prompt": "%s"}' % (b"x" * 1000)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async with connect(outputs([300]), max_body_bytes=len(body) - 1) as client:
        content = body if declared else chunks()
        response = await client.post("/v1/completions", content=content, headers=JSON)
        assert error_of(response, 413)["code"] == "request_too_large"
        headers = JSON | {"content-length": "9" * 5000}
        error_of(await client.post("/v1/completions", content=b"{}", headers=headers), 413)
    async with connect(outputs([300]), max_body_bytes=len(body)) as client:
        response = await client.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code != 413


@pytest.mark.parametrize("path", ["/health", "/v1/nothing", "/v1/completions"])
async def test_request_ids(connect: Connect, path: str) -> None:
    """A valid x-request-id is returned; an invalid or missing one is replaced by a new id."""
    async with connect(outputs([300])) as client:
        mine = await client.get(path, headers={"x-request-id": "my-id:1/2"})
        assert mine.headers["x-request-id"] == "my-id:1/2"
        for bad in ("", "a b", "x" * 129, "a\tb", "é"):
            response = await client.get(path, headers={"x-request-id": bad.encode()})
            assert len(response.headers["x-request-id"]) == 32
        first, second = [(await client.get(path)).headers["x-request-id"] for _ in range(2)]
        assert first != second


async def test_request_id_on_a_stream(connect: Connect) -> None:
    async with connect(outputs([300])) as client:
        response = await client.post(
            "/v1/completions",
            json={"prompt": "hi", "stream": True},
            headers={"x-request-id": "mine"},
        )
    assert response.headers["x-request-id"] == "mine"


async def test_sampling_defaults_out_of_bounds_are_seen_at_the_start(connect: Connect) -> None:
    """Sampling defaults of the checkpoint that are out of bounds are refused when the application
    is made."""
    with pytest.raises(ConfigError, match=r"generation_config.json: temperature=7"):
        connect(outputs([300]), generation=GenerationConfig(temperature=7.0))


async def test_an_unexpected_error_outside_of_a_generation(connect: Connect) -> None:
    engine = FakeEngine(outputs([300]))
    engine.stats = None  # type: ignore[assignment]
    async with connect(engine) as client:
        error_of(await client.get("/metrics"), 500)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["user", "text", "tiny"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *EVERYWHERE, "x"]
)


@given(body=st.dictionaries(NAMES, VALUES, max_size=4) | VALUES, route=st.sampled_from([*ROUTES]))
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_body_makes_a_500(connect: Connect, route: str, body: Any) -> None:
    """Random JSON in random fields gives 200, 400 or 404."""

    async def ask() -> httpx.Response:
        filled = ROUTES[route] | body if isinstance(body, dict) else body
        async with connect(outputs([300])) as client:
            content = json.dumps(filled).encode()
            return await client.post(route, content=content, headers=JSON)

    response = asyncio.run(ask())
    if response.status_code != 200:
        error_of(response, 404 if response.status_code == 404 else 400)


async def test_a_long_unknown_name_is_not_sent_back_whole(connect):
    async with connect(FakeEngine([])) as client:
        reply = await client.post("/v1/completions", json={"prompt": "a", "x" * 100_000: 1})
    assert reply.status_code == 400
    assert len(reply.content) < 1000
    assert reply.json()["error"]["param"].startswith("xxx")

"""Request bodies: their values are counted before any object is made, large bodies are parsed
outside of the event loop, and a body that is refused costs no more than reading it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from minisrv.errors import RequestError
from minisrv.request import MAX_GRAMMAR_LENGTH
from minisrv.server import preprocessing, request_body, serving, value_budget
from minisrv.server.offload import LARGE
from minisrv.server.request_body import read_body
from minisrv.server.request_schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from minisrv.server.response_builders import CompletionResponseBuilder
from minisrv.server.strict import RequestBody
from minisrv.server.value_budget import TooManyValuesError, ValueBudget
from tests.server.fake_engine import FakeEngine, outputs
from tests.waiting import GUARD_SECONDS

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
HEADERS = {"content-type": "application/json"}
USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}


def call(arguments: str) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": arguments}}


def read(model: type[RequestBody], **fields: Any) -> RequestBody | RequestError:
    return read_body((model,), json.dumps(fields).encode())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text('\\":,[]{}a\n\ud800'),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('\\":,[]{}a'), inner, max_size=4)
    ),
)


def counted(value: Any) -> tuple[int, int]:
    """The number of objects, lists and members of objects in a value, and the number of commas
    between values."""
    inner: list[Any] = []
    members = elements = 0
    if isinstance(value, dict | list):
        inner = [*value.values()] if isinstance(value, dict) else value
        members = 1 + (len(value) if isinstance(value, dict) else 0)
        elements = max(0, len(value) - 1)
    below = [counted(one) for one in inner]
    return members + sum(m for m, _ in below), elements + sum(e for _, e in below)


@given(value=VALUES, ascii_only=st.booleans())
def test_values_are_counted_where_they_are_and_not_in_texts(value: Any, ascii_only: bool) -> None:
    """The count of a JSON text leaves out what stands inside its strings."""
    data = json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace")
    outside = value_budget._outside_of_texts(data)
    assert value_budget._count(outside) == counted(value)


def member_body(count: int) -> bytes:
    """A body with this many objects, lists and members."""
    names = ",".join(f'"{i}":0' for i in range(count - 7))
    return b'{"messages":[{"role":"user","content":"hi","x":0%s}]}' % f",{names}".encode()


def list_body(count: int) -> bytes:
    """A body with this many objects, lists and members, most of them empty lists."""
    return b'{"prompt":"hi","metadata":[%s]}' % b",".join([b"[]"] * (count - 4))


def element_body(count: int) -> bytes:
    """A body with this many commas between the tokens of a prompt."""
    return b'{"prompt":[%s]}' % b",".join([b"7"] * (count + 1))


@pytest.mark.parametrize(
    ("path", "make", "words"),
    [
        ("/v1/chat/completions", member_body, "8001 objects, lists and members of objects"),
        ("/v1/completions", list_body, "8001 objects, lists and members of objects"),
        ("/v1/completions", element_body, "8001 values are more than the 8000"),
    ],
)
async def test_a_body_of_too_many_values_is_refused(
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    make: Callable[[int], bytes],
    words: str,
) -> None:
    monkeypatch.setattr(value_budget, "MAX_MEMBERS", 8000)
    monkeypatch.setattr(value_budget, "MAX_ELEMENTS", 8000)
    async with connect(outputs([300])) as client:
        most = await client.post(path, content=make(8000), headers=HEADERS)
        assert "that a request may hold" not in most.text
        more = await client.post(path, content=make(8001), headers=HEADERS)
    assert more.status_code == 400
    assert words in more.json()["error"]["message"]
    assert more.json()["error"]["param"] is None


def test_nothing_is_made_of_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of too many values is refused without being parsed."""
    monkeypatch.setattr(json, "loads", None)
    for item in (b"{}", b"[]", b'"n":1', b"1", b'"a"'):
        start, end = (b"{", b"}") if b":" in item else (b'{"prompt":[', b"]}")
        items = b",".join([item] * ((4 << 20) // (len(item) + 1) - 20))
        refused = read_body((CompletionRequest,), start + items + end)
        assert isinstance(refused, RequestError)
        assert "that a request may hold" in refused.message


def test_json_in_texts_counts_with_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON in strings, such as the arguments of tool calls, shares the limit of the body."""
    monkeypatch.setattr(value_budget, "MAX_MEMBERS", 5000)
    arguments = json.dumps({"a": [[]] * 2000})
    messages = [{"role": "assistant", "tool_calls": [call(arguments)] * 2}]
    assert not isinstance(read(ChatCompletionRequest, messages=messages), RequestError)
    messages = [{"role": "assistant", "tool_calls": [call(arguments)] * 3}]
    refused = read(ChatCompletionRequest, messages=messages)
    assert isinstance(refused, RequestError)
    assert refused.param == "messages[0].tool_calls[2].function.arguments"
    assert "are more than the 5000 that a request may hold" in refused.message


def test_a_broken_text_counts_up_to_where_it_breaks() -> None:
    """A string with broken JSON counts up to the place where it breaks."""
    with pytest.raises(TooManyValuesError):
        ValueBudget().spend(b'{"x":[' + b"[]," * value_budget.MAX_MEMBERS + b'"\\')


PROPERTIES = {f"p{i}": {"type": "string", "description": "a, b: " * 20} for i in range(130)}
PARAMETERS = {"type": "object", "properties": PROPERTIES}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (CompletionRequest, {"prompt": [99_999] * (128 << 10)}),
        (CompletionRequest, {"prompt": [[99_999] * (80 << 10)] * 8}),
        (CompletionRequest, {"prompt": "word " * (600 << 10)}),
        (CompletionRequest, {"prompt": 'f({"a": [1, 2]}): \\ "' * 100_000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x" * 900}] * 4096}),
        (
            ChatCompletionRequest,
            {
                "messages": [USER],
                "tools": [
                    {"type": "function", "function": {"name": f"f{i}", "parameters": PARAMETERS}}
                    for i in range(100)
                ],
            },
        ),
        (TokenizeRequest, {"prompt": "a b " * 1_000_000}),
        (DetokenizeRequest, {"tokens": [9999] * 600_000}),
    ],
)
def test_large_bodies_of_real_work_are_read(
    model: type[RequestBody], fields: dict[str, Any]
) -> None:
    """Large prompts, long chats and many tools stay below the limits."""
    body = read(model, **fields)
    assert isinstance(body, model)
    assert body.num_bytes > 256 << 10


MANY = {f"x{i}": 1 for i in range(1000)}


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (CompletionRequest, {"prompt": "hi", **MANY}, "x0"),
        (CompletionRequest, {"prompt": "hi", "metadata": MANY}, "metadata"),
        (CompletionRequest, {"prompt": "hi", "stream_options": MANY}, "stream_options.x0"),
        (CompletionRequest, {"prompt": "hi", "stop": [1] * 16}, "stop[0]"),
        (ChatCompletionRequest, {"messages": [{}] * 1000}, "messages[0].role"),
        (ChatCompletionRequest, {"messages": [{**USER, "audio": 1}] * 1000}, "messages[0].audio"),
        (TokenizeRequest, {"messages": [USER, *[5] * 1000]}, "messages[1]"),
        (
            ChatCompletionRequest,
            {"messages": [{"role": "user", "content": [{"type": "x"}] * 1000}] * 10},
            "messages[0].content[0].type",
        ),
        (
            ChatCompletionRequest,
            {"messages": [{"role": "assistant", "tool_calls": [{}] * 1000}]},
            "messages[0].tool_calls[0].function",
        ),
        (ChatCompletionRequest, {"messages": [USER], "tools": [{}] * 100}, "tools[0].type"),
        (
            ChatCompletionRequest,
            {"messages": [USER], "chat_template_kwargs": {name: [] for name in MANY}},
            "chat_template_kwargs",
        ),
    ],
)
def test_of_many_mistakes_a_few_are_made_into_errors(
    model: type[RequestBody], fields: dict[str, Any], param: str
) -> None:
    """However many mistakes a body has, only a few errors are made of it, and the first names its
    field."""
    with pytest.raises(ValidationError) as raised:
        model.model_validate(fields)
    assert raised.value.error_count() <= 16
    refused = read(model, **fields)
    assert isinstance(refused, RequestError)
    assert refused.param == param


def test_an_error_shows_the_first_members_of_an_object() -> None:
    """An error message shows a few of the members only."""
    refused = read(CompletionRequest, prompt="hi", stream={"z": 1, "b": 2, "c": 3, "d": 4, "a": 5})
    assert isinstance(refused, RequestError)
    assert refused.message.endswith("(got {'b': 2, 'c': 3, 'd': 4, 'z': 1, ...}).")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"prompt":"\xff"}', "it must be JSON in UTF-8"),
        ('{"prompt":"hi"}'.encode("utf-16"), "it must be JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt":"a","seed":' + b"9" * 5000 + b"}", "an integer of too many digits"),
        (b'{"prompt":}', "is not valid JSON: Expecting value (position 10)"),
    ],
)
def test_what_is_no_json_is_told(data: bytes, words: str) -> None:
    refused = read_body((CompletionRequest,), data)
    assert isinstance(refused, RequestError)
    assert words in refused.message


def test_a_surrogate_in_utf_8_is_refused_with_its_field() -> None:
    refused = read_body((CompletionRequest,), b'{"prompt":"\xed\xa0\x80"}')
    assert isinstance(refused, RequestError)
    assert refused.param == "prompt"


def test_a_byte_order_mark_is_no_part_of_a_body() -> None:
    body = read_body((CompletionRequest,), b'\xef\xbb\xbf{"prompt":"hi"}')
    assert isinstance(body, CompletionRequest)


LARGE_PROMPT = {"prompt": "x" * (LARGE + 1)}


async def test_a_large_body_is_read_beside_the_event_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are answered while a large body is parsed."""
    go = threading.Event()
    loads = json.loads

    def wait(text: str | bytes, **options: Any) -> Any:
        assert len(text) <= LARGE or go.wait(GUARD_SECONDS), "the event loop waits for it"
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", wait)
    async with connect(outputs([300])) as client:
        large = asyncio.create_task(client.post("/v1/completions", json=LARGE_PROMPT))
        small = await client.post("/v1/completions", json={"prompt": "hi"})
        health = await client.get("/health")
        assert not large.done()
        go.set()
        answer = await large
    assert (small.status_code, health.status_code) == (200, 200)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


class Threads:
    """Records in which threads a function runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
        self.names: list[str] = []
        function = getattr(place, name)

        def note(*arguments: Any, **options: Any) -> Any:
            self.names.append(threading.current_thread().name)
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, note)

    @property
    def is_loop(self) -> bool:
        [name] = self.names
        return name == threading.current_thread().name


@pytest.mark.parametrize("size", ["small", "large"])
async def test_a_chat_is_rendered_where_its_body_was_read(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """The length of the body decides where a chat is rendered, since measuring each message takes
    as long as rendering it."""
    read, render = (
        Threads(monkeypatch, request_body, "read_body"),
        Threads(monkeypatch, serving, "render_chat"),
    )
    messages = [USER] * (400 if size == "large" else 1)
    async with connect(outputs([300])) as client:
        await client.post("/v1/chat/completions", json={"messages": messages})
    assert read.is_loop == render.is_loop == (size == "small")


async def test_a_forced_call_is_prepared_in_a_thread(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar for tool calls is always prepared in a thread, as even a small schema may take
    long."""
    prepare = Threads(monkeypatch, serving, "tool_parser")
    async with connect(outputs([300])) as client:
        body = {"messages": [USER], "tools": [FUNCTION], "tool_choice": "required"}
        await client.post("/v1/chat/completions", json=body)
    assert not prepare.is_loop


async def test_tools_that_are_too_long_for_a_grammar_are_not_made_into_one(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocessing, "check_tools", lambda *arguments: None)
    monkeypatch.setattr(preprocessing, "tool_call_grammar", None)
    tool = {"name": "f", "parameters": {"description": "x" * MAX_GRAMMAR_LENGTH}}
    async with connect(outputs([300])) as client:
        body = {"messages": [USER], "tools": [{"type": "function", "function": tool}]}
        reply = await client.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "tools"
    assert f"at most {MAX_GRAMMAR_LENGTH} are allowed" in reply.json()["error"]["message"]


@pytest.mark.parametrize("logprobs", [None, 20])
async def test_a_large_answer_is_written_beside_the_event_loop(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, logprobs: int | None
) -> None:
    """Where log-probabilities make an answer large, it is written in a thread."""
    written = Threads(monkeypatch, CompletionResponseBuilder, "response")
    number = LARGE // 20
    async with connect(FakeEngine(outputs([300] * number, logprobs=logprobs))) as client:
        reply = await client.post("/v1/completions", json={"prompt": "a", "logprobs": logprobs})
    assert reply.json()["usage"]["completion_tokens"] == number
    assert written.is_loop == (logprobs is None)


@pytest.mark.parametrize("content", [b"x" * (300 << 10), json.dumps(LARGE_PROMPT).encode()])
async def test_the_memory_of_a_large_body_is_given_back(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """After a large body, the memory of its parsing is returned to the system."""
    given_back = threading.Event()
    monkeypatch.setattr(request_body, "release_free_memory", given_back.set)
    async with connect(outputs([300])) as client:
        await client.post("/v1/completions", content=content, headers=HEADERS)
    request_body._THREAD.submit(lambda: None).result(GUARD_SECONDS)
    assert given_back.is_set() == (len(content) > 256 << 10)


async def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that goes away while it sends its body is logged as 499 and not as an error."""
    messages = [
        {"type": "http.request", "body": b'{"prompt"', "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"host", b"x"), (b"content-type", b"application/json")],
        "query_string": b"",
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async with connect(outputs([300])) as client:
        transport: Any = client._transport
        await transport.app(scope, receive, send)
    assert sent[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

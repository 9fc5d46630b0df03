"""POST /v1/messages and /v1/messages/count_tokens: what becomes of a body, and of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.config import ServerConfig
from minisrv.errors import EngineNotReadyError, QueueFullError
from minisrv.request import FinishReason
from minisrv.server.anthropic_responses import AnthropicMessage, MessageStreamEvent
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of
from tests.text.walks import follow

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
PATH = "/v1/messages"
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }} <tool_call>]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}"
    "({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = TEMPLATE + (
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{# <think></think> #}"
)
OTHER_THINKING = THINKING.replace("enable_thinking", "thinking")
ALWAYS_THINKING = TEMPLATE + "{# <think></think> #}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
HI = {"role": "user", "content": "Hi"}
END = 2  # <|im_end|>
USE = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}}


@pytest.fixture(scope="module")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        directory: Path = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("messages"))
        config = directory / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
        return tokenizer_of(directory)

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer:
    return make_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def thinking(make_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer:
    return make_tokenizer(THINKING)


class Model:
    """A server whose model always answers with `text`."""

    def __init__(
        self, connect: Connect, tokenizer: Tokenizer, text: str = "Hello", *, ends: bool = True
    ) -> None:
        ids = tokenizer.encode(text)
        script = outputs([*ids, END], FinishReason.STOP, cached=3) if ends else outputs(ids)
        self.engine = FakeEngine(script)
        self.engine.info = msgspec.structs.replace(INFO, max_model_len=1000)
        self._client = connect(self.engine, tokenizer=tokenizer)
        self._tokenizer = tokenizer

    async def post(self, path: str = PATH, **body: Any) -> httpx.Response:
        limit = {"max_tokens": 500} if path == PATH else {}
        async with self._client as client:
            return await client.post(path, json={"messages": [HI], **limit, **body})

    async def answer(self, **body: Any) -> Any:
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        message = msgspec.json.decode(response.content, type=AnthropicMessage)
        return json.loads(msgspec.json.encode(message))

    async def prompt_of(self, **body: Any) -> str:
        """The prompt that a body becomes, as text."""
        await self.answer(**body)
        return self._tokenizer.decode(self.engine.requests[-1].prompt_token_ids)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names and data of a stream's events, each of which is one that is described."""
    *found, rest = text.split("\n\n")
    assert rest == ""
    pairs = []
    for event in found:
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        msgspec.json.decode(data.removeprefix("data: "), type=MessageStreamEvent)
        assert name == f"event: {value['type']}"
        pairs.append((value["type"], value))
    return pairs


# ---- answers ---------------------------------------------------------------------------------


async def test_a_whole_answer(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer)
    message = await model.answer(model="org/tiny")
    assert message.pop("id").startswith("msg_")
    prompt = len(model.engine.requests[0].prompt_token_ids)
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "org/tiny",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": len(tokenizer.encode("Hello")) + 1,
        },
    }


async def test_a_stream(connect: Connect, thinking: Tokenizer) -> None:
    """Each block ends before the next begins, and all pieces together are the whole answer."""
    text = f"<think>\nWhich city?\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
    response = await Model(connect, thinking, text).post(tools=[WEATHER], stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert [name for name, _ in found[:2]] == ["message_start", "ping"]
    start = found[0][1]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    is_open = False
    for name, event in found[2:-2]:
        match name:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                texts.append("")
                is_open = True
            case "content_block_delta":
                assert is_open
                assert event["index"] == len(blocks) - 1
                kind = event["delta"].pop("type")
                [piece] = event["delta"].values()
                texts[-1] += piece if kind != "signature_delta" else ""
            case "content_block_stop":
                assert is_open
                assert event["index"] == len(blocks) - 1
                is_open = False
            case _:
                pytest.fail(name)
    assert not is_open
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert texts[:2] == ["Which city?", "Let me see."]
    assert [json.loads(text) for text in texts[2:]] == [{"city": "Rome"}] * 2
    assert [name for name, _ in found[-2:]] == ["message_delta", "message_stop"]
    end = found[-2][1]
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    whole = await Model(connect, thinking, text).answer(tools=[WEATHER])
    assert end["usage"] == whole["usage"]
    assert [block["type"] for block in whole["content"]] == [block["type"] for block in blocks]
    assert whole["content"][0]["thinking"] == "Which city?"
    assert whole["content"][1]["text"] == "Let me see."
    assert [block["input"] for block in whole["content"][2:]] == [{"city": "Rome"}] * 2
    assert whole["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("text", "fields", "reason", "sequence"),
    [
        ("Hello world, stop here", {"stop_sequences": [", stop", "x"]}, "stop_sequence", ", stop"),
        ("Hello", {}, "max_tokens", None),
        ("Hello", {"max_tokens": 5000}, "model_context_window_exceeded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_why_an_answer_ends(
    connect: Connect,
    tokenizer: Tokenizer,
    text: str,
    fields: dict[str, Any],
    reason: str,
    sequence: str | None,
    stream: bool,
) -> None:
    """An answer that fills the context ended for another reason than one that was cut by
    max_tokens."""
    if "max_tokens" not in fields:
        fields |= {"max_tokens": len(tokenizer.encode(text))}
    response = await Model(connect, tokenizer, text, ends=False).post(stream=stream, **fields)
    if stream:
        found = events(response.text)
        told = found[-2][1]["delta"]
        pieces = [e["delta"]["text"] for name, e in found if name == "content_block_delta"]
        assert "".join(pieces) == text.partition(", stop")[0]
    else:
        told = response.json()
        assert told["content"][0]["text"] == text.partition(", stop")[0]
    assert (told["stop_reason"], told["stop_sequence"]) == (reason, sequence)


async def test_a_limit_beyond_the_context_is_cut(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer)
    await model.answer(max_tokens=5000)
    [request] = model.engine.requests
    assert request.params.max_tokens == 1000 - len(request.prompt_token_ids)


async def test_an_empty_answer(connect: Connect, tokenizer: Tokenizer) -> None:
    assert (await Model(connect, tokenizer, "").answer())["content"] == []
    response = await Model(connect, tokenizer, "").post(stream=True)
    names = [name for name, _ in events(response.text)]
    assert names == ["message_start", "ping", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"city": "Ro', {"city": "Ro"}),
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
        ('{"n": 1e999', {}),
        ('{"a": "\\ud800b", "\\udc00": [1]}', {"a": "?b", "?": [1]}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('{"n": NaN}', {}),
        ('{"n": -Infinity}', {}),
        ("{city: 1}", {}),
        ("{" + '"a": {' * 300, {}),
    ],
)
async def test_arguments_that_are_sent_as_an_object(
    connect: Connect, tokenizer: Tokenizer, arguments: str, read: dict[str, Any]
) -> None:
    """Arguments come back as what can be read of them, whatever the model wrote, and the answer is
    JSON for strict parsers too."""
    text = '<tool_call>\n{"name": "weather", "arguments": ' + arguments
    model = Model(connect, tokenizer, text)
    model.engine.info = msgspec.structs.replace(INFO, max_model_len=5000)
    response = await model.post(tools=[WEATHER])
    assert response.status_code == 200, response.text
    assert msgspec.json.decode(response.content)["content"][0]["input"] == read


# ---- bodies ----------------------------------------------------------------------------------


async def test_the_system_prompt(connect: Connect, tokenizer: Tokenizer) -> None:
    """It is a text or a list of blocks, and a message of the role system is one as well."""
    cached = {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}
    for system in ("Be kind.", [cached]):
        prompt = await Model(connect, tokenizer).prompt_of(system=system)
        assert prompt == "<system>Be kind.<user>Hi<assistant>"
    said = [HI, {"role": "system", "content": "Be brief."}]
    prompt = await Model(connect, tokenizer).prompt_of(system=[cached, cached], messages=said)
    assert prompt == "<system>Be kind.\nBe kind.<user>Hi<system>Be brief.<assistant>"


async def test_calls_and_results_of_earlier_turns(connect: Connect, thinking: Tokenizer) -> None:
    answer = [
        {"type": "thinking", "thinking": "Which city?", "signature": ""},
        {"type": "text", "text": "Let me see."},
        USE,
        USE | {"id": "c2"},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "rain"},
        {
            "type": "tool_result",
            "tool_use_id": "c2",
            "content": [{"type": "text", "text": "no such city"}],
            "is_error": True,
        },
        {"type": "text", "text": "And now?"},
    ]
    turns = [HI, {"role": "assistant", "content": answer}, {"role": "user", "content": results}]
    prompt = await Model(connect, thinking).prompt_of(messages=turns, tools=[WEATHER])
    assert prompt == (
        "[weather <tool_call>]<user>Hi<assistant>(Which city?)Let me see."
        'weather{"city": "Rome"}weather{"city": "Rome"}'
        "<tool>rain<tool>Error\nno such city<user>And now?<assistant>"
    )


async def test_messages_of_one_role_are_joined(connect: Connect, tokenizer: Tokenizer) -> None:
    turns = [HI, HI, {"role": "assistant", "content": []}, HI]
    prompt = await Model(connect, tokenizer).prompt_of(messages=turns)
    assert prompt == "<user>Hi\nHi<assistant><user>Hi<assistant>"
    many = [{"role": "user", "content": [{"type": "text", "text": "x"}] * 600}] * 2
    response = await Model(connect, tokenizer).post(messages=many)
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("choice", "calls", "prompt"),
    [
        ({"type": "any"}, (True, True), "[weather <tool_call>]"),
        ({"type": "any", "disable_parallel_tool_use": True}, (True, False), "[weather <tool_call>"),
        ({"type": "tool", "name": "weather"}, (True, False), "[weather <tool_call>]"),
        ({"type": "auto"}, None, "[weather <tool_call>]"),
        ({"type": "none"}, None, "<user>"),
    ],
)
async def test_tool_choice(
    connect: Connect,
    tokenizer: Tokenizer,
    choice: dict[str, Any],
    calls: tuple[bool, bool] | None,
    prompt: str,
) -> None:
    """A grammar forces a call where one is required, and several where several are allowed."""
    model = Model(connect, tokenizer, CALL)
    assert (await model.prompt_of(tools=[WEATHER], tool_choice=choice)).startswith(prompt)
    form = model.engine.requests[0].structured_output
    if calls is None:
        assert form is None
        return
    assert form is not None
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [END])
    texts = (CALL, f"{CALL}\n{CALL}")
    assert tuple(follow(backend, tokenizer, form, text) for text in texts) == calls
    assert not follow(backend, tokenizer, form, "It rains.")


async def test_sampling_settings(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer)
    await model.answer(temperature=0.5, top_p=0.9, top_k=7, max_tokens=9)
    params = model.engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
    assert params.max_tokens == 9


async def test_an_answer_in_a_schema(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer, "{}")
    await model.answer(output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    form = model.engine.requests[0].structured_output
    assert form is not None
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [END])
    assert follow(backend, tokenizer, form, '{"city": "Rome"}')
    assert not follow(backend, tokenizer, form, "{}")
    model = Model(connect, tokenizer, CALL)
    output = {"format": {"type": "json_schema", "schema": SCHEMA}}
    await model.answer(output_config=output, tools=[WEATHER])
    form = model.engine.requests[0].structured_output
    assert form is not None
    followed = [follow(backend, tokenizer, form, text) for text in (CALL, '{"city": "x"}', "x")]
    assert followed == [True, True, False]
    wrong = {"format": {"type": "json_schema", "schema": {"type": "strange"}}}
    response = await Model(connect, tokenizer).post(output_config=wrong)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("output_config: ")


async def test_the_last_answer_is_continued(connect: Connect, tokenizer: Tokenizer) -> None:
    model = Model(connect, tokenizer, text="noon.")
    begun = [HI, {"role": "assistant", "content": [{"type": "text", "text": "It is "}]}]
    answer = await model.answer(messages=begun)
    assert [block["text"] for block in answer["content"]] == ["noon."]
    prompt = tokenizer.decode(model.engine.requests[-1].prompt_token_ids)
    assert prompt.endswith("It is ")


@pytest.mark.parametrize(
    ("template", "thinks", "seen"),
    [
        (THINKING, {"type": "enabled", "budget_tokens": 1024}, "True"),
        (THINKING, {"type": "disabled"}, "False"),
        (THINKING, {"type": "adaptive"}, ""),
        (THINKING, None, ""),
        (OTHER_THINKING, {"type": "enabled", "budget_tokens": 1024}, "True"),
        (OTHER_THINKING, {"type": "disabled"}, "False"),
        (OTHER_THINKING, {"type": "adaptive"}, ""),
        (ALWAYS_THINKING, {"type": "enabled", "budget_tokens": 1024}, ""),
        (ALWAYS_THINKING, {"type": "disabled"}, None),
        (TEMPLATE, {"type": "disabled"}, ""),
        (TEMPLATE, {"type": "adaptive"}, ""),
        (TEMPLATE, {"type": "enabled", "budget_tokens": 1024}, None),
    ],
)
async def test_thinking(
    connect: Connect,
    make_tokenizer: Callable[[str], Tokenizer],
    template: str,
    thinks: dict[str, Any] | None,
    seen: str | None,
) -> None:
    """The template is told whether the model reasons, if it can be told; what the model cannot do
    is refused."""
    model = Model(connect, make_tokenizer(template))
    if seen is None:
        error = (await model.post(thinking=thinks)).json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith("thinking ")
        return
    assert (await model.prompt_of(thinking=thinks)).endswith(f"<assistant>{seen}")


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"user_id": "someone"}, "service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}, "speed": "fast"},
        {"mcp_servers": [], "container": None, "context_management": {"edits": []}},
        {"output_config": {"effort": "high"}, "thinking": {"type": "disabled"}},
        {"tools": [WEATHER | {"type": "custom", "strict": True, "cache_control": {}}]},
        {"tools": [WEATHER | {"defer_loading": False, "eager_input_streaming": True}]},
        {"tools": [WEATHER | {"name": "a" * 128}]},
    ],
)
async def test_fields_that_change_nothing(
    connect: Connect, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    assert (await Model(connect, tokenizer).answer(**fields))["stop_reason"] == "end_turn"


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://a.example/x.png"}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"n": 2}, "n"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_config": {"effort": "low"}}, "effort"),
        ({"messages": []}, "'messages'"),
        ({"messages": [HI, {"role": "assistant", "content": [USE]}]}, "last message"),
        ({"messages": [{"role": "user", "content": []}]}, "content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'messages[0].content[0]'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "thinking",
        ),
        ({"tools": [{"name": "f"}]}, "'tools[0].input_schema'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools[0].type'"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "defer_loading"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "'thinking.display'"),
    ],
)
async def test_what_is_refused(
    connect: Connect, tokenizer: Tokenizer, fields: dict[str, Any], named: str
) -> None:
    """What is not supported, and what is wrong, is refused with its name in Anthropic's shape."""
    model = Model(connect, tokenizer)
    response = await model.post(**fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert not model.engine.requests


# ---- tokens, keys and errors -----------------------------------------------------------------


async def test_count_tokens(connect: Connect, thinking: Tokenizer) -> None:
    """The count is that of the prompt which the same message has, also if it is too long."""
    body = {"system": "Be kind.", "tools": [WEATHER], "thinking": {"type": "disabled"}}
    response = await Model(connect, thinking).post(f"{PATH}/count_tokens", **body)
    message = await Model(connect, thinking).answer(**body)
    usage = message["usage"]
    count = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert response.json() == {"input_tokens": count}
    long = [{"role": "user", "content": "many words " * 2000}]
    response = await Model(connect, thinking).post(f"{PATH}/count_tokens", messages=long)
    assert response.json()["input_tokens"] > INFO.max_model_len
    refused = await Model(connect, thinking).post(f"{PATH}/count_tokens", max_tokens=3)
    assert refused.status_code == 400


async def test_errors_have_the_shape_of_their_path(connect: Connect, tokenizer: Tokenizer) -> None:
    body = {"messages": [HI], "max_tokens": 5}
    engine = FakeEngine(outputs([65, END], FinishReason.STOP))
    settings = ServerConfig(api_keys=("key",))
    async with connect(engine, settings=settings, max_body_bytes=5000) as client:
        found = [
            await client.post(PATH, json=body),
            await client.post(f"{PATH}/nowhere", headers={"x-api-key": "key"}),
            await client.get(PATH, headers={"x-api-key": "key"}),
            await client.post(PATH, content="x" * 6000, headers={"x-api-key": "key"}),
            await client.post(PATH, content="{}", headers={"x-api-key": "key"}),
            await client.post(PATH, json=body | {"model": "x"}, headers={"x-api-key": "key"}),
        ]
        good = await client.post(PATH, json=body, headers={"x-api-key": "key"})
        other = await client.post("/v1/messagess", headers={"x-api-key": "key"})
    assert [(one.status_code, one.json()["error"]["type"]) for one in found] == [
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (404, "not_found_error"),
    ]
    assert all(one.json()["type"] == "error" for one in found)
    assert good.status_code == 200
    assert "type" not in other.json()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFullError("full", retry_after=3), 429, "rate_limit_error"),
        (EngineNotReadyError("loading"), 503, "overloaded_error"),
        (RuntimeError("a secret"), 500, "api_error"),
    ],
)
async def test_errors_before_and_within_an_answer(
    connect: Connect,
    tokenizer: Tokenizer,
    error: Exception,
    status: int,
    kind: str,
    stream: bool,
) -> None:
    model = Model(connect, tokenizer)
    model.engine.script = lambda request: [error]
    response = await model.post(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert "secret" not in response.text
    if status == 429:
        assert response.headers["retry-after"] == "3"
    if stream:
        model = Model(connect, tokenizer)
        model.engine.script = lambda request: [*outputs([300, 301])(request)[:1], error]
        *_, (name, event) = events((await model.post(stream=True)).text)
        assert (name, event["error"]["type"]) == ("error", kind)

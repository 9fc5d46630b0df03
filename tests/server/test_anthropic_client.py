"""The official client of Anthropic's API works against the application with a fake engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.config import ServerConfig
from minisrv.errors import EngineNotReadyError, QueueFullError
from minisrv.request import FinishReason
from minisrv.server.app import create_app
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs
from tests.server.live_server import serve
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}"
    "{{ m.reasoning_content }}{% endfor %}{# <think></think> <tool_call> #}"
)
REASONING = "Which city?"
TEXT = "Let me see 🎉."
CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}\n</tool_call>'
)
INPUT = {"city": "Rome", "days": [1, 2]}
ANSWER = f"<think>\n{REASONING}\n</think>\n\n{TEXT}\n{CALL}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
ASKED: Any = {
    "model": "tiny",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Will it rain?"}],
    "tools": [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}],
}
KEY = "a key"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("client"))
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return tokenizer_of(directory)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    ids = [*tokenizer.encode(ANSWER), 2]
    engine = FakeEngine(outputs(ids, FinishReason.STOP, cached=4))
    engine.info = msgspec.structs.replace(INFO, max_model_len=2000)
    return engine


@pytest.fixture
async def client(
    tokenizer: Tokenizer, engine: FakeEngine
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    app = create_app(
        engine,
        tokenizer,
        served_model_names=("tiny",),
        generation=GenerationConfig(),
        settings=ServerConfig(api_keys=(KEY,)),
        max_body_bytes=20_000,
    )
    async with serve(app) as (host, port):
        url = f"http://{host}:{port}"
        options: dict[str, Any] = {"base_url": url, "api_key": KEY, "max_retries": 0}
        async with anthropic.AsyncAnthropic(**options) as client:
            yield client


def check(message: anthropic.types.Message) -> None:
    """Check that a message is the whole answer."""
    thinking, text, call = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking == REASONING
    assert text.type == "text"
    assert text.text == TEXT
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", INPUT)
    assert message.stop_reason == "tool_use"
    assert message.usage.cache_read_input_tokens == 4


async def test_a_message(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(**ASKED)
    check(message)
    assert message.model == "tiny"
    assert len(message._request_id or "") == 32


async def test_a_message_streamed(client: anthropic.AsyncAnthropic) -> None:
    """The stream goes through the client's own accumulator, which is strict about the order of
    events."""
    async with client.messages.stream(**ASKED) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    check(message)
    assert kinds[0] == "message_start"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert {"thinking", "text", "input_json"} <= set(kinds)
    assert kinds[-1] == "message_stop"


async def test_raw_events(client: anthropic.AsyncAnthropic) -> None:
    events = [event async for event in await client.messages.create(**ASKED, stream=True)]
    assert events[0].type == "message_start"
    assert events[-1].type == "message_stop"


async def test_a_tool_and_its_result(
    client: anthropic.AsyncAnthropic, tokenizer: Tokenizer, engine: FakeEngine
) -> None:
    """An answer is sent back as the client holds it, with the result of its call."""
    message = await client.messages.create(**ASKED)
    call = message.content[-1]
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."}
    turns: Any = [
        *ASKED["messages"],
        message.to_param(),
        {"role": "user", "content": [result]},
    ]
    check(await client.messages.create(**ASKED | {"messages": turns}))
    prompt = tokenizer.decode(engine.requests[1].prompt_token_ids)
    for told in (REASONING, TEXT, str(INPUT), "tool: It rains."):
        assert told in prompt


async def test_a_stop_sequence(client: anthropic.AsyncAnthropic) -> None:
    message = await client.messages.create(**ASKED, stop_sequences=["see"])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == "see"
    assert message.content[-1].type == "text"


async def test_the_beta_api(client: anthropic.AsyncAnthropic) -> None:
    message = await client.beta.messages.create(**ASKED, betas=["something-2026-01-01"])
    assert message.content[-1].type == "tool_use"


async def test_count_tokens(client: anthropic.AsyncAnthropic) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    count = await client.messages.count_tokens(**asked)
    usage = (await client.messages.create(**ASKED)).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


async def test_errors(client: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    with pytest.raises(anthropic.BadRequestError, match="'max_tokens'") as bad:
        await client.messages.create(**ASKED | {"max_tokens": -1})
    assert bad.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(**ASKED | {"model": "gpt"})
    with pytest.raises(anthropic.AuthenticationError):
        await client.with_options(api_key="another").messages.create(**ASKED)
    with pytest.raises(anthropic.RequestTooLargeError):
        await client.messages.create(**ASKED | {"system": "x" * 30_000})
    engine.script = lambda request: [QueueFullError("full")]
    with pytest.raises(anthropic.RateLimitError):
        await client.messages.create(**ASKED)
    engine.script = lambda request: [EngineNotReadyError("loading")]
    with pytest.raises(anthropic.ServiceUnavailableError):
        await client.messages.create(**ASKED)


async def test_an_error_inside_a_stream(
    client: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    engine.script = lambda request: [*outputs([300, 301])(request)[:1], QueueFullError("late")]
    with pytest.raises(anthropic.APIStatusError, match="late"):
        async with client.messages.stream(**ASKED) as stream:
            await stream.get_final_message()


async def test_a_client_that_leaves(client: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    async with client.messages.stream(**ASKED) as stream:
        async for _ in stream:
            break
    assert (await client.messages.create(**ASKED)).stop_reason == "tool_use"
    assert engine.admission.num_taken == 0

"""The official client works against the application with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.errors import QueueFullError
from minisrv.request import FinishReason
from minisrv.server.app import create_app
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, outputs, scored
from tests.server.live_server import serve

pytestmark = pytest.mark.anyio

TEXT = "Hello world 🎉, stop here"
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    script = outputs([*tokenizer.encode(TEXT), 2], FinishReason.STOP, logprobs=2)
    return FakeEngine(script)


@pytest.fixture
async def client(tokenizer: Tokenizer, engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(engine, tokenizer, served_model_names=("tiny",), generation=GenerationConfig())
    async with serve(app) as (host, port):
        url = f"http://{host}:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


async def test_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt="hi", seed=3, logprobs=1)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert "".join(answer.choices[0].logprobs.tokens or []).startswith("Hello")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(answer._request_id or "") == 32


async def test_completion_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="tiny", prompt=[[1, 2], [3]], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(choice.text for choice in choices) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 3


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stop=[", stop"], logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "Hello world 🎉"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    again: Any = [*MESSAGES, answer.choices[0].message, *MESSAGES]
    assert (await client.chat.completions.create(model="tiny", messages=again)).choices


async def test_chat_streamed(client: openai.AsyncOpenAI) -> None:
    """The stream goes through the client's own accumulator, which is strict about the order of
    chunks."""
    async with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None


async def test_extensions(client: openai.AsyncOpenAI) -> None:
    extra = {"top_k": 5, "ignore_eos": True, "return_token_ids": True, "include_graph_steps": True}
    answer = await client.completions.create(model="tiny", prompt="hi", extra_body=extra)
    choice: Any = answer.choices[0]
    assert len(choice.token_ids) == answer.usage.completion_tokens
    assert choice.graph_steps == {"FULL/pure_decode": 5, "PIECEWISE/has_prefill": 1}


async def test_what_changes_logits(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        logit_bias={"5": -100},
        presence_penalty=0.5,
        frequency_penalty=-1,
        extra_body={"min_tokens": 3, "repetition_penalty": 1.2},
    )
    params = engine.requests[0].params
    assert (params.logit_bias, params.presence_penalty) == ({5: -100.0}, 0.5)
    assert (params.frequency_penalty, params.repetition_penalty) == (-1, 1.2)
    assert params.min_tokens == 3


async def test_echo(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = scored(engine.script, 1)
    answer = await client.completions.create(
        model="tiny", prompt="hi there", echo=True, logprobs=1, max_tokens=1
    )
    assert answer.choices[0].text == "hi there" + TEXT
    assert answer.choices[0].logprobs is not None
    assert (answer.choices[0].logprobs.token_logprobs or [0])[0] is None


async def test_choices(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    chat = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=5)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert [choice.message.content for choice in chat.choices] == [TEXT] * 3
    assert [request.params.seed for request in engine.requests] == [5, 6, 7]
    one = await client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert chat.usage is not None
    assert one.usage is not None
    assert chat.usage.prompt_tokens == one.usage.prompt_tokens
    assert chat.usage.completion_tokens == 3 * one.usage.completion_tokens
    stream = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, stream=True)
    found = [""] * 4
    async for chunk in stream:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == [TEXT] * 4


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).object == "model"


async def test_errors(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, n=129)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="gpt", prompt="hi")
    assert missing.value.code == "model_not_found"
    engine.script = lambda request: [QueueFullError("full")]
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="tiny", prompt="hi", stream=True)


async def test_an_error_inside_a_stream(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: [*outputs([300, 301])(request)[:1], QueueFullError("late")]
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="late"):
        async for _ in stream:
            pass

"""POST /v1/chat/completions: shapes of answers, streaming and chat templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from minisrv.request import FinishReason
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import GRAPH_STATS, INFO, STEPS, FakeEngine, outputs, scored, sse
from tests.text import tiny_tokenizer

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
MESSAGES = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TEXT = "Hello world 🎉"
END = 2  # <|im_end|>


async def test_prompt_logprobs(connect: Connect) -> None:
    engine = FakeEngine(scored(outputs([300, END], FinishReason.STOP), 1))
    body = (await post(connect(engine), prompt_logprobs=1)).json()
    assert len(body["prompt_logprobs"]) == len(engine.requests[0].prompt_token_ids)
    assert body["prompt_logprobs"][0] is None
    assert engine.requests[0].params.prompt_logprobs == 1


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    async with client:
        return await client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})


async def test_a_whole_answer(connect: Connect, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(TEXT), END]
    engine = FakeEngine(outputs(ids, FinishReason.STOP))
    body = (await post(connect(engine), model="org/tiny")).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_600_000_000
    prompt = tokenizer.apply_chat_template([MESSAGES[0] | {"role": "system"}, MESSAGES[1]])
    assert engine.requests[0].prompt_token_ids == prompt
    assert body == {
        "object": "chat.completion",
        "model": "org/tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": TEXT,
                    "refusal": None,
                    "reasoning": None,
                    "reasoning_content": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "token_ids": None,
            }
        ],
        "prompt_token_ids": None,
        "prompt_logprobs": None,
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "total_tokens": len(prompt) + len(ids),
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_a_stream(connect: Connect, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(TEXT), END]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    engine = FakeEngine(outputs(ids, FinishReason.STOP, cached=16))
    response = await post(connect(engine), cache_salt="mine", **options)
    assert engine.requests[0].cache_salt == "mine"
    first, *parts, last, usage = sse(response.text)
    everything = [first, *parts, last, usage]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in everything}) == 1
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == TEXT
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *parts])
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "token_ids": None,
    }
    assert first["prompt_token_ids"] is None
    assert all(chunk["usage"] is None for chunk in [first, *parts, last])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids)
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_the_role_counts_no_token(connect: Connect) -> None:
    """The first chunk, which has the role only, reports no completion token in its usage."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    script = outputs([300, 301], cached=3)
    response = await post(connect(script), n=2, stream=True, stream_options=options)
    *chunks, last = sse(response.text)
    prompt = last["usage"]["prompt_tokens"]
    for index in range(2):
        told = [c["usage"] for c in chunks if c["choices"][0]["index"] == index]
        assert [t["completion_tokens"] for t in told] == [0, 1, 2, 2]
        assert {t["prompt_tokens"] for t in told} == {prompt}
        assert all(t["total_tokens"] == prompt + t["completion_tokens"] for t in told)
        assert {t["prompt_tokens_details"]["cached_tokens"] for t in told} == {3}
    assert last["usage"]["completion_tokens"] == 4


async def test_an_answer_without_text_still_has_its_role(connect: Connect) -> None:
    response = await post(connect(outputs([END], FinishReason.STOP)), stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in sse(response.text)]
    assert deltas == [{"role": "assistant", "content": ""}, {}]


async def test_the_answer_may_fill_the_context(connect: Connect) -> None:
    """Without a limit in the request, max_tokens is what the prompt leaves of the context."""
    engine = FakeEngine(outputs([300]))
    await post(connect(engine))
    (request,) = engine.requests
    assert request.params.max_tokens == INFO.max_model_len - len(request.prompt_token_ids)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_under_either_name(connect: Connect, name: str) -> None:
    engine = FakeEngine(outputs([300]))
    await post(connect(engine), **{name: 7})
    assert engine.requests[0].params.max_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string(connect: Connect, tokenizer: Tokenizer, stream: bool) -> None:
    engine = FakeEngine(outputs(tokenizer.encode("Hello world, stop here and there")))
    response = await post(connect(engine), stop="stop here", stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in sse(response.text)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
    else:
        (choice,) = response.json()["choices"]
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
    assert text == "Hello world, "
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_token_ids_and_graph_steps(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = [*tokenizer.encode(TEXT), END]
    response = await post(
        connect(outputs(ids, FinishReason.STOP, logprobs=3)),
        logprobs=True,
        top_logprobs=3,
        return_token_ids=True,
        include_graph_steps=True,
        stream=stream,
    )
    bodies = sse(response.text) if stream else [response.json()]
    choices = [body["choices"][0] for body in bodies]
    content = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert (
        bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT + "<|im_end|>"
    )
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids)
    assert [[top["logprob"] for top in e["top_logprobs"]] for e in content] == [
        [-0.5, -1.5, -2.5]
    ] * len(ids)
    assert [i for choice in choices for i in choice["token_ids"] or ()] == ids
    assert len(bodies[0]["prompt_token_ids"]) > 0
    assert all("prompt_token_ids" not in body for body in bodies[1:])
    assert choices[-1]["graph_steps"] == STEPS
    assert choices[-1]["graph_stats"]["id"] == GRAPH_STATS.id


async def test_a_template_that_refuses_is_a_400(connect: Connect) -> None:
    messages = [{"role": "assistant", "content": "me first"}]
    response = await post(connect(outputs([300])), messages=messages)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "the first message must not be from the assistant" in error["message"]
    assert error["param"] == "messages"


async def test_without_a_template_chat_is_a_400_and_completions_work(connect: Connect) -> None:
    bare = Tokenizer(tiny_tokenizer.byte_level())
    response = await post(connect(outputs([300]), tokenizer=bare))
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
    async with connect(outputs([300]), tokenizer=bare) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 200

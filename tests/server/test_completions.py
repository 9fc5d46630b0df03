"""POST /v1/completions: shapes of answers, streaming and several prompts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.errors import QueueFullError
from minisrv.request import EngineOutput, FinishReason, GraphStats
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import GRAPH_STATS, INFO, STEPS, FakeEngine, outputs, scored, sse

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
TEXT = "Hello world 🎉 stop here"


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    async with client:
        return await client.post("/v1/completions", json={"prompt": "hi", **body})


async def test_a_whole_completion(connect: Connect, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    engine = FakeEngine(outputs([*ids, 2], FinishReason.STOP))
    response = await post(connect(engine), max_tokens=50)
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_600_000_000
    prompt = len(tokenizer.encode("hi"))
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": TEXT,
                "logprobs": None,
                "finish_reason": "stop",
                "token_ids": None,
                "prompt_token_ids": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": len(ids) + 1,
            "total_tokens": prompt + len(ids) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    request = engine.requests[0]
    assert request.prompt_token_ids == tokenizer.encode("hi")
    assert request.params.max_tokens == 50
    assert request.params.temperature == 0.7  # the default of the checkpoint
    assert engine.aborted == []


async def test_a_stream(connect: Connect, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await post(connect(outputs(ids)), **options)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = sse(response.text)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    *parts, usage = chunks
    choices = [part["choices"][0] for part in parts]
    assert "".join(choice["text"] for choice in choices) == TEXT
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert all(part["usage"] is None for part in parts)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids)


@pytest.mark.parametrize("stop", [None, "wor"])
@pytest.mark.parametrize("stream", [True, False])
async def test_cached_tokens_of_all_prompts(
    connect: Connect, tokenizer: Tokenizer, stream: bool, stop: str | None
) -> None:
    """The cached tokens of all prompts are added up, also when a stop string ends a choice before
    the engine does."""
    engine = FakeEngine(outputs(tokenizer.encode(TEXT), cached=16))
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await post(connect(engine), prompt=["a", "b"], stop=stop, **options)
    body = sse(response.text)[-1] if stream else response.json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


@pytest.mark.parametrize("stream", [True, False])
async def test_choices_of_several_prompts(connect: Connect, stream: bool) -> None:
    """The choices of a prompt have consecutive indices, and usage counts the prompt once."""
    engine = FakeEngine(outputs([300, 301], cached=1))
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    prompts = [[1, 2], [3, 4, 5]]
    response = await post(
        connect(engine), prompt=prompts, n=3, seed=9, return_token_ids=True, **options
    )
    bodies = sse(response.text) if stream else [response.json()]
    told = {
        choice["index"]: choice["prompt_token_ids"]
        for body in bodies
        for choice in body["choices"]
        if choice.get("prompt_token_ids")
    }
    assert told == {0: [1, 2], 1: [1, 2], 2: [1, 2], 3: [3, 4, 5], 4: [3, 4, 5], 5: [3, 4, 5]}
    asked = [(request.prompt_token_ids, request.params.seed) for request in engine.requests]
    assert asked == [(prompt, 9 + choice) for prompt in prompts for choice in range(3)]
    usage = bodies[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 12)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_more_choices_than_places(connect: Connect) -> None:
    """A request with more choices than the engine can ever hold is refused with 400."""
    engine = FakeEngine(outputs([300]))
    engine.info = msgspec.structs.replace(INFO, max_num_seqs=1, max_waiting=1)
    error = (await post(connect(engine), n=3)).json()["error"]
    assert (error["param"], error["type"]) == ("n", "invalid_request_error")
    assert engine.requests == []


async def test_usage_in_every_chunk(connect: Connect) -> None:
    """Each chunk reports the usage of the choice that it belongs to, and the last one the usage of
    all choices, as in vLLM."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    script = outputs([300, 301, 302], cached=1)
    response = await post(
        connect(script), prompt=[[1, 2], [3]], n=2, stream=True, stream_options=options
    )
    *chunks, last = sse(response.text)
    for index, prompt in enumerate([2, 2, 1, 1]):
        told = [c["usage"] for c in chunks if c["choices"][0]["index"] == index]
        assert [(t["prompt_tokens"], t["completion_tokens"]) for t in told] == [
            (prompt, 1),
            (prompt, 2),
            (prompt, 3),
        ]
        assert {t["prompt_tokens_details"]["cached_tokens"] for t in told} == {1}
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 12)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_usage_in_every_chunk_needs_usage(connect: Connect) -> None:
    """continuous_usage_stats without include_usage adds no usage to any chunk."""
    options = {"include_usage": False, "continuous_usage_stats": True}
    response = await post(connect(outputs([300])), stream=True, stream_options=options)
    assert all("usage" not in chunk for chunk in sse(response.text))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_string_may_stay(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = tokenizer.encode("Hello world, stop here and there")
    options = {"include_stop_str_in_output": True, "stream": stream}
    response = await post(connect(outputs(ids)), stop=["stop"], **options)
    bodies = sse(response.text) if stream else [response.json()]
    assert "".join(body["choices"][0]["text"] for body in bodies) == "Hello world, stop"
    response = await post(connect(outputs(ids, FinishReason.STOP)), **options)
    bodies = sse(response.text) if stream else [response.json()]
    text = "".join(body["choices"][0]["text"] for body in bodies)
    assert text == "Hello world, stop here and there", "the stop token has its text"
    assert bodies[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_salt_reaches_the_engine(connect: Connect) -> None:
    engine = FakeEngine(outputs([300]))
    await post(connect(engine), prompt=["a", "b"], cache_salt="mine")
    await post(connect(engine))
    assert [request.cache_salt for request in engine.requests] == ["mine", "mine", None]


async def test_a_stream_has_no_usage_unless_asked(connect: Connect) -> None:
    """No chunk has a `usage` field unless the request asks for it."""
    response = await post(connect(outputs([300, 301])), stream=True)
    assert all("usage" not in chunk for chunk in sse(response.text))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["a", "b", "c"], [[1, 2], [3], [4]]])
async def test_several_prompts(
    connect: Connect, tokenizer: Tokenizer, stream: bool, prompts: list[Any]
) -> None:
    texts = ["first one", "second 🎉", "third, the longest of all"]

    def script(request: Any) -> Any:
        index = int(request.request_id.rpartition("-")[2])
        return outputs(tokenizer.encode(texts[index]))(request)

    engine = FakeEngine(script)
    response = await post(connect(engine), prompt=prompts, stream=stream)
    assert len({request.request_id for request in engine.requests}) == 3
    found = ["", "", ""]
    reasons: list[list[str]] = [[], [], []]
    bodies = sse(response.text) if stream else [response.json()]
    for choice in (choice for body in bodies for choice in body["choices"]):
        found[choice["index"]] += choice["text"]
        reasons[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert found == texts
    assert reasons == [["length"]] * 3


async def test_one_failing_prompt_aborts_the_others(connect: Connect) -> None:
    """If the engine refuses one prompt, the answer is its error and the other prompts are
    aborted."""

    def script(request: Any) -> Any:
        if request.request_id.endswith("-2"):
            return [QueueFullError("Too many requests are waiting.", retry_after=7)]
        return [EngineOutput(request_id=request.request_id, token_ids=[300]), asyncio.Event()]

    engine = FakeEngine(script)
    response = await post(connect(engine), prompt=["a", "b", "c"], stream=True)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["code"] == "queue_full"
    assert sorted(i[-2:] for i in engine.aborted) == ["-0", "-1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [False, True])
async def test_a_stop_string_cuts_and_aborts(
    connect: Connect, tokenizer: Tokenizer, stream: bool, steps: bool
) -> None:
    """The text ends before the stop string, and the engine is told to abort the request."""
    ids = tokenizer.encode("Hello world, stop here and there")
    engine = FakeEngine(outputs(ids))
    options = {"stop": ["stop h", "here"], "include_graph_steps": steps, "stream": stream}
    response = await post(connect(engine), **options)
    bodies = sse(response.text) if stream else [response.json()]
    choices = [body["choices"][0] for body in bodies]
    assert "".join(choice["text"] for choice in choices) == "Hello world, "
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1].get("graph_steps") == (STEPS if steps else None)
    if steps:  # the engine answered the abort with a last output, which has the steps
        assert engine.asked_to_abort == {engine.requests[0].request_id}
    else:
        assert engine.aborted == [engine.requests[0].request_id]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_character_split_over_tokens(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    pieces = tokenizer.token_bytes
    assert pieces is not None
    single = {pieces[i]: i for i in range(tokenizer.vocab_size)}
    ids = [single[bytes([byte])] for byte in "a€🎉".encode()]
    response = await post(connect(outputs(ids)), stream=stream)
    if stream:
        texts = [chunk["choices"][0]["text"] for chunk in sse(response.text)]
        assert texts == ["a", "€", "🎉"]  # no chunk has half a character
    else:
        assert response.json()["choices"][0]["text"] == "a€🎉"


async def test_the_token_that_ends_a_choice_has_no_text(
    connect: Connect, tokenizer: Tokenizer
) -> None:
    """An end-of-sequence token has its id in the answer, and no text."""
    ids = tokenizer.encode("Hello world")
    response = await post(connect(outputs(ids, FinishReason.STOP)), return_token_ids=True)
    choice = response.json()["choices"][0]
    assert choice["text"] == tokenizer.decode(ids[:-1])
    assert choice["token_ids"] == ids


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_and_graph_steps(
    connect: Connect, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = [*tokenizer.encode("Hello world"), 2]
    response = await post(
        connect(outputs(ids, FinishReason.STOP)),
        return_token_ids=True,
        include_graph_steps=True,
        stream=stream,
    )
    bodies = sse(response.text) if stream else [response.json()]
    choices = [body["choices"][0] for body in bodies]
    assert [i for choice in choices for i in choice["token_ids"]] == ids
    assert choices[0]["prompt_token_ids"] == tokenizer.encode("hi")
    assert choices[-1]["graph_steps"] == STEPS
    assert msgspec.convert(choices[-1]["graph_stats"], GraphStats) == GRAPH_STATS
    assert all("prompt_token_ids" not in c and "graph_steps" not in c for c in choices[1:-1])


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(connect: Connect, tokenizer: Tokenizer, stream: bool) -> None:
    ids = [*tokenizer.encode("Hello world"), 2]
    script = outputs(ids, FinishReason.STOP, logprobs=2)
    response = await post(connect(script), logprobs=2, stream=stream)
    bodies = sse(response.text) if stream else [response.json()]
    found: dict[str, list[Any]] = {}
    for body in bodies:
        for name, values in (body["choices"][0]["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values)
    texts = [tokenizer.token_text(i)[0] for i in ids]  # including the token that ended the choice
    assert found["tokens"] == texts
    assert found["token_logprobs"] == [-0.5] * len(texts)
    assert found["text_offset"] == [len("".join(texts[:i])) for i in range(len(texts))]
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(texts)
    assert all(text in top for top, text in zip(found["top_logprobs"], texts, strict=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo(connect: Connect, tokenizer: Tokenizer, stream: bool, as_ids: bool) -> None:
    """The answer begins with the prompt, whose log-probabilities begin with null."""
    prompt, ids = "Hello there 🎉", tokenizer.encode(" world")
    prompt_ids = tokenizer.encode(prompt)
    engine = FakeEngine(scored(outputs(ids, logprobs=2), 2))
    options = {"echo": True, "logprobs": 2, "stream": stream, "n": 2}
    response = await post(connect(engine), prompt=prompt_ids if as_ids else prompt, **options)
    assert [request.params.prompt_logprobs for request in engine.requests] == [2, 2]
    bodies = sse(response.text) if stream else [response.json()]
    for index in range(2):
        choices = [c for body in bodies for c in body["choices"] if c["index"] == index]
        assert "".join(choice["text"] for choice in choices) == prompt + " world"
        assert choices[0]["text"].startswith(prompt)
        found: dict[str, list[Any]] = {}
        for choice in choices:
            for name, values in (choice["logprobs"] or {}).items():
                found.setdefault(name, []).extend(values)
        spelled = [tokenizer.token_text(i)[0] for i in (*prompt_ids, *ids)]
        assert len(found["tokens"]) == len(spelled)
        assert found["token_logprobs"] == [None] + [-0.5] * (len(spelled) - 1)
        assert found["top_logprobs"][0] is None
        assert all(len(top) == 2 for top in found["top_logprobs"][1:])
        assert found["text_offset"][0] == 0
        assert found["text_offset"][len(prompt_ids)] == len(prompt)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_a_token_that_ends_the_text(connect: Connect, stream: bool) -> None:
    """A client that scores a text asks for one token after it and drops the last entry. That token
    is often an end-of-sequence token, which once had no entry, so that the text's own last token
    was dropped."""
    engine = FakeEngine(scored(outputs([2], FinishReason.STOP, logprobs=1), 1))
    options = {"echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream}
    response = await post(connect(engine), prompt=[5, 6, 7], **options)
    bodies = sse(response.text) if stream else [response.json()]
    logprobs = [choice["logprobs"] for body in bodies for choice in body["choices"]]
    found = [value for part in logprobs if part for value in part["token_logprobs"]]
    assert found == [None, -0.5, -0.5, -0.5]


async def test_echo_alone(connect: Connect) -> None:
    """Without logprobs, an echo asks the engine for no log-probabilities of the prompt."""
    engine = FakeEngine(outputs([300]))
    choice = (await post(connect(engine), echo=True)).json()["choices"][0]
    assert choice["text"].startswith("hi")
    assert choice["logprobs"] is None
    assert engine.requests[0].params.prompt_logprobs is None


async def test_a_prompt_alone(connect: Connect, tokenizer: Tokenizer) -> None:
    """lm-eval sends max_tokens=0 with echo to score a text; the prompt may fill the whole context
    then."""

    def script(request: Any) -> Any:
        return [EngineOutput(request_id=request.request_id, finish_reason=FinishReason.LENGTH)]

    engine = FakeEngine(scored(script, 1))
    ids = [300] * INFO.max_model_len
    options = {"max_tokens": 0, "echo": True, "logprobs": 1}
    body = (await post(connect(engine), prompt=ids, **options)).json()
    choice = body["choices"][0]
    assert engine.requests[0].params.max_tokens == 0
    assert (choice["text"], choice["finish_reason"]) == (tokenizer.decode(ids), "length")
    assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
    assert body["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs(connect: Connect, tokenizer: Tokenizer) -> None:
    """The prompt's log-probabilities have vLLM's form, beside those of the completion."""
    engine = FakeEngine(scored(outputs([300], logprobs=1), 3))
    response = await post(connect(engine), prompt=[5, 6, 7, 8], prompt_logprobs=2, logprobs=1)
    choice = response.json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in others] == [["6", "7"], ["7", "8"], ["8", "9"]]
    own = {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(6)[0]}
    assert others[0]["6"] == own
    assert others[0]["7"] == {
        "logprob": -1.5,
        "rank": 2,
        "decoded_token": tokenizer.token_text(7)[0],
    }
    assert len(choice["logprobs"]["tokens"]) == 1


async def test_max_tokens_default_to_sixteen_or_what_fits(connect: Connect) -> None:
    for length, expected in ((10, 16), (INFO.max_model_len - 5, 5)):
        engine = FakeEngine(outputs([300]))
        assert (await post(connect(engine), prompt=[7] * length)).status_code == 200
        assert engine.requests[0].params.max_tokens == expected


async def test_a_long_prompt_is_tokenised_beside_the_event_loop(
    connect: Connect, tokenizer: Tokenizer
) -> None:
    """A prompt of 36,000 characters, which is tokenised in a thread, gives the right ids."""
    engine = FakeEngine(outputs([300]))
    engine.info = msgspec.structs.replace(INFO, max_model_len=100_000)
    text = "hello world " * 3000
    assert (await post(connect(engine), prompt=text)).status_code == 200
    assert engine.requests[0].prompt_token_ids == tokenizer.encode(text)


async def test_the_body_is_json_as_everyone_writes_it(connect: Connect) -> None:
    response = await post(connect(outputs([300])))
    assert json.loads(response.content) == response.json()
    assert response.headers["content-type"] == "application/json"

"""The official client of the Responses API works against the application with a fake engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

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
from tests.waiting import until

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
ARGUMENTS = {"city": "Rome", "days": [1, 2]}
ANSWER = f"<think>\n{REASONING}\n</think>\n\n{TEXT}\n{CALL}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": SCHEMA,
    "strict": False,
}
ASKED: Any = {"model": "tiny", "input": "Will it rain?", "tools": [WEATHER]}
KEYS = ("a key", "another key")
END = 2


class City(BaseModel):
    name: str
    mayors: list[str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("client"))
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return tokenizer_of(directory)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    engine = FakeEngine(lambda request: [])
    engine.info = msgspec.structs.replace(INFO, max_model_len=4000)
    say(engine, tokenizer, ANSWER)
    return engine


def say(engine: FakeEngine, tokenizer: Tokenizer, text: str, logprobs: int | None = None) -> None:
    """Let the model answer everything with `text`."""
    ids = [*tokenizer.encode(text), END]
    engine.script = outputs(ids, FinishReason.STOP, logprobs=logprobs, cached=4)


@pytest.fixture
async def client(tokenizer: Tokenizer, engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(
        engine,
        tokenizer,
        served_model_names=("tiny",),
        generation=GenerationConfig(eos_token_ids=(END,)),
        settings=ServerConfig(api_keys=KEYS),
        max_body_bytes=20_000,
    )
    async with serve(app) as (host, port):
        url = f"http://{host}:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEYS[0], max_retries=0) as client:
            yield client
    app.state.close()


def check(response: Any) -> None:
    """Check that a response is the whole answer, and that the client knows all of it."""
    reasoning, message, call = response.output
    assert [part.text for part in reasoning.content] == [REASONING]
    assert reasoning.summary == []
    assert response.output_text == TEXT
    assert message.role == "assistant"
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    assert {item.status for item in response.output} == {response.status} == {"completed"}
    usage = response.usage
    assert usage.input_tokens_details.cached_tokens == 4
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    # The client constructs its types without a check.
    Response.model_validate(response.model_dump(exclude={"output": {2: {"parsed_arguments"}}}))


async def test_a_response(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(
        **ASKED, instructions="Be kind.", metadata={"a": "b"}, temperature=0.5
    )
    check(response)
    assert response.model == "tiny"
    assert (response.instructions, response.metadata) == ("Be kind.", {"a": "b"})
    assert (response.temperature, response.top_p) == (0.5, 1)
    assert response.tools[0].to_dict() == WEATHER
    assert len(response._request_id or "") == 32


async def test_a_response_streamed(client: openai.AsyncOpenAI) -> None:
    """The stream goes through the client's own accumulator, which is strict about the order of
    events and the identity of items."""
    async with client.responses.stream(**ASKED) as stream:
        events = [event async for event in stream]
        response = await stream.get_final_response()
    check(response)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    folded = [kind for i, kind in enumerate(kinds) if kind != (kinds[i - 1] if i else None)]
    assert folded == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    snapshots = [e.snapshot for e in events if e.type == "response.output_text.delta"]
    assert snapshots[-1] == TEXT
    arguments = [e.snapshot for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads(arguments[-1]) == ARGUMENTS


async def test_raw_events(client: openai.AsyncOpenAI) -> None:
    """Pieces add up to what their last events say, and to the response at the end."""
    events = [event async for event in await client.responses.create(**ASKED, stream=True)]
    for event in events:
        type(event).model_validate(event.model_dump(by_alias=True))
    for kind in ("output_text", "reasoning_text", "function_call_arguments"):
        pieces = [e.delta for e in events if e.type == f"response.{kind}.delta"]
        [done] = [e for e in events if e.type == f"response.{kind}.done"]
        whole = done.arguments if kind == "function_call_arguments" else done.text
        assert "".join(pieces) == whole
        assert len(pieces) > 1
    done_items = [e.item for e in events if e.type == "response.output_item.done"]
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.to_dict() for item in last.response.output] == [i.to_dict() for i in done_items]
    check(last.response)


async def test_a_summary_of_the_reasoning(client: openai.AsyncOpenAI) -> None:
    reasoning: Any = {"summary": "auto"}
    include: Any = ["reasoning.encrypted_content"]
    async with client.responses.stream(**ASKED, reasoning=reasoning, include=include) as stream:
        kinds = [event.type async for event in stream]
        response = await stream.get_final_response()
    item: Any = response.output[0]
    assert [part.text for part in item.summary] == [REASONING]
    assert item.content == []
    assert REASONING in item.encrypted_content
    assert "response.reasoning_summary_part.added" in kinds
    assert "response.reasoning_summary_text.delta" in kinds
    assert "response.reasoning_text.delta" not in kinds


@pytest.mark.parametrize("store", [True, False])
async def test_a_tool_and_its_output(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine, store: bool
) -> None:
    """The output of a call is sent with the whole conversation, or carries on the response."""
    response = await client.responses.create(**ASKED, store=store)
    call: Any = response.output[-1]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    if store:
        again = {"input": [output], "previous_response_id": response.id}
    else:
        question = {"role": "user", "content": ASKED["input"]}
        said = [item.model_dump(exclude_none=True) for item in response.output]
        again = {"input": [question, *said, output]}
    check(await client.responses.create(**ASKED | again))
    prompt = tokenizer.decode(engine.requests[1].prompt_token_ids)
    for told in (ASKED["input"], REASONING, TEXT, str(ARGUMENTS), "tool: It rains."):
        assert prompt.count(told) == 1, told


async def test_a_structured_output(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine
) -> None:
    say(engine, tokenizer, '<think>\nHm.\n</think>\n\n{"name": "Rome", "mayors": ["Numa"]}')
    response = await client.responses.parse(model="tiny", input="A city?", text_format=City)
    assert response.output_parsed == City(name="Rome", mayors=["Numa"])
    form = engine.requests[0].structured_output
    assert form is not None
    assert '"mayors"' in form.text
    shown: Any = response.text
    assert (shown.format.name, shown.format.strict) == ("City", True)
    assert shown.format.schema_["properties"].keys() == City.model_fields.keys()
    async with client.responses.stream(model="tiny", input="A city?", text_format=City) as stream:
        streamed = await stream.get_final_response()
    assert streamed.output_parsed == response.output_parsed


async def test_logprobs(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine
) -> None:
    """The tokens of a text are reported, at the latest with its end, and those of reasoning and of
    calls are not."""
    asked: Any = {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    say(engine, tokenizer, ANSWER, logprobs=2)
    response = await client.responses.create(**ASKED, **asked)
    before_a_call: Any = response.output[1]
    told = "".join(entry.token for entry in before_a_call.content[0].logprobs)
    assert "weather" not in told
    say(engine, tokenizer, f"<think>\n{REASONING}\n</think>\n\n{TEXT}", logprobs=2)
    response = await client.responses.create(model="tiny", input="x", **asked)
    part: Any = response.output[-1].content[0]  # type: ignore[union-attr]
    text = b"".join(bytes(entry.bytes) for entry in part.logprobs).decode()
    assert TEXT in text
    assert REASONING not in text
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
    events = [
        event
        async for event in await client.responses.create(
            model="tiny", input="x", stream=True, **asked
        )
    ]
    pieces = [one for e in events if e.type == "response.output_text.delta" for one in e.logprobs]
    [done] = [e for e in events if e.type == "response.output_text.done"]
    tokens = [entry.token for entry in done.logprobs]
    assert tokens == [entry.token for entry in part.logprobs]
    assert [entry.token for entry in pieces] == tokens[: len(pieces)]
    assert len(tokens) - len(pieces) <= 1, "the token that ends the text comes with its end"
    kept: Any = (await client.responses.retrieve(response.id)).output[-1]
    assert kept.content[0].logprobs == part.logprobs
    again = await client.responses.create(model="tiny", input="x", previous_response_id=response.id)
    newest: Any = (await client.responses.input_items.list(again.id)).data[1]
    assert newest.content[0].text == TEXT
    assert newest.content[0].logprobs == [], "what is carried on is as a client sends it back"


async def test_carrying_on(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine
) -> None:
    """Conversations branch and outlive the responses that they consist of. Instructions are not
    carried on."""
    say(engine, tokenizer, "Yes.")
    one = await client.responses.create(model="tiny", input="First?", instructions="Be kind.")
    two = await client.responses.create(model="tiny", input="Second?", previous_response_id=one.id)
    other = await client.responses.create(model="tiny", input="Else?", previous_response_id=one.id)
    assert two.previous_response_id == one.id
    await client.responses.delete(one.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(one.id)
    await client.responses.create(model="tiny", input="Third?", previous_response_id=two.id)
    prompts = [tokenizer.decode(request.prompt_token_ids) for request in engine.requests]
    assert "Be kind." in prompts[0]
    assert not any("Be kind." in prompt for prompt in prompts[1:])
    for prompt, told in zip(
        prompts,
        (["First?"], ["First?", "Second?"], ["First?", "Else?"], ["First?", "Second?", "Third?"]),
        strict=True,
    ):
        found = [prompt.index(text) for text in told]
        assert found == sorted(found)
        assert prompt.count("Yes.") == len(told) - 1
    items = [item async for item in client.responses.input_items.list(two.id, order="asc", limit=2)]
    assert [item.content[0].text for item in items] == ["First?", "Yes.", "Second?"]  # type: ignore[union-attr]
    newest = await client.responses.input_items.list(two.id, limit=1)
    assert newest.data[0].id == items[-1].id
    assert newest.has_more
    # A reference stands for the item, as Vercel's clients send it.
    reference: Any = [
        {"type": "item_reference", "id": other.output[0].id},
        {"role": "user", "content": "?"},
    ]
    await client.responses.create(model="tiny", input=reference)
    assert "assistant: Yes." in tokenizer.decode(engine.requests[-1].prompt_token_ids)


async def test_what_is_stored(client: openai.AsyncOpenAI) -> None:
    """A response is as it was, for its own key only, unless it was not to be stored."""
    response = await client.responses.create(**ASKED)
    assert (await client.responses.retrieve(response.id)).to_dict() == response.to_dict()
    stranger = client.with_options(api_key=KEYS[1])
    for attempt in (
        stranger.responses.retrieve(response.id),
        stranger.responses.delete(response.id),
        stranger.responses.cancel(response.id),
        stranger.responses.input_items.list(response.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await attempt
    with pytest.raises(openai.BadRequestError) as refused:
        await stranger.responses.create(**ASKED, previous_response_id=response.id)
    assert (refused.value.code, refused.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        await client.responses.cancel(response.id)
    passing = await client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(passing.id)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine, stream: bool
) -> None:
    engine.script = outputs(tokenizer.encode(f"{TEXT}\n{CALL[:60]}"))
    if stream:
        *_, last = [event async for event in await client.responses.create(**ASKED, stream=True)]
        assert last.type == "response.incomplete"
        response = last.response
    else:
        response = await client.responses.create(**ASKED)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in response.output] == ["completed", "incomplete"]  # type: ignore[union-attr]


async def test_errors(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(**ASKED, max_output_tokens=-1)
    assert bad.value.param == "max_output_tokens"
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(**ASKED | {"model": "gpt"})
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="a third").responses.create(**ASKED)
    with pytest.raises(openai.APIStatusError) as large:
        await client.responses.create(**ASKED | {"input": "x" * 30_000})
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError) as long:
        await client.responses.create(**ASKED | {"input": "x y " * 3000})
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    engine.script = lambda request: [QueueFullError("full")]
    with pytest.raises(openai.RateLimitError):
        await client.responses.create(**ASKED, stream=True)
    engine.script = lambda request: [EngineNotReadyError("loading")]
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(**ASKED)


async def test_an_error_inside_a_stream(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer, engine: FakeEngine
) -> None:
    engine.script = lambda request: [
        *outputs(tokenizer.encode(TEXT))(request)[:2],
        QueueFullError("late"),
    ]
    with pytest.raises(openai.APIError, match="late"):
        async with client.responses.stream(**ASKED) as stream:
            await stream.get_final_response()


async def test_a_client_that_leaves(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    """To close the stream is how a client cancels a response."""
    async with client.responses.stream(**ASKED) as stream:
        async for _ in stream:
            break
    await until(lambda: engine.admission.num_taken == 0)
    check(await client.responses.create(**ASKED))

"""Structured output and tool calls through the official client, from a real model with two API
workers: the output follows the requested form, whatever the model would have said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.server import SMALL, Server
from tests.text.random_schemas import random_schema, recurses

MODEL = "minisrv-default"
QUESTION: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
GET_WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time", "description": "It is ..."}}


class Weather(BaseModel):
    """A response format, written as a user of the client would write it."""

    sky: Literal["clear", "cloudy"]
    degrees: int = Field(ge=-50, le=60)
    places: list[Literal["Rome", "Oslo"]] = Field(max_length=3)


@pytest.fixture(scope="module", params=["graphs", "eager"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """A client of a server of the default model."""
    mode = ["--enforce-eager"] if request.param == "eager" else []
    server = Server(*SMALL, "--api-workers", "2", *mode)
    try:
        url = server.wait_ready().url + "/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.stop()


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    defaults = {"model": MODEL, "messages": QUESTION, "temperature": 1, "max_tokens": 200}
    return client.chat.completions.create(**(defaults | fields))


def test_a_parsed_model(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=Weather, seed=seed, max_tokens=200
        )
        assert isinstance(answer.choices[0].message.parsed, Weather)


def test_a_streamed_object(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS}}
    chunks = list(ask(client, response_format=form, stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    jsonschema.validate(json.loads(text), PARAMETERS)
    assert chunks[-1].usage.completion_tokens > 5


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["sun", "rain", "snow and ice"]}, "sun|rain|snow and ice"),
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"grammar": 'start: "x" ("," NUMBER)~2\nNUMBER: /[0-9]{1,3}/'}, "x(,[0-9]{1,3}){2}"),
    ],
)
def test_other_forms(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        answer = client.completions.create(
            model=MODEL,
            prompt="The sky",
            n=2,
            seed=seed,
            logprobs=1,
            max_tokens=60,
            extra_body={"structured_outputs": form},
        )
        for choice in answer.choices:
            assert re.fullmatch(pattern, choice.text), choice.text
            assert choice.finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_required_call(client: openai.OpenAI, streamed: bool, parallel: bool) -> None:
    fields = {"tools": [WEATHER, TIME], "tool_choice": "required"}
    fields |= {"parallel_tool_calls": parallel, "max_tokens": 250, "seed": 1}
    if streamed:
        with client.chat.completions.stream(model=MODEL, messages=QUESTION, **fields) as stream:
            [choice] = stream.get_final_completion().choices
    else:
        [choice] = ask(client, **fields).choices
    calls = choice.message.tool_calls
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    assert parallel or len(calls) == 1
    if choice.finish_reason == "length":
        assert parallel, "one call ends by itself"
        calls = calls[:-1]
    else:
        assert choice.finish_reason == "tool_calls"
    for call in calls:
        schema = {"weather": PARAMETERS, "time": {"maxProperties": 0}}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_named_call_and_its_result(client: openai.OpenAI) -> None:
    """The usual loop of a client: it sends the message of the answer back, followed by the result
    of the call."""
    named = {"type": "function", "function": {"name": "weather"}}
    [choice] = ask(client, tools=[WEATHER, TIME], tool_choice=named).choices
    [call] = choice.message.tool_calls
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    sent = choice.message.model_dump(exclude_none=True)
    again = ask(client, messages=[*QUESTION, sent, result], tools=[WEATHER], max_tokens=8)
    assert again.usage.prompt_tokens > 60


@pytest.mark.parametrize("streamed", [False, True])
def test_the_model_calls_a_tool_by_itself_and_reports_its_result(
    client: openai.OpenAI, streamed: bool
) -> None:
    def answer(messages: list[Any]) -> Any:
        fields: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0}
        fields |= {"tools": [GET_WEATHER], "max_tokens": 100}
        if not streamed:
            return client.chat.completions.create(**fields).choices[0]
        with client.chat.completions.stream(**fields) as stream:
            return stream.get_final_completion().choices[0]

    choice = answer(QUESTION)
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Rome"}')
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    told = answer([*QUESTION, choice.message.model_dump(exclude_none=True), result])
    assert told.finish_reason == "stop"
    assert "sunny, 21 degrees" in told.message.content
    greeted = answer([{"role": "user", "content": "Hello!"}])
    assert not greeted.message.tool_calls
    assert greeted.message.content.startswith("Hello!")


def test_random_schemas_beside_each_other(client: openai.OpenAI) -> None:
    """A part of what benchmarks/structured_output.py does: outputs with random schemas, several at
    once, satisfy them."""

    def one(seed: int) -> tuple[str, str]:
        schema = random_schema(seed, 300)
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        choice = ask(client, response_format=form, seed=seed, max_tokens=300).choices[0]
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), schema)
        else:
            assert recurses(schema)
        return choice.finish_reason, choice.message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(16)))
    assert [reason for reason, _ in answers].count("stop") >= 12, answers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **fields)
    assert raised.value.param == param

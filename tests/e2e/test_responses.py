"""The official client of the Responses API against a real server: the model answers as it does in a
chat, conversations are carried on, and a client that leaves ends its response."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.server import Server, until

MODEL = "minisrv-default"
SUM = "What is 17 + 25?"
GREEDY: Any = {"model": MODEL, "temperature": 0}


class City(BaseModel):
    city: str = Field(max_length=20)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, *texts: str) -> tuple[str, Any]:
    """The answer to a chat that begins with a user's text, and its usage."""
    roles = ("user", "assistant")
    said: Any = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    answer = client.chat.completions.create(messages=said, **GREEDY)
    return answer.choices[0].message.content or "", answer.usage


def test_the_answer_is_that_of_a_chat(client: openai.OpenAI) -> None:
    """The tokens of a canary are those of a chat, streamed or not, whatever was carried on."""
    text, usage = chat(client, SUM)
    response = client.responses.create(input=SUM, **GREEDY)
    assert response.output_text == text
    assert response.usage is not None
    assert response.usage.input_tokens == usage.prompt_tokens
    assert response.usage.output_tokens == usage.completion_tokens
    with client.responses.stream(input=SUM, **GREEDY) as stream:
        pieces = [e.delta for e in stream if e.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == text == "".join(pieces)
    again = client.responses.create(input="And 3 + 4?", previous_response_id=response.id, **GREEDY)
    assert again.output_text == chat(client, SUM, text, "And 3 + 4?")[0]
    canary = client.responses.create(input=SUM, **GREEDY)
    assert canary.output_text == text


def test_a_structured_output(client: openai.OpenAI) -> None:
    response = client.responses.parse(input="A city?", text_format=City, **GREEDY)
    assert response.output_parsed is not None
    assert json.loads(response.output_text) == {"city": response.output_parsed.city}


def test_a_client_that_leaves(server: Server, client: openai.OpenAI) -> None:
    """The rest of the answer is not generated, and its blocks are free again."""
    text, _ = chat(client, SUM)
    for _ in range(5):
        with client.responses.stream(input="Tell me a story.", model=MODEL) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    break

    def is_idle() -> bool:
        metrics = server.metrics()
        return metrics["num_requests_running"] == metrics["kv_cache_usage_perc"] == 0

    until(is_idle, "all are gone")
    assert client.responses.create(input=SUM, **GREEDY).output_text == text

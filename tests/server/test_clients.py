"""Requests as clients of other projects send them: all are accepted, and the prompt says what they
meant.

`agents.json` has the bodies that `benchmarks/clients/use_agents.py` recorded from AutoGen's and
LangChain's agents in two turns with a tool in each. `frameworks.json` has what
`use_openai_agents.py`, `use_vercel_ai.mjs` and `use_frameworks.py` there recorded, and
`defaults.json` what `use_defaults.py` and `use_defaults.mjs` did: of each client, some of the
requests that differ in more than an id.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.request import FinishReason
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
AGENTS: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("agents.json").read_text()
)
FRAMEWORKS: dict[str, list[dict[str, Any]]] = {
    f"{file}: {name}": requests
    for file in ("frameworks", "defaults")
    for name, requests in json.loads(Path(__file__).with_name(f"{file}.json").read_text()).items()
}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}<tool_call>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }} {{ call.function.arguments }}"
    "{% endfor %}]{% endfor %}"
)
MODEL = "minisrv-default"
USER = {"role": "user", "content": "What is the weather in Oslo?"}
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "Sunny."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("clients"))
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return tokenizer_of(directory)


async def prompt_of(connect: Connect, tokenizer: Tokenizer, body: dict[str, Any]) -> str:
    """The prompt that a request, which must be accepted, gives to the model."""
    ids = [*tokenizer.encode("Sunny."), 2]
    engine = FakeEngine(outputs(ids, FinishReason.STOP))
    engine.info = msgspec.structs.replace(INFO, max_model_len=4000)
    async with connect(engine, tokenizer=tokenizer, served_model_names=(body["model"],)) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return tokenizer.decode(engine.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("agent", "number"),
    [(agent, i) for agent, bodies in AGENTS.items() for i in range(len(bodies))],
)
async def test_agents(connect: Connect, tokenizer: Tokenizer, agent: str, number: int) -> None:
    """The prompt has the speaker's name and every earlier tool call."""
    body = AGENTS[agent][number]
    prompt = await prompt_of(connect, tokenizer, body)
    speaker = {"autogen": "user", "langchain": "Ada"}[agent]
    assert f"[user {speaker}: {USER['content']}]" in prompt
    assert ("And in Rome?" in prompt) == (number >= 2)
    calls = [call for m in body["messages"] for call in m.get("tool_calls") or ()]
    assert len(calls) == (number + 1) // 2
    assert prompt.count("]") >= len(body["messages"])
    assert all(f"weather {json.loads(c['function']['arguments'])}" in prompt for c in calls)


def texts_in(content: Any) -> list[str]:
    """The texts of a content, which are its parts or, in Anthropic's form, in results of tools."""
    if isinstance(content, str):
        return [content]
    return [text for part in content for text in texts_in(part.get("text", part.get("content")))]


def texts_of(body: dict[str, Any]) -> list[str]:
    """All texts that a user has said in a body, and all outputs of tools."""
    said = body.get("messages") or body["input"]
    if isinstance(said, str):
        return [said]
    return [
        text
        for item in said
        if item.get("role") in ("user", "tool") or "output" in item
        for text in texts_in(item.get("content", item.get("output")))
    ]


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_frameworks(connect: Connect, tokenizer: Tokenizer, framework: str) -> None:
    """The prompt of each request has all that was said in it, and in what it carries on. Requests
    are sent in the order in which they were recorded."""
    engine = FakeEngine(outputs([*tokenizer.encode("Sunny."), 2], FinishReason.STOP, logprobs=2))
    engine.info = msgspec.structs.replace(INFO, max_model_len=8000)
    before: tuple[str, list[str]] = ("", [])
    async with connect(engine, tokenizer=tokenizer, served_model_names=(MODEL,)) as client:
        for number, request in enumerate(FRAMEWORKS[framework]):
            body, told = request["body"], texts_of(request["body"])
            if body.get("previous_response_id"):
                body, told = body | {"previous_response_id": before[0]}, [*before[1], *told]
            response = await client.post(request["path"], json=body)
            assert response.status_code == 200, response.text
            prompt = tokenizer.decode(engine.requests[number].prompt_token_ids)
            assert told
            assert all(text in prompt for text in told)
            assert all(tool["name"] in prompt for tool in body.get("tools", ()) if "name" in tool)
            if not body.get("stream"):
                before = (response.json()["id"], told)


@pytest.mark.parametrize(
    "answer",
    [
        # LiteLLM's form of answers by Anthropic's and Google's models
        {
            "content": None,
            "tool_calls": [
                {
                    "index": 1,
                    "function": CALL,
                    "id": "call_" + "x" * 900,
                    "type": "function",
                    "provider_specific_fields": {"thought_signature": "x" * 900},
                }
            ],
            "function_call": None,
            "provider_specific_fields": {"citations": None, "thinking_blocks": []},
            "thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}],
            "reasoning_content": "Hm.",
        },
        # OpenRouter
        {
            "content": "",
            "refusal": None,
            "reasoning": "Hm.",
            "reasoning_details": [{"type": "reasoning.text", "text": "Hm.", "index": 0}],
            "tool_calls": [{"index": 0, "id": "c", "type": "function", "function": CALL}],
        },
        # openai-python's model_dump()
        {
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": [
                {"id": "c", "function": {**CALL, "parsed_arguments": None}, "type": "function"}
            ],
            "parsed": None,
        },
        # Ollama's API, with arguments as an object and no ids
        {"content": "", "tool_calls": [{"function": {**CALL, "arguments": {"city": "Oslo"}}}]},
        # A message marked for caching, as in Anthropic's API
        {
            "content": [{"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}],
            "tool_calls": [{"id": "c", "function": CALL, "cache_control": {"type": "ephemeral"}}],
        },
    ],
)
async def test_what_other_servers_have_said(
    connect: Connect, tokenizer: Tokenizer, answer: dict[str, Any]
) -> None:
    """Answers as other servers and libraries return them are accepted as earlier turns."""
    cached = {"content": [{"type": "text", "text": "Be brief.", "cache_control": {}}]}
    turns = [{"role": "system", **cached}, USER, {"role": "assistant", **answer}, RESULT]
    body = {"model": "m", "messages": turns, "tools": [TOOL], "verbosity": "low"}
    body |= {"service_tier": "flex", "prompt_cache_retention": "24h"}
    prompt = await prompt_of(connect, tokenizer, body)
    assert "[system: Be brief.]" in prompt
    assert "[assistant:  weather {'city': 'Oslo'}][tool: Sunny.]" in prompt

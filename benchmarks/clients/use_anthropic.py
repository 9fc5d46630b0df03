"""The official client of Anthropic's API against a server.

    python benchmarks/clients/use_anthropic.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with anthropic, against the default model, and asks what it can answer.
Every step asserts its results; a failed step is reported and makes the exit status 1.

Knows: the client's interface. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from needs import needs
from steps import Steps, run_program

with needs("pip install anthropic"):
    import anthropic

SUM: Any = {"role": "user", "content": "What is 17 + 25?"}
MODEL = "minisrv-default"
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
}
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": SCHEMA,
}
FORMAT: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}


def steps_of(url: str) -> Steps:
    """Run all steps against the server at `url`, and return them."""
    steps = Steps("anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="none")
    settings: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 40,
        "extra_body": {"temperature": 0},
    }

    @steps.run
    def message() -> Any:
        answer = client.messages.create(messages=[SUM], **settings)
        [block] = answer.content
        assert block.type == "text"
        assert block.text == "42"
        assert answer.stop_reason == "end_turn"
        return answer.usage.output_tokens

    @steps.run
    def streamed() -> Any:
        with client.messages.stream(messages=[SUM], **settings) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert [block.type for block in final.content] == ["text"]
        return kinds

    @steps.run
    def several_turns() -> Any:
        first = client.messages.create(system="Be brief.", messages=[SUM], **settings)
        turns = [SUM, first.to_param(), SUM]
        again = client.messages.create(system="Be brief.", messages=turns, **settings)
        assert again.content
        return again.usage.cache_read_input_tokens

    @steps.run
    def stop_sequence() -> Any:
        answer = client.messages.create(messages=[SUM], stop_sequences=["2"], **settings)
        assert answer.stop_reason == "stop_sequence"
        assert answer.stop_sequence == "2"
        return answer.content[0].to_dict()

    @steps.run
    def max_tokens() -> Any:
        answer = client.messages.create(messages=[SUM], **settings | {"max_tokens": 1})
        assert answer.stop_reason == "max_tokens"
        return answer.usage.output_tokens

    @steps.run
    def structured_output() -> Any:
        answer = client.messages.create(messages=[SUM], output_config=FORMAT, **settings)
        [block] = answer.content
        assert block.type == "text"
        assert set(json.loads(block.text)) == {"city"}
        return block.text

    @steps.run
    def count_tokens() -> Any:
        count = client.messages.count_tokens(model=MODEL, messages=[SUM]).input_tokens
        usage = client.messages.create(messages=[SUM], **settings).usage
        assert count == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        return count

    @steps.run
    def errors() -> Any:
        told = []
        for wrong, kind in (
            ({"model": "other"}, anthropic.NotFoundError),
            ({"max_tokens": -1}, anthropic.BadRequestError),
            ({"messages": [{"role": "user", "content": "x " * 9000}]}, anthropic.BadRequestError),
        ):
            try:
                client.messages.create(**{"messages": [SUM], **settings, **wrong})
            except kind as error:
                told.append([error.message, bool(error.request_id)])
        assert [has_id for _, has_id in told] == [True] * 3
        return told

    @steps.run
    def cancelled() -> Any:
        async def leave() -> None:
            async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as own:
                asked = own.messages.create(messages=[SUM], **settings | {"max_tokens": 1000})
                task = asyncio.create_task(asked)
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        with client.messages.stream(messages=[SUM], **settings) as stream:
            next(iter(stream))
        return client.messages.create(messages=[SUM], **settings).stop_reason

    @steps.run
    def tool_call() -> Any:
        choice: Any = {"type": "tool", "name": "get_weather"}
        asked: Any = {"role": "user", "content": "What is the weather in Rome?"}
        arguments = {**settings, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
        answer = client.messages.create(messages=[asked], **arguments)
        [call] = answer.content
        assert call.type == "tool_use"
        assert set(call.input) == {"city"}
        assert answer.stop_reason == "tool_use"
        with client.messages.stream(messages=[asked], **arguments) as stream:
            [streamed_call] = stream.get_final_message().content
        assert streamed_call.type == "tool_use"
        assert streamed_call.input == call.input
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."}
        turns = [asked, answer.to_param(), {"role": "user", "content": [result]}]
        last = client.messages.create(messages=turns, tools=[WEATHER], **settings)
        return [call.input, [block.to_dict() for block in last.content]]

    @steps.run
    def tools_beside_a_format() -> Any:
        arguments = {"tools": [WEATHER], "output_config": FORMAT, **settings}
        answer = client.messages.create(messages=[SUM], **arguments)
        for block in answer.content:
            if block.type == "text":
                assert set(json.loads(block.text)) == {"city"}
            else:
                assert block.type == "tool_use"
                assert set(block.input) == {"city"}
        assert answer.content
        return [block.to_dict() for block in answer.content]

    return steps


if __name__ == "__main__":
    raise SystemExit(run_program("Anthropic's client against a server.", steps_of))

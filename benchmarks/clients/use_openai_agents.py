"""OpenAI's Agents SDK, which speaks the Responses API by default, against a server.

    python benchmarks/clients/use_openai_agents.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with openai-agents, against the default model. Every step asserts its
results; a failed step is reported and makes the exit status 1. The report also has the bodies of
the requests.

Knows: the SDK's interface. Knows nothing of the server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from needs import needs
from steps import Steps, run_program

with needs("pip install openai-agents"):
    import openai
    from agents import (
        Agent,
        ModelSettings,
        Runner,
        SQLiteSession,
        ToolCallOutputItem,
        function_tool,
        set_default_openai_client,
        set_tracing_disabled,
    )
    from agents.exceptions import ModelBehaviorError
    from pydantic import BaseModel, Field

MODEL = "minisrv-default"
SUM = "What is 17 + 25?"
TURNS = ("What is the weather in Oslo?", "What is the weather in Rome?")


class City(BaseModel):
    city: str = Field(max_length=20)


@function_tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}."


def steps_of(url: str) -> Steps:
    """Run all steps against the server at `url`, and return them."""
    steps = Steps("openai-agents", "openai")
    set_tracing_disabled(True)
    bodies: list[Any] = []
    brief = ModelSettings(temperature=0, max_tokens=60)
    plain = Agent(name="helper", instructions="Be brief.", model=MODEL, model_settings=brief)
    calling = plain.clone(tools=[weather])

    async def note(request: Any) -> None:
        if request.content:
            bodies.append(json.loads(request.content))

    def run(step: Callable[[], Awaitable[Any]]) -> None:
        """Run a step in an event loop and with a client of its own."""

        async def talk() -> Any:
            async with openai.AsyncOpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0
            ) as client:
                client._client.event_hooks["request"].append(note)
                set_default_openai_client(client, use_for_tracing=False)
                return await step()

        def told() -> Any:
            bodies.clear()
            return {"told": asyncio.run(talk()), "requests": list(bodies)}

        told.__name__ = step.__name__  # type: ignore[attr-defined]
        steps.run(told)

    @run
    async def answer() -> Any:
        result = await Runner.run(plain, SUM)
        assert result.final_output == "42"
        return result.final_output

    @run
    async def streamed() -> Any:
        result = Runner.run_streamed(plain, SUM)
        kinds = [
            event.data.type
            async for event in result.stream_events()
            if event.type == "raw_response_event"
        ]
        assert result.final_output == "42"
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        return kinds

    @run
    async def tool_calls_in_a_session() -> Any:
        """The session sends all earlier items back, word for word."""
        session = SQLiteSession("one")
        told = []
        for turn in TURNS:
            result = await Runner.run(calling, turn, session=session)
            outputs = [item for item in result.new_items if isinstance(item, ToolCallOutputItem)]
            assert outputs
            assert all(str(item.output).startswith("Sunny in ") for item in outputs)
            told.append(result.final_output)
        return told

    @run
    async def tool_calls_streamed() -> Any:
        result = Runner.run_streamed(calling, TURNS[0])
        names = [e.name async for e in result.stream_events() if e.type == "run_item_stream_event"]
        assert names[:2] == ["tool_called", "tool_output"]
        return names

    @run
    async def carried_on_by_the_server() -> Any:
        first = await Runner.run(calling, TURNS[0], auto_previous_response_id=True)
        again = await Runner.run(calling, TURNS[1], previous_response_id=first.last_response_id)
        return [first.final_output, again.final_output]

    @run
    async def structured_output() -> Any:
        result = await Runner.run(plain.clone(output_type=City), "A city?")
        assert isinstance(result.final_output, City)
        return result.final_output.city

    @run
    async def handoff() -> Any:
        other = plain.clone(name="mathematician", handoff_description="Adds numbers.")
        first = plain.clone(
            handoffs=[other],
            model_settings=ModelSettings(temperature=0, max_tokens=60, tool_choice="required"),
        )
        result = await Runner.run(first, SUM)
        assert result.last_agent.name == "mathematician"
        return result.final_output

    @run
    async def errors() -> Any:
        told = []
        for wrong in (
            plain.clone(model="other"),
            plain.clone(model_settings=ModelSettings(top_p=7)),
        ):
            try:
                await Runner.run(wrong, SUM)
            except openai.APIStatusError as error:
                told.append([error.status_code, error.message])
        assert [status for status, _ in told] == [404, 400]
        return told

    @run
    async def an_answer_that_is_cut_off() -> Any:
        short = plain.clone(model_settings=ModelSettings(max_tokens=1))
        told = ""
        try:
            await Runner.run(short, SUM)
        except ModelBehaviorError as error:  # the SDK takes an incomplete answer for an error
            told = str(error)
        assert "max_output_tokens" in told
        return told

    @run
    async def cancelled() -> Any:
        long = plain.clone(model_settings=ModelSettings(max_tokens=1000))
        result = Runner.run_streamed(long, "Tell me a story.")
        async for event in result.stream_events():
            if event.type == "raw_response_event" and "delta" in event.data.type:
                result.cancel()
        return (await Runner.run(plain, SUM)).final_output

    return steps


if __name__ == "__main__":
    raise SystemExit(run_program("OpenAI's Agents SDK against a server.", steps_of))

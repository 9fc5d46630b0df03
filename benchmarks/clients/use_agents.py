"""AutoGen's and LangChain's agents against a server: two turns, with a tool in each.

    python benchmarks/clients/use_agents.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with autogen-agentchat, autogen-ext[openai], langchain, langchain-openai and
langgraph, against the default model. Every step asserts its results; a failed step is reported
and makes the exit status 1. The report also has the bodies of the requests.

Knows: the agents' interfaces. Knows nothing of the server.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from needs import needs
from steps import Steps, run_program

with needs(
    "pip install autogen-agentchat 'autogen-ext[openai]' langchain langchain-openai langgraph"
):
    import httpx
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.messages import TextMessage, ToolCallExecutionEvent
    from autogen_core.models import ModelFamily
    from autogen_ext.models.openai import OpenAIChatCompletionClient
    from langchain.agents import create_agent
    from langchain_core.messages import AIMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.memory import InMemorySaver

MODEL = "minisrv-default"
TURNS = ("What is the weather in Oslo?", "What is the weather in Rome?")


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}."


def steps_of(url: str) -> Steps:
    """Run all steps against the server at `url`, and return them."""
    steps = Steps("autogen-agentchat", "autogen-ext", "langchain", "langchain-openai", "openai")
    settings: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
    bodies: list[Any] = []

    def note(request: httpx.Request) -> None:
        bodies.append(json.loads(request.content))

    async def note_too(request: httpx.Request) -> None:
        note(request)

    def sent() -> list[Any]:
        found, bodies[:] = bodies[:], []
        return found

    @steps.run
    def autogen() -> Any:
        async def talk() -> list[str]:
            info = {"vision": False, "function_calling": True, "json_output": True}
            info |= {"family": ModelFamily.UNKNOWN, "structured_output": True}
            async with httpx.AsyncClient(event_hooks={"request": [note_too]}) as http:
                client = OpenAIChatCompletionClient(
                    model=MODEL, model_info=info, http_client=http, max_tokens=60, **settings
                )
                agent = AssistantAgent("helper", client, tools=[weather], reflect_on_tool_use=True)
                told = []
                for turn in TURNS:
                    result = await agent.run(task=turn)
                    [ran] = [m for m in result.messages if isinstance(m, ToolCallExecutionEvent)]
                    assert all("Sunny in " in one.content for one in ran.content), ran
                    assert isinstance(result.messages[-1], TextMessage)
                    told.append(result.messages[-1].content)
                await client.close()
            return told

        return {"answers": asyncio.run(talk()), "requests": sent()}

    @steps.run
    def langchain() -> Any:
        with httpx.Client(event_hooks={"request": [note]}) as http:
            chat = ChatOpenAI(model=MODEL, max_completion_tokens=60, http_client=http, **settings)
            agent: Any = create_agent(
                chat,
                [tool(weather)],
                system_prompt="Answer briefly.",
                checkpointer=InMemorySaver(),
                name="helper",
            )
            told = []
            for number, turn in enumerate(TURNS, start=1):
                state = agent.invoke(
                    {"messages": [{"role": "user", "content": turn, "name": "Ada"}]},
                    {"configurable": {"thread_id": "1"}},
                )
                answers = [m for m in state["messages"] if isinstance(m, ToolMessage)]
                assert len(answers) >= number
                assert all(str(answer.content).startswith("Sunny in ") for answer in answers)
                assert isinstance(state["messages"][-1], AIMessage)
                told.append(state["messages"][-1].content)
        return {"answers": told, "requests": sent()}

    return steps


if __name__ == "__main__":
    raise SystemExit(run_program("AutoGen's and LangChain's agents against a server.", steps_of))

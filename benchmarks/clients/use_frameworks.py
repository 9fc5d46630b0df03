"""Frameworks that speak OpenAI's APIs against a server: LangChain, LiteLLM, pydantic-ai,
instructor, LlamaIndex, smolagents and outlines, over the Responses API where they can.

    python benchmarks/clients/use_frameworks.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with the packages that `needs` names below, against the default model. Calls
are required; everything else is sent as the frameworks send it. Every step asserts its results; a
failed step is reported and makes the exit status 1. The report also has the requests, as a proxy
has recorded them.

Knows: the frameworks' interfaces. Knows nothing of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from needs import needs
from recording import recording
from steps import Steps, run_program

with needs(
    "pip install langchain-openai litellm 'pydantic-ai-slim[openai]' instructor "
    "llama-index-llms-openai 'smolagents[openai]' 'outlines[openai]'"
):
    import instructor
    import litellm
    import openai
    import outlines
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai import OpenAIResponses
    from pydantic import BaseModel, Field
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from smolagents import ChatMessage as SmolMessage
    from smolagents import OpenAIServerModel
    from smolagents import tool as smolagents_tool

MODEL = "minisrv-default"
SUM = "What is 17 + 25?"
PACKAGES = (
    *("langchain-openai", "litellm", "pydantic-ai-slim", "instructor", "llama-index-llms-openai"),
    *("smolagents", "outlines", "openai"),
)


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=20)


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city.

    Args:
        city: the city.
    """
    return f"Sunny in {city}."


def steps_of(url: str) -> Steps:
    """Run all steps against the server at `url`, and return them."""
    steps = Steps(*PACKAGES)

    def run(step: Callable[[str], Any]) -> None:
        """Run a step with the URL of a proxy."""

        def told() -> Any:
            with recording(url) as (proxy, requests):
                answer = step(f"{proxy}/v1")
            return {"told": answer, "requests": requests}

        told.__name__ = step.__name__
        steps.run(told)

    @run
    def langchain(base: str) -> Any:
        chat = ChatOpenAI(
            model=MODEL, base_url=base, api_key="none", temperature=0, use_responses_api=True
        )
        assert chat.invoke(SUM).text == "42"
        assert "".join(piece.text for piece in chat.stream(SUM)) == "42"
        made = chat.with_structured_output(City).invoke("A city?")
        assert isinstance(made, City)
        question = HumanMessage("What is the weather in Oslo?")
        call: AIMessage = chat.bind_tools([tool(weather)], tool_choice="required").invoke(
            [question]
        )
        outputs = [
            ToolMessage(weather(**one["args"]), tool_call_id=one["id"]) for one in call.tool_calls
        ]
        assert outputs
        return chat.invoke([question, call, *outputs]).text

    @run
    def langchain_carried_on(base: str) -> Any:
        chat = ChatOpenAI(
            model=MODEL,
            base_url=base,
            api_key="none",
            temperature=0,
            use_responses_api=True,
            use_previous_response_id=True,
        )
        first = chat.invoke([HumanMessage(SUM)])
        return chat.invoke([HumanMessage(SUM), first, HumanMessage("What is 3 + 4?")]).text

    @run
    def litellm_responses(base: str) -> Any:
        settings: dict[str, Any] = {
            "model": f"openai/{MODEL}",
            "api_base": base,
            "api_key": "none",
            "temperature": 0,
        }
        whole = litellm.responses(input=SUM, **settings)
        assert whole.output[0].content[0].text == "42"
        events = litellm.responses(input=SUM, stream=True, **settings)
        kinds = [getattr(event.type, "value", event.type) for event in events]
        assert kinds[-1] == "response.completed"
        chat = litellm.completion(messages=[{"role": "user", "content": SUM}], **settings)
        assert chat.choices[0].message.content == "42"
        return kinds

    @run
    def pydantic_ai(base: str) -> Any:
        async def talk() -> Any:
            provider = OpenAIProvider(base_url=base, api_key="none")
            model = OpenAIResponsesModel(MODEL, provider=provider)
            plain: Agent[None, str] = Agent(model, instructions="Be brief.")
            settings: Any = {"temperature": 0, "max_tokens": 200}
            assert (await plain.run(SUM, model_settings=settings)).output == "42"
            async with plain.run_stream(SUM, model_settings=settings) as stream:
                assert await stream.get_output() == "42"
            formed: Agent[None, City] = Agent(model, output_type=City)
            result = await formed.run("A city?", model_settings=settings)
            assert isinstance(result.output, City)
            again = await plain.run(SUM, message_history=result.all_messages())
            return [result.output.city, again.output]

        return asyncio.run(talk())

    @run
    def instructor_responses(base: str) -> Any:
        client = instructor.from_openai(
            openai.OpenAI(base_url=base, api_key="none"), mode=instructor.Mode.RESPONSES_TOOLS
        )
        made = client.responses.create(
            model=MODEL, input="A city?", response_model=City, temperature=0
        )
        assert isinstance(made, City)
        return made.city

    @run
    def llama_index(base: str) -> Any:
        llm = OpenAIResponses(
            model=MODEL, api_base=base, api_key="none", temperature=0, context_window=2048
        )
        said = [ChatMessage(role="system", content="Be brief."), ChatMessage(content=SUM)]
        assert llm.chat(said).message.content == "42"
        pieces = [piece.delta or "" for piece in llm.stream_chat(said)]
        assert "".join(pieces) == "42"
        return pieces

    @run
    def smolagents(base: str) -> Any:
        """Only a model's call: the prompts of its agents are longer than the model's context."""
        model = OpenAIServerModel(MODEL, api_base=base, api_key="none", temperature=0)
        said = [SmolMessage(role="user", content=[{"type": "text", "text": "The weather?"}])]
        called = model.generate(said, tools_to_call_from=[smolagents_tool(weather)], max_tokens=60)
        assert called.tool_calls
        names = [call.function.name for call in called.tool_calls]
        pieces = [piece.content or "" for piece in model.generate_stream(said)]
        assert len(pieces) > 1
        return names

    @run
    def outlines_openai(base: str) -> Any:
        model = outlines.from_openai(openai.OpenAI(base_url=base, api_key="none"), MODEL)
        made = City.model_validate_json(model("A city?", City, temperature=0))
        assert model(SUM, temperature=0) == "42"
        return made.city

    return steps


if __name__ == "__main__":
    raise SystemExit(run_program("Frameworks of OpenAI's APIs against a server.", steps_of))

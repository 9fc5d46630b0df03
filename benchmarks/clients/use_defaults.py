"""Clients as they come, with their defaults, against a server: a plain answer, a stream, a tool
call, a structured output, an error and a stream that is given up, of each of them.

    python benchmarks/clients/use_defaults.py http://127.0.0.1:8000 CLIENT ... [--json out.json]

Runs the named clients; each in an environment with the packages that it imports, whose versions are
reported. The results of several environments are collected in one file. The server has the default
model with a context of 8,192 tokens, as benchmarks/README.md says. A call is required where the
client does not require one anyway. A proxy records the requests, except in the last step. Every
step asserts its results; a failed step is reported and makes the exit status 1.

Knows: the clients' interfaces, and the path that tells how many requests a server has. Knows
nothing else of the server.
"""

import argparse
import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from needs import needs
from recording import recording
from steps import Steps

MODEL = "minisrv-default"
SUM = "What is 17 + 25?"
QUESTION = "What is the weather in Oslo?"
STORY = "Tell me a long story."

Step = Callable[[], Any]


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city.

    Args:
        city: the city.
    """
    return f"Sunny in {city}."


SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
}
FUNCTION: Any = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": FUNCTION}


def city_class() -> Any:
    """A class of pydantic's, which every environment has here, with one field."""
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        city: Literal["Oslo", "Rome"]

    return City


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def tool_results(message: Any) -> list[Any]:
    """Return the messages with the results of the calls that a message of OpenAI's form has."""
    return [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": weather(**json.loads(call.function.arguments)),
        }
        for call in message.tool_calls
    ]


def nonempty(text: Any) -> str:
    assert isinstance(text, str)
    assert text.strip()
    return text


def error_of(call: Step) -> str:
    """The error that a call raises, which must tell of the model that does not exist."""
    try:
        call()
    except Exception as error:  # which class it has is what is reported
        told = f"{type(error).__name__}: {error}"
        assert "other" in told, told
        return told
    raise AssertionError("a model that does not exist has answered")


def some_of(pieces: Any) -> int:
    """Read a few pieces of a stream, and give it up."""
    number = 0
    for number, _ in enumerate(pieces, start=1):
        if number == 4:
            break
    assert number == 4
    if close := getattr(pieces, "close", None):
        close()
    return number


# ---- the official clients ---------------------------------------------------------------------


def openai_chat(base: str) -> Sequence[Step]:
    import openai

    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none")
    chat: Any = client.chat.completions

    def plain() -> Any:
        answer = chat.create(model=MODEL, messages=[user(SUM)])
        assert answer.usage.total_tokens > answer.usage.prompt_tokens
        return nonempty(answer.choices[0].message.content)

    def streamed() -> Any:
        chunks = list(chat.create(model=MODEL, messages=[user(SUM)], stream=True))
        assert chunks[-1].choices[0].finish_reason == "stop"
        return nonempty("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

    def tool_call() -> Any:
        said = [user(QUESTION)]
        first = chat.create(model=MODEL, messages=said, tools=[TOOL], tool_choice="required")
        message = first.choices[0].message
        results = tool_results(message)
        again = chat.create(model=MODEL, messages=[*said, message, *results], tools=[TOOL])
        return [result["content"] for result in results] + [again.choices[0].finish_reason]

    def structured_output() -> Any:
        answer = chat.parse(model=MODEL, messages=[user("A city?")], response_format=city_class())
        return answer.choices[0].message.parsed.city

    def error() -> Any:
        return error_of(lambda: chat.create(model="other", messages=[user(SUM)]))

    def cancelled() -> Any:
        return some_of(chat.create(model=MODEL, messages=[user(STORY)], stream=True))

    return plain, streamed, tool_call, structured_output, error, cancelled


def openai_completions(base: str) -> Sequence[Step]:
    import openai

    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none")
    create: Any = client.completions.create

    def plain() -> Any:
        return nonempty(create(model=MODEL, prompt="Once upon a time").choices[0].text)

    def streamed() -> Any:
        chunks = create(model=MODEL, prompt="Once upon a time", stream=True)
        return nonempty("".join(chunk.choices[0].text for chunk in chunks))

    def error() -> Any:
        return error_of(lambda: create(model="other", prompt="a"))

    def cancelled() -> Any:
        return some_of(create(model=MODEL, prompt="Once", stream=True, max_tokens=2000))

    return plain, streamed, error, cancelled


def openai_embeddings(base: str) -> Sequence[Step]:
    import openai

    create: Any = openai.OpenAI(base_url=f"{base}/v1", api_key="none").embeddings.create

    def plain() -> Any:
        one, other = create(model=MODEL, input=["Oslo", "Rome"]).data
        assert abs(sum(value * value for value in one.embedding) - 1) < 1e-3
        assert one.embedding != other.embedding
        return len(one.embedding)

    def error() -> Any:
        return error_of(lambda: create(model="other", input="a"))

    return plain, error


def openai_responses(base: str) -> Sequence[Step]:
    import openai

    responses: Any = openai.OpenAI(base_url=f"{base}/v1", api_key="none").responses
    function = {"type": "function", "strict": True, **FUNCTION}

    def plain() -> Any:
        return nonempty(responses.create(model=MODEL, input=SUM).output_text)

    def streamed() -> Any:
        *_, last = responses.create(model=MODEL, input=SUM, stream=True)
        assert last.type == "response.completed"
        return nonempty(last.response.output_text)

    def tool_call() -> Any:
        asked = {"model": MODEL, "tools": [function]}
        first = responses.create(input=QUESTION, tool_choice="required", **asked)
        outputs = [
            {
                "type": "function_call_output",
                "call_id": item.call_id,
                "output": weather(**json.loads(item.arguments)),
            }
            for item in first.output
            if item.type == "function_call"
        ]
        assert outputs
        again = responses.create(input=outputs, previous_response_id=first.id, **asked)
        return [output["output"] for output in outputs] + [again.status]

    def structured_output() -> Any:
        answer = responses.parse(model=MODEL, input="A city?", text_format=city_class())
        return answer.output_parsed.city

    def error() -> Any:
        return error_of(lambda: responses.create(model="other", input=SUM))

    def cancelled() -> Any:
        return some_of(responses.create(model=MODEL, input=STORY, stream=True))

    return plain, streamed, tool_call, structured_output, error, cancelled


def anthropic(base: str) -> Sequence[Step]:
    from anthropic import Anthropic

    messages: Any = Anthropic(base_url=base, api_key="none").messages
    asked = {"model": MODEL, "max_tokens": 200}
    tool = {"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA}

    def plain() -> Any:
        return nonempty(messages.create(messages=[user(SUM)], **asked).content[0].text)

    def streamed() -> Any:
        with messages.stream(messages=[user(SUM)], **asked) as stream:
            return nonempty("".join(stream.text_stream))

    def tool_call() -> Any:
        said, tools = [user(QUESTION)], {"tools": [tool]}
        first = messages.create(messages=said, tool_choice={"type": "any"}, **asked, **tools)
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": weather(**block.input)}
            for block in first.content
            if block.type == "tool_use"
        ]
        assert results
        said += [{"role": "assistant", "content": first.content}, user(results)]
        again = messages.create(messages=said, **asked, **tools)
        return [result["content"] for result in results] + [again.stop_reason]

    def structured_output() -> Any:
        answer = messages.parse(messages=[user("A city?")], output_format=city_class(), **asked)
        return answer.parsed_output.city

    def error() -> Any:
        return error_of(lambda: messages.create(messages=[user(SUM)], **asked | {"model": "other"}))

    def cancelled() -> Any:
        long = asked | {"max_tokens": 4000}
        return some_of(messages.create(messages=[user(STORY)], stream=True, **long))

    return plain, streamed, tool_call, structured_output, error, cancelled


# ---- frameworks -------------------------------------------------------------------------------


def _langchain(chat_of: Callable[[str], Any]) -> Sequence[Step]:
    """The steps of a chat model of LangChain's, which `chat_of` makes for the name of a model."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    chat = chat_of(MODEL)

    def plain() -> Any:
        return nonempty(chat.invoke(SUM).text)

    def streamed() -> Any:
        return nonempty("".join(piece.text for piece in chat.stream(SUM)))

    def tool_call() -> Any:
        question, tools = HumanMessage(QUESTION), [tool(weather)]
        call = chat.bind_tools(tools, tool_choice="any").invoke([question])
        results = [
            ToolMessage(weather(**one["args"]), tool_call_id=one["id"]) for one in call.tool_calls
        ]
        assert results
        again = chat.bind_tools(tools).invoke([question, call, *results])
        return [result.text for result in results] + [again.type]

    def structured_output() -> Any:
        return chat.with_structured_output(city_class()).invoke("A city?").city

    def error() -> Any:
        return error_of(lambda: chat_of("other").invoke(SUM))

    def cancelled() -> Any:
        return some_of(chat.stream(STORY))

    return plain, streamed, tool_call, structured_output, error, cancelled


def langchain_openai(base: str) -> Sequence[Step]:
    from langchain_openai import ChatOpenAI

    return _langchain(lambda model: ChatOpenAI(model=model, base_url=f"{base}/v1", api_key="none"))


def langchain_anthropic(base: str) -> Sequence[Step]:
    from langchain_anthropic import ChatAnthropic

    return _langchain(lambda model: ChatAnthropic(model_name=model, base_url=base, api_key="none"))


def _litellm(provider: str, api_base: str) -> Sequence[Step]:
    """The steps of LiteLLM's `completion` with a provider."""
    import litellm

    settings: Any = {
        "model": f"{provider}/{MODEL}",
        "api_base": api_base,
        "api_key": "none",
    }

    def plain() -> Any:
        answer: Any = litellm.completion(messages=[user(SUM)], **settings)
        return nonempty(answer.choices[0].message.content)

    def streamed() -> Any:
        chunks: Any = litellm.completion(messages=[user(SUM)], stream=True, **settings)
        return nonempty("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

    def tool_call() -> Any:
        said: Any = [user(QUESTION)]
        asked = {"tools": [TOOL], **settings}
        first: Any = litellm.completion(messages=said, tool_choice="required", **asked)
        message = first.choices[0].message
        results = tool_results(message)
        again: Any = litellm.completion(messages=[*said, message, *results], **asked)
        return [result["content"] for result in results] + [again.choices[0].finish_reason]

    def structured_output() -> Any:
        answer: Any = litellm.completion(
            messages=[user("A city?")], response_format=city_class(), **settings
        )
        return city_class().model_validate_json(answer.choices[0].message.content).city

    def error() -> Any:
        wrong = settings | {"model": f"{provider}/other"}
        return error_of(lambda: litellm.completion(messages=[user(SUM)], **wrong))

    def cancelled() -> Any:
        return some_of(litellm.completion(messages=[user(STORY)], stream=True, **settings))

    return plain, streamed, tool_call, structured_output, error, cancelled


def litellm_openai(base: str) -> Sequence[Step]:
    return _litellm("openai", f"{base}/v1")


def litellm_vllm(base: str) -> Sequence[Step]:
    return _litellm("hosted_vllm", f"{base}/v1")


def litellm_anthropic(base: str) -> Sequence[Step]:
    return _litellm("anthropic", base)


def _pydantic_ai(model_of: Callable[[str], Any]) -> Sequence[Step]:
    """The steps of an agent of pydantic-ai with the model that `model_of` makes for a name. Its
    output is a tool by default, whose call it requires."""
    from pydantic_ai import Agent, UsageLimitExceeded, UsageLimits

    def plain() -> Any:
        return nonempty(Agent(model_of(MODEL)).run_sync(SUM).output)

    def streamed() -> Any:
        async def talk() -> str:
            async with Agent(model_of(MODEL)).run_stream(SUM) as stream:
                return str(await stream.get_output())

        return nonempty(asyncio.run(talk()))

    def tool_call() -> Any:
        """The agent requires a call of the tool or of its output, and this model may call the tool
        again and again."""
        called = []

        def noted(city: Literal["Oslo", "Rome"]) -> str:
            """The weather of a city."""
            called.append(city)
            return weather(city)

        agent: Any = Agent(model_of(MODEL), tools=[noted], output_type=city_class())
        for _ in range(5):  # until it has called the tool
            with suppress(UsageLimitExceeded):
                agent.run_sync(QUESTION, usage_limits=UsageLimits(request_limit=3))
            if called:
                break
        assert called
        return called

    def structured_output() -> Any:
        agent: Any = Agent(model_of(MODEL), output_type=city_class())
        return agent.run_sync("A city?").output.city

    def error() -> Any:
        return error_of(lambda: Agent(model_of("other")).run_sync(SUM))

    def cancelled() -> Any:
        async def leave() -> int:
            number = 0
            async with Agent(model_of(MODEL)).run_stream(STORY) as stream:
                async for _ in stream.stream_text(delta=True, debounce_by=None):
                    number += 1
                    if number == 4:
                        break
            return number

        return asyncio.run(leave())

    return plain, streamed, tool_call, structured_output, error, cancelled


def pydantic_ai_openai(base: str) -> Sequence[Step]:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{base}/v1", api_key="none")
    return _pydantic_ai(lambda model: OpenAIChatModel(model, provider=provider))


def pydantic_ai_anthropic(base: str) -> Sequence[Step]:
    from anthropic import AsyncAnthropic
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    client = AsyncAnthropic(base_url=base, api_key="none")
    provider = AnthropicProvider(anthropic_client=client)
    return _pydantic_ai(lambda model: AnthropicModel(model, provider=provider))


def _instructor(create: Callable[..., Any], asked: dict[str, Any]) -> Sequence[Step]:
    """The steps of instructor, all of whose answers are structured."""
    import instructor

    def tool_call() -> Any:
        return create(messages=[user("A city?")], response_model=city_class(), **asked).city

    def streamed() -> Any:
        partial = instructor.Partial[city_class()]  # type: ignore[misc]
        pieces = list(
            create(messages=[user("A city?")], response_model=partial, stream=True, **asked)
        )
        return nonempty(pieces[-1].city)

    def error() -> Any:
        wrong = asked | {"model": "other"}
        return error_of(
            lambda: create(messages=[user("A city?")], response_model=city_class(), **wrong)
        )

    return tool_call, streamed, error


def instructor_openai(base: str) -> Sequence[Step]:
    import instructor
    import openai

    client: Any = instructor.from_openai(openai.OpenAI(base_url=f"{base}/v1", api_key="none"))
    formed: Any = instructor.from_openai(
        openai.OpenAI(base_url=f"{base}/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA
    )

    def structured_output() -> Any:
        asked = {"model": MODEL, "messages": [user("A city?")]}
        return formed.chat.completions.create(response_model=city_class(), **asked).city

    return *_instructor(client.chat.completions.create, {"model": MODEL}), structured_output


def instructor_anthropic(base: str) -> Sequence[Step]:
    import instructor
    from anthropic import Anthropic

    client: Any = instructor.from_anthropic(Anthropic(base_url=base, api_key="none"))
    return _instructor(client.messages.create, {"model": MODEL, "max_tokens": 400})


def llama_index(base: str) -> Sequence[Step]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def model_of(name: str) -> Any:
        return OpenAILike(
            model=name,
            api_base=f"{base}/v1",
            api_key="none",
            is_chat_model=True,
            is_function_calling_model=True,
        )

    llm = model_of(MODEL)
    said = [ChatMessage(SUM)]

    def plain() -> Any:
        return nonempty(llm.chat(said).message.content)

    def streamed() -> Any:
        return nonempty("".join(piece.delta or "" for piece in llm.stream_chat(said)))

    def tool_call() -> Any:
        tool = FunctionTool.from_defaults(weather)
        question = ChatMessage(QUESTION)
        first = llm.chat_with_tools([tool], chat_history=[question], tool_required=True)
        calls = llm.get_tool_calls_from_response(first)
        results = [
            ChatMessage(
                weather(**call.tool_kwargs),
                role="tool",
                additional_kwargs={"tool_call_id": call.tool_id},
            )
            for call in calls
        ]
        again = llm.chat_with_tools([tool], chat_history=[question, first.message, *results])
        return [result.content for result in results] + [str(again.message.role)]

    def structured_output() -> Any:
        return llm.as_structured_llm(city_class()).complete("A city?").raw.city

    def error() -> Any:
        return error_of(lambda: model_of("other").chat(said))

    def cancelled() -> Any:
        return some_of(llm.stream_chat([ChatMessage(STORY)]))

    return plain, streamed, tool_call, structured_output, error, cancelled


def smolagents(base: str) -> Sequence[Step]:
    from smolagents import ChatMessage, OpenAIServerModel, ToolCallingAgent
    from smolagents import tool as tool_of

    def model_of(name: str) -> Any:
        return OpenAIServerModel(name, api_base=f"{base}/v1", api_key="none")

    model = model_of(MODEL)

    def said(text: str) -> Any:
        return [ChatMessage(role="user", content=[{"type": "text", "text": text}])]

    def plain() -> Any:
        return nonempty(model.generate(said(SUM)).content)

    def streamed() -> Any:
        pieces = model.generate_stream(said(SUM))
        return nonempty("".join(piece.content or "" for piece in pieces))

    def tool_call() -> Any:
        """An agent with its own prompt. It requires a call in every step."""
        agent = ToolCallingAgent(tools=[tool_of(weather)], model=model, max_steps=2)
        agent.run(QUESTION)
        called = [
            call.name
            for step in agent.memory.steps
            for call in getattr(step, "tool_calls", None) or ()
        ]
        assert called
        assert set(called) <= {"weather", "final_answer"}
        return called

    def structured_output() -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        answer = model.generate(said("A city?"), response_format=form)
        return city_class().model_validate_json(answer.content).city

    def error() -> Any:
        return error_of(lambda: model_of("other").generate(said(SUM)))

    def cancelled() -> Any:
        return some_of(model.generate_stream(said(STORY)))

    return plain, streamed, tool_call, structured_output, error, cancelled


def outlines(base: str) -> Sequence[Step]:
    import openai
    from outlines import from_openai

    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none")
    model: Any = from_openai(client, MODEL)

    def plain() -> Any:
        return nonempty(model(SUM))

    def streamed() -> Any:
        return nonempty("".join(model.stream(SUM)))

    def structured_output() -> Any:
        return city_class().model_validate_json(model("A city?", city_class())).city

    def error() -> Any:
        wrong: Any = from_openai(client, "other")
        return error_of(lambda: wrong(SUM))

    def cancelled() -> Any:
        return some_of(model.stream(STORY))

    return plain, streamed, structured_output, error, cancelled


# ---- agents -----------------------------------------------------------------------------------


def autogen(base: str) -> Sequence[Step]:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelFamily, UserMessage
    from autogen_core.tools import FunctionTool
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    def client_of(name: str) -> Any:
        info: Any = {"vision": False, "function_calling": True, "json_output": True}
        info |= {"family": ModelFamily.UNKNOWN, "structured_output": True}
        settings: Any = {"base_url": f"{base}/v1", "api_key": "none", "model_info": info}
        return OpenAIChatCompletionClient(model=name, **settings)

    def said(text: str) -> Any:
        return [UserMessage(content=text, source="user")]

    def agent_says(**settings: Any) -> Any:
        async def talk() -> Any:
            agent = AssistantAgent("helper", client_of(MODEL), **settings)
            return (await agent.run(task=QUESTION)).messages[-1]

        return asyncio.run(talk())

    def plain() -> Any:
        return nonempty(agent_says().content)

    def streamed() -> Any:
        return nonempty(agent_says(model_client_stream=True).content)

    def tool_call() -> Any:
        """The agent cannot be told to require a call, so it offers the tool, and its client is
        asked for a call."""
        tool = FunctionTool(weather, description="The weather of a city.", strict=True)
        agent_says(tools=[weather])

        async def talk() -> Any:
            client = client_of(MODEL)
            result = await client.create(said(QUESTION), tools=[tool], tool_choice="required")
            return [json.loads(call.arguments) for call in result.content]

        calls = asyncio.run(talk())
        return [weather(**call) for call in calls]

    def structured_output() -> Any:
        return agent_says(output_content_type=city_class()).content.city

    def error() -> Any:
        return error_of(lambda: asyncio.run(client_of("other").create(said(SUM))))

    def cancelled() -> Any:
        async def leave() -> int:
            number = 0
            pieces = client_of(MODEL).create_stream(said(STORY))
            async for _ in pieces:
                number += 1
                if number == 4:
                    break
            await pieces.aclose()
            return number

        return asyncio.run(leave())

    return plain, streamed, tool_call, structured_output, error, cancelled


def langchain_agent(base: str) -> Sequence[Step]:
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    def agent_of(name: str = MODEL, **settings: Any) -> Any:
        chat = ChatOpenAI(model=name, base_url=f"{base}/v1", api_key="none")
        return create_agent(chat, settings.pop("tools", []), **settings)

    def asked(text: str) -> Any:
        return {"messages": [user(text)]}

    def plain() -> Any:
        return nonempty(agent_of().invoke(asked(SUM))["messages"][-1].text)

    def streamed() -> Any:
        pieces = agent_of().stream(asked(SUM), stream_mode="messages")
        return nonempty("".join(piece.text for piece, _ in pieces))

    def tool_call() -> Any:
        """The agent offers the tool, and the model calls it by itself."""
        state = agent_of(tools=[tool(weather)]).invoke(asked(QUESTION))
        kinds = [message.type for message in state["messages"]]
        assert "tool" in kinds
        return kinds

    def structured_output() -> Any:
        state = agent_of(response_format=city_class()).invoke(asked("A city?"))
        return state["structured_response"].city

    def error() -> Any:
        return error_of(lambda: agent_of("other").invoke(asked(SUM)))

    def cancelled() -> Any:
        return some_of(agent_of().stream(asked(STORY), stream_mode="messages"))

    return plain, streamed, tool_call, structured_output, error, cancelled


def openai_agents(base: str) -> Sequence[Step]:
    """OpenAI's Agents SDK over chat completions; use_openai_agents.py has the Responses API."""
    import openai
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)

    def agent_of(name: str = MODEL, **settings: Any) -> Any:
        client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none")
        model = OpenAIChatCompletionsModel(model=name, openai_client=client)
        return Agent(name="helper", model=model, **settings)

    def run(agent: Any, text: str) -> Any:
        return asyncio.run(Runner.run(agent, text))

    def plain() -> Any:
        return nonempty(run(agent_of(), SUM).final_output)

    def streamed() -> Any:
        async def talk() -> Any:
            result = Runner.run_streamed(agent_of(), SUM)
            async for _ in result.stream_events():
                pass
            return result.final_output

        return nonempty(asyncio.run(talk()))

    def tool_call() -> Any:
        """The SDK itself takes the requirement back after the first call."""
        required = ModelSettings(tool_choice="required")
        agent = agent_of(tools=[function_tool(weather)], model_settings=required)
        return [item.type for item in run(agent, QUESTION).new_items]

    def structured_output() -> Any:
        return run(agent_of(output_type=city_class()), "A city?").final_output.city

    def error() -> Any:
        return error_of(lambda: run(agent_of("other"), SUM))

    def cancelled() -> Any:
        async def leave() -> int:
            number = 0
            result = Runner.run_streamed(agent_of(), STORY)
            async for event in result.stream_events():
                number += event.type == "raw_response_event"
                if number == 8:
                    result.cancel()
            return number

        return asyncio.run(leave())

    return plain, streamed, tool_call, structured_output, error, cancelled


CLIENTS: dict[str, tuple[Callable[[str], Sequence[Step]], tuple[str, ...]]] = {
    "openai, chat": (openai_chat, ("openai",)),
    "openai, completions": (openai_completions, ("openai",)),
    "openai, embeddings": (openai_embeddings, ("openai",)),
    "openai, responses": (openai_responses, ("openai",)),
    "anthropic": (anthropic, ("anthropic",)),
    "langchain-openai": (langchain_openai, ("langchain-openai", "openai")),
    "langchain-anthropic": (langchain_anthropic, ("langchain-anthropic", "anthropic")),
    "litellm, openai": (litellm_openai, ("litellm", "openai")),
    "litellm, hosted_vllm": (litellm_vllm, ("litellm",)),
    "litellm, anthropic": (litellm_anthropic, ("litellm",)),
    "pydantic-ai, openai": (pydantic_ai_openai, ("pydantic-ai-slim", "openai")),
    "pydantic-ai, anthropic": (pydantic_ai_anthropic, ("pydantic-ai-slim", "anthropic")),
    "instructor, openai": (instructor_openai, ("instructor", "openai")),
    "instructor, anthropic": (instructor_anthropic, ("instructor", "anthropic")),
    "llama-index": (llama_index, ("llama-index-llms-openai-like", "openai")),
    "smolagents": (smolagents, ("smolagents", "openai")),
    "outlines": (outlines, ("outlines", "openai")),
    "autogen": (autogen, ("autogen-agentchat", "autogen-ext", "openai")),
    "langchain agent": (langchain_agent, ("langchain", "langchain-openai", "openai")),
    "openai-agents, chat": (openai_agents, ("openai-agents", "openai")),
}


def _ends(url: str) -> None:
    """Wait until the server has no request any more, for ten seconds at most."""
    for _ in range(100):
        with urllib.request.urlopen(f"{url}/load") as answer:
            if json.load(answer)["server_load"] == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server still works for a client that has gone")


def run_client(name: str, url: str) -> dict[str, Any]:
    """Run the steps of a client, and return what came of them."""
    steps_for, packages = CLIENTS[name]
    with needs(f"pip install {' '.join(packages)}"):
        steps = Steps(*packages)
        direct = steps_for(url)
    with recording(url) as (proxy, requests):

        def run(step: Step, beside: Step) -> None:
            """Run a step through the proxy; but one that gives a stream up without it, as a proxy
            would hide from the server that the client is gone."""

            def told() -> Any:
                requests.clear()
                if step.__name__ != "cancelled":
                    return {"told": step(), "requests": list(requests)}
                found = beside()
                _ends(url)
                return {"told": found}

            told.__name__ = step.__name__
            steps.run(told)

        for step, beside in zip(steps_for(proxy), direct, strict=True):
            run(step, beside)
    return steps.result()


def main() -> int:
    parser = argparse.ArgumentParser(description="Clients with their defaults against a server.")
    parser.add_argument("url")
    parser.add_argument("clients", nargs="+", choices=CLIENTS, metavar="CLIENT")
    parser.add_argument("--json", type=Path, help="a file of results, which these are added to")
    args = parser.parse_args()
    results = {name: run_client(name, args.url) for name in args.clients}
    for name, result in results.items():
        failed = [step["step"] for step in result["steps"] if not step["works"]]
        print(f"{name}: {len(result['steps'])} steps, failed: {failed or 'none'}")
    if args.json:
        before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        text = json.dumps(before | results, indent=1) + "\n"
        args.json.write_text(text, encoding="utf-8")
    works = [step["works"] for result in results.values() for step in result["steps"]]
    return 0 if all(works) else 1


if __name__ == "__main__":
    raise SystemExit(main())

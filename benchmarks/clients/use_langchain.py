"""langchain-openai against a server: ChatOpenAI as an application uses it.

    python benchmarks/clients/use_langchain.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with langchain-openai, against the default model, and asks what it can
answer. Every step asserts its results; a failed step is reported and makes the exit status 1.

Knows: LangChain's interface. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from needs import needs
from steps import Steps, run_program

with needs("pip install langchain-openai"):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAI
    from pydantic import BaseModel, Field

SUM = "What is 17 + 25?"


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    likes: Literal["tea", "coffee"]


@tool
def get_weather(city: Literal["Oslo", "Rome"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}, 20 {unit}."


def steps_of(url: str) -> Steps:
    """Run all steps against the server at `url`, and return them."""
    steps = Steps("langchain-openai", "langchain-core", "openai")
    settings: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "temperature": 0}
    chat = ChatOpenAI(model="minisrv-default", max_completion_tokens=200, **settings)

    @steps.run
    def invoke() -> Any:
        answer = chat.invoke([SystemMessage("Answer briefly."), HumanMessage(SUM)])
        assert answer.content == "42"
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.usage_metadata is not None
        return answer.usage_metadata["output_tokens"]

    @steps.run
    def conversation() -> Any:
        answer = chat.invoke([HumanMessage(SUM), chat.invoke(SUM), HumanMessage("What is 9 - 4?")])
        assert answer.content == "5"

    @steps.run
    def stream() -> Any:
        chunks = list(chat.stream("Copy this list: pear, apple, fig", stream_usage=True))
        assert "".join(str(chunk.content) for chunk in chunks) == "pear, apple, fig"
        [usage] = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        return usage["output_tokens"]

    @steps.run
    def batch() -> Any:
        answers = chat.batch([f"What is {i} + {i}?" for i in range(1, 17)])
        assert [answer.content for answer in answers] == [str(2 * i) for i in range(1, 17)]

    @steps.run
    def asynchronous() -> Any:
        async def both() -> Any:
            text = "".join([str(chunk.content) async for chunk in chat.astream(SUM)])
            return text, (await chat.ainvoke(SUM)).content

        assert asyncio.run(both()) == ("42", "42")

    @steps.run
    def logprobs() -> Any:
        answer = chat.bind(logprobs=True, top_logprobs=2).invoke(SUM)
        content = answer.response_metadata["logprobs"]["content"]
        assert content[0]["token"] == "4"
        assert len(content[0]["top_logprobs"]) == 2

    @steps.run
    def stop_and_seed() -> Any:
        sampled = ChatOpenAI(model="minisrv-default", seed=7, **settings | {"temperature": 1})
        told = [sampled.invoke("Tell me a story.", stop=["."]).content for _ in range(2)]
        assert told[0] == told[1]
        assert "." not in told[0]

    @steps.run
    def completion() -> Any:
        text = OpenAI(model="minisrv-default", max_tokens=8, **settings).invoke("Once upon a time")
        assert text.startswith(", there ")

    for method in ("json_schema", "json_mode"):

        @steps.run
        def structured(method: Any = method) -> Any:
            model = chat.with_structured_output(
                Person if method == "json_schema" else None, method=method, include_raw=True
            )
            found = model.invoke("Make a JSON object with the name Ada, the age 36, and tea.")
            assert found["parsing_error"] is None
            assert isinstance(found["parsed"], Person if method == "json_schema" else dict)
            return str(found["parsed"])

    for choice in ("required", "get_weather"):

        @steps.run
        def called(choice: str = choice) -> Any:
            bound = chat.bind_tools([get_weather], tool_choice=choice)
            question = HumanMessage("What is the weather in Oslo?")
            answer = bound.invoke([question])
            assert isinstance(answer, AIMessage)
            assert answer.tool_calls
            assert all(call["name"] == "get_weather" for call in answer.tool_calls)
            results = [get_weather.invoke(call) for call in answer.tool_calls]
            assert isinstance(chat.invoke([question, answer, *results]).content, str)
            whole: Any = None
            for chunk in bound.stream([question]):
                whole = chunk if whole is None else whole + chunk
            assert [c["args"] for c in whole.tool_calls] == [c["args"] for c in answer.tool_calls]
            return str(answer.tool_calls[0]["args"])

    @steps.run
    def structured_by_a_function() -> Any:
        model = chat.with_structured_output(Person, method="function_calling")
        return str(model.invoke("Ada is 36 and likes tea."))

    return steps


if __name__ == "__main__":
    raise SystemExit(run_program("ChatOpenAI against a server.", steps_of))

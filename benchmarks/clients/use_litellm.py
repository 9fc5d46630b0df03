"""LiteLLM against a server, as `openai/` and as `hosted_vllm/`.

    python benchmarks/clients/use_litellm.py http://127.0.0.1:8000 [--json out.json]

Runs in an environment with litellm, against the default model, and asks what it can answer.
Every step asserts its results; a failed step is reported and makes the exit status 1.

Knows: LiteLLM's interface. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from needs import needs
from steps import Steps, run_program

with needs("pip install litellm"):
    import litellm
    from pydantic import BaseModel, Field

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
MODEL = "minisrv-default"


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


def steps_of(url: str) -> Steps:
    """Run all steps against the server at `url`, and return them."""
    steps = Steps("litellm", "openai")
    for provider in ("openai", "hosted_vllm"):
        settings: dict[str, Any] = {
            "model": f"{provider}/{MODEL}",
            "api_base": f"{url}/v1",
            "api_key": "none",
            "temperature": 0,
        }

        @steps.run
        def completion(settings: dict[str, Any] = settings) -> Any:
            answer = litellm.completion(messages=SUM, max_tokens=20, **settings)
            assert answer.choices[0].message.content == "42"
            assert answer.choices[0].finish_reason == "stop"
            return answer.usage.completion_tokens

        @steps.run
        def parameters(settings: dict[str, Any] = settings) -> Any:
            own = {"top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 1}
            more = {"n": 2, "stop": ["\n"], "logprobs": True, "top_logprobs": 2, "user": "me"}
            answer = litellm.completion(
                messages=SUM,
                max_completion_tokens=9,
                logit_bias={"7": -1},
                **own,
                **more,
                **settings,
            )
            assert [choice.message.content for choice in answer.choices] == ["42", "42"]
            assert answer.choices[0].logprobs.content[0].token == "4"

        @steps.run
        def stream(settings: dict[str, Any] = settings) -> Any:
            async def told() -> Any:
                chunks = await litellm.acompletion(
                    messages=SUM,
                    stream=True,
                    stream_options={"include_usage": True},
                    **settings,
                )
                return [chunk async for chunk in chunks]

            chunks = asyncio.run(told())
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == "42"
            [usage] = [c.usage for c in chunks if getattr(c, "usage", None)]
            return usage.completion_tokens

        @steps.run
        def many_at_once(settings: dict[str, Any] = settings) -> Any:
            async def told() -> Any:
                questions = [
                    [{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(1, 17)
                ]
                calls = (litellm.acompletion(messages=q, **settings) for q in questions)
                return await asyncio.gather(*calls)

            answers = [answer.choices[0].message.content for answer in asyncio.run(told())]
            assert answers == [str(2 * i) for i in range(1, 17)]

        @steps.run
        def structured(settings: dict[str, Any] = settings) -> Any:
            question = {"role": "user", "content": "Make a JSON object: name Ada, age 36."}
            answer = litellm.completion(messages=[question], response_format=Person, **settings)
            return Person.model_validate_json(answer.choices[0].message.content).model_dump()

        @steps.run
        def called(settings: dict[str, Any] = settings) -> Any:
            question = {"role": "user", "content": "What is the weather in Oslo?"}
            asked = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 300}
            answer = litellm.completion(messages=[question], **asked, **settings)
            [choice] = answer.choices
            assert choice.finish_reason == "tool_calls"
            call = choice.message.tool_calls[0]
            assert call.function.name == "get_weather"
            result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
            turns = [question, choice.message, result]
            litellm.completion(messages=turns, tools=[WEATHER], max_tokens=20, **settings)
            return json.loads(call.function.arguments)

    @steps.run
    def text_completion() -> Any:
        where = {"model": f"text-completion-openai/{MODEL}", "api_base": f"{url}/v1"}
        answer = litellm.text_completion(
            prompt=["Once upon a time", "Once upon a time"],
            api_key="none",
            max_tokens=8,
            temperature=0,
            logprobs=1,
            **where,
        )
        first, second = (choice.text for choice in answer.choices)
        assert first == second
        assert first.startswith(", there ")

    @steps.run
    def an_error_is_the_clients() -> Any:
        try:
            litellm.completion(
                model=f"openai/{MODEL}",
                api_base=f"{url}/v1",
                api_key="none",
                messages=[{"role": "user", "content": "hi " * 9000}],
            )
        except litellm.ContextWindowExceededError:
            return "ContextWindowExceededError"
        raise AssertionError("a prompt longer than the context was answered")

    return steps


if __name__ == "__main__":
    raise SystemExit(run_program("LiteLLM against a server.", steps_of))

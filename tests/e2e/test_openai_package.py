"""The official client against a real server, through everything that it is used for, synchronous
and asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.server import Server, by_mode

MODEL = "minisrv-default"
PROMPT = "One morning in early spring"
MESSAGES: Any = [{"role": "user", "content": "Say something about the sea."}]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    """A completion, greedy and of 32 tokens unless the fields say otherwise."""
    extra = {"ignore_eos": True} | fields.pop("extra_body", {})
    defaults = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 32}
    return client.completions.create(**(defaults | fields), extra_body=extra)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    defaults = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 32}
    return client.chat.completions.create(**(defaults | fields))


def text_of(client: openai.OpenAI, **fields: Any) -> str:
    return str(complete(client, **fields).choices[0].text)


def test_completion_streamed_equals_not_streamed(client: openai.OpenAI) -> None:
    whole = complete(client)
    assert whole.object == "text_completion"
    assert whole.model == MODEL
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 32
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 32
    chunks = list(complete(client, stream=True))
    assert len(chunks) > 20, "it comes in pieces"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {(c.id, c.created, c.model, c.usage) for c in chunks} == {
        (chunks[0].id, chunks[0].created, MODEL, None)
    }


def test_chat_streamed_equals_not_streamed(client: openai.OpenAI) -> None:
    whole = chat(client)
    message = whole.choices[0].message
    assert (whole.object, message.role) == ("chat.completion", "assistant")
    assert message.content
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]


def test_the_conversation_goes_on(client: openai.OpenAI) -> None:
    """The client sends its own message objects back, with all the fields that it has added."""
    answer = chat(client).choices[0].message
    again = chat(client, messages=[*MESSAGES, answer, *MESSAGES])
    assert again.usage.prompt_tokens > chat(client).usage.prompt_tokens
    assert again.choices[0].message.content


def test_usage_of_a_stream(client: openai.OpenAI) -> None:
    for ask in (complete, chat):
        ask(client)  # fills the prefix cache, so that both find the same
        whole = ask(client)
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_cached_tokens(client: openai.OpenAI) -> None:
    """A prompt that was sent before is found in the prefix cache except for its last block, and
    only under the same cache salt."""

    def cached(prompt: str, salt: str | None = None) -> int:
        answer = complete(client, prompt=prompt, max_tokens=4, extra_body={"cache_salt": salt})
        texts.add(answer.choices[0].text)
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    texts: set[str] = set()
    prompt = "There was a boat that nobody had ever seen before. " * 6
    assert [cached(prompt), cached(prompt, "mine")] == [0, 0]
    again = cached(prompt)
    assert again >= 16
    assert again % 16 == 0
    assert cached(prompt, "mine") == again
    assert cached(prompt, "yours") == 0
    assert len(texts) == 1
    assert cached("Who saw it? " + prompt) == 0


def test_a_seed_fixes_the_text_alone_and_in_company(server: Server, client: openai.OpenAI) -> None:
    """A seed gives the same text whether the request runs alone or beside others."""
    alone = text_of(client, seed=7, **SAMPLED)
    assert text_of(client, seed=7, **SAMPLED) == alone
    assert text_of(client, seed=8, **SAMPLED) != alone

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0
        ) as many:
            prompts = [PROMPT, *(f"{'word ' * 9 * i}and number {i}" for i in range(6))]
            asked = (
                many.completions.create(model=MODEL, prompt=prompt, seed=7, **SAMPLED)
                for prompt in prompts
            )
            return await asyncio.gather(*asked)

    answers = asyncio.run(together())
    assert answers[0].choices[0].text == alone
    assert len({answer.choices[0].text for answer in answers}) == 7


def test_without_a_seed_texts_differ(client: openai.OpenAI) -> None:
    assert len({text_of(client, **SAMPLED) for _ in range(4)}) > 1


def test_choices_differ_and_come_out_the_same_again(client: openai.OpenAI) -> None:
    """The first choice equals that of a request without `n`, and each further one that of the next
    seed."""
    alone = [text_of(client, seed=7 + index, **SAMPLED) for index in range(3)]
    choices = complete(client, seed=7, n=3, **SAMPLED)
    assert [choice.text for choice in choices.choices] == alone
    assert len(set(alone)) == 3
    assert choices.usage.completion_tokens == 3 * 24
    conversation = chat(client, n=2, temperature=1, seed=7)
    assert len({choice.message.content for choice in conversation.choices}) == 2


def test_async_chat_streams_side_by_side(server: Server, client: openai.OpenAI) -> None:
    questions = [f"Copy this: {word}" for word in ("apple", "river", "blue stone", "x y z")]
    messages: list[Any] = [[{"role": "user", "content": text}] for text in questions]
    one_by_one = [chat(client, messages=m).choices[0].message.content for m in messages]

    async def read(many: openai.AsyncOpenAI, asked: Any) -> str:
        async with many.chat.completions.stream(
            model=MODEL, messages=asked, temperature=0, max_tokens=32
        ) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        return final.choices[0].message.content or ""

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0
        ) as many:
            return await asyncio.gather(*(read(many, asked) for asked in messages))

    assert asyncio.run(together()) == one_by_one


def test_stop_strings(client: openai.OpenAI) -> None:
    """The stop strings are cut from the middle of the text, so that they cross the borders of
    tokens."""
    text = text_of(client)
    for start, length in ((10, 1), (15, 4), (20, 9)):
        stop = text[start : start + length]
        expected = text[: text.index(stop)]
        whole = complete(client, stop=["\x00 never", stop])
        assert whole.choices[0].text == expected
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens < 32
        chunks = list(complete(client, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_stop_string_may_stay(client: openai.OpenAI) -> None:
    text = text_of(client)
    stop = text[15:19]
    extra = {"include_stop_str_in_output": True}
    assert text_of(client, stop=stop, extra_body=extra) == text[: text.index(stop) + 4]


def test_a_stop_string_that_does_not_come(client: openai.OpenAI) -> None:
    """Text that was held back because it could begin a stop string is sent at the end."""
    text = text_of(client)
    stop = text[-3:] + "\x00"
    assert text_of(client, stop=stop) == text
    streamed = complete(client, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_stop_token_ids(client: openai.OpenAI) -> None:
    ids = complete(client, extra_body={"return_token_ids": True}).choices[0].token_ids
    last = ids[5]
    extra = {"return_token_ids": True, "stop_token_ids": [last]}
    stopped = complete(client, extra_body=extra)
    assert stopped.choices[0].token_ids == ids[: ids.index(last) + 1]
    assert stopped.choices[0].finish_reason == "stop"
    assert text_of(client).startswith(stopped.choices[0].text)


def test_ignore_eos(client: openai.OpenAI) -> None:
    ended = chat(client, messages=[{"role": "user", "content": "What is 2 + 3?"}])
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens < 32
    ignoring = chat(
        client,
        messages=[{"role": "user", "content": "What is 2 + 3?"}],
        extra_body={"ignore_eos": True},
    )
    assert ignoring.choices[0].finish_reason == "length"
    assert ignoring.usage.completion_tokens == 32
    assert ignoring.choices[0].message.content.startswith(ended.choices[0].message.content)


def test_min_tokens(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    ended = chat(client, messages=messages)
    assert ended.usage.completion_tokens < 20
    longer = chat(client, messages=messages, extra_body={"min_tokens": 20})
    assert longer.usage.completion_tokens >= 20
    text = text_of(client)
    stop = text[15:19]
    extra = {"min_tokens": 31}
    assert text_of(client, stop=stop, extra_body=extra).startswith(text[: text.index(stop) + 4])


def test_logit_bias(client: openai.OpenAI) -> None:
    first = complete(client, max_tokens=1, extra_body={"return_token_ids": True}).choices[0]
    [token] = first.token_ids
    banned = complete(client, logit_bias={str(token): -100}, extra_body={"return_token_ids": True})
    assert token not in banned.choices[0].token_ids
    wanted = complete(client, logit_bias={str(token): 100}, extra_body={"return_token_ids": True})
    assert wanted.choices[0].token_ids == [token] * 32


def test_penalties(client: openai.OpenAI) -> None:
    """Text that repeats without penalties repeats less with them; the first token of a greedy
    answer is the same."""
    prompt = "apple apple apple apple apple apple apple"

    def ids(**fields: Any) -> list[int]:
        extra = {"return_token_ids": True} | fields.pop("extra_body", {})
        answer = complete(client, prompt=prompt, max_tokens=60, extra_body=extra, **fields)
        return list(answer.choices[0].token_ids)

    plain = ids()
    for fields in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        found = ids(**fields)
        assert found[0] == plain[0]
        assert len(set(found)) > len(set(plain))
    assert len(set(ids(extra_body={"repetition_penalty": 1.5}))) > len(set(plain))


def test_token_id_prompts(client: openai.OpenAI) -> None:
    choice = complete(client, extra_body={"return_token_ids": True}).choices[0]
    by_ids = complete(client, prompt=choice.prompt_token_ids)
    assert by_ids.choices[0].text == choice.text
    assert by_ids.usage.prompt_tokens == len(choice.prompt_token_ids)


def test_a_batch_of_prompts(client: openai.OpenAI) -> None:
    """More prompts than run at once: each gets what it would get alone, streamed or not."""
    prompts = [f"{PROMPT}, the number {i}" for i in range(11)]
    alone = [text_of(client, prompt=prompt, max_tokens=8) for prompt in prompts]
    batch = complete(client, prompt=prompts, max_tokens=8)
    assert [choice.index for choice in batch.choices] == list(range(11))
    assert [choice.text for choice in batch.choices] == alone
    assert batch.usage.completion_tokens == 11 * 8
    streamed = [""] * 11
    ends = [0] * 11
    for chunk in complete(client, prompt=prompts, max_tokens=8, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            ends[choice.index] += choice.finish_reason is not None
    assert (streamed, ends) == (alone, [1] * 11)
    ids = [[5, 6, 7], [8, 9]]
    assert len(complete(client, prompt=ids, max_tokens=1).choices) == 2


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    whole = chat(client, **fields)
    content = whole.choices[0].logprobs.content
    assert whole.choices[0].finish_reason == "stop"
    assert len(content) == whole.usage.completion_tokens
    *said, last = (entry.token for entry in content)
    assert "".join(said) == whole.choices[0].message.content
    assert last == "<|im_end|>", "what ended it is told of too"
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token, "greedy takes the most likely"
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert 0 >= entry.logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    chunks = list(chat(client, stream=True, **fields))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=2)
    choice = whole.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.token_logprobs) == 32
    for token, logprob, top, offset in zip(
        choice.logprobs.tokens,
        choice.logprobs.token_logprobs,
        choice.logprobs.top_logprobs,
        choice.logprobs.text_offset,
        strict=True,
    ):
        assert top[token] == logprob == max(top.values())
        assert choice.text[offset : offset + len(token)] == token
    assert text_of(client) == choice.text, "asking for them changes nothing"


def test_echo_scores_a_text(client: openai.OpenAI) -> None:
    """Scoring as lm-eval does it, by token ids, prefilled in chunks of 64 tokens: the
    log-probabilities of the continuation are those with which it was generated."""
    prompt = PROMPT + ", " + "and then it rained, " * 20
    made = complete(
        client, prompt=prompt, logprobs=1, max_tokens=16, extra_body={"return_token_ids": True}
    )
    [choice] = made.choices
    ctxlen = len(choice.prompt_token_ids)
    for max_tokens in (0, 1):
        fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": max_tokens}
        scored = complete(client, prompt=choice.prompt_token_ids + choice.token_ids, **fields)
        assert scored.usage.prompt_tokens_details.cached_tokens == 0
        assert scored.usage.completion_tokens == max_tokens
        assert scored.choices[0].text.startswith(prompt)
        logprobs = scored.choices[0].logprobs
        assert logprobs.token_logprobs[0] is None
        assert logprobs.text_offset[ctxlen] == len(prompt)
        found = logprobs.token_logprobs[ctxlen : ctxlen + 16]
        assert found == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)
        for value, top in zip(found, logprobs.top_logprobs[ctxlen : ctxlen + 16], strict=True):
            assert value == max(top.values()), "greedy"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model: Any = client.models.retrieve(MODEL)
    assert (model.object, model.max_model_len) == ("model", 512)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_graph_steps(client: openai.OpenAI) -> None:
    """If asked, each choice reports the modes in which its steps ran; a stream has them in its last
    chunk."""
    extra = {"include_graph_steps": True}
    expected = {"PIECEWISE": 1, "FULL": 9}
    whole = complete(client, max_tokens=10, extra_body=extra)
    assert by_mode(whole.choices[0].graph_steps) == expected
    chunks = list(complete(client, max_tokens=10, stream=True, extra_body=extra))
    assert by_mode(chunks[-1].choices[0].graph_steps) == expected
    long = complete(client, prompt=[9] * 150, max_tokens=1, extra_body=extra)
    assert by_mode(long.choices[0].graph_steps) == {"PIECEWISE": 3}, "in chunks of 64"


@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="gpt-9", stream=stream)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, top_p=1.5, stream=stream)
    assert bad.value.param == "top_p"
    with pytest.raises(openai.BadRequestError) as unknown:
        chat(client, extra_body={"temperatur": 1}, stream=stream)
    assert unknown.value.param == "temperatur"
    for asked in ({"prompt": [5] * 512}, {"prompt": [5] * 500, "max_tokens": 13}):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as long:
            complete(client, **asked, stream=stream)
        assert long.value.code == "context_length_exceeded"


def test_the_whole_context_can_be_used(client: openai.OpenAI) -> None:
    full = complete(client, prompt=[5] * 500, max_tokens=12)
    assert full.usage.total_tokens == 512
    rest = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert rest.usage is not None
    assert rest.usage.total_tokens == 512, "without a limit a chat may fill the context"


def test_embeddings(client: openai.OpenAI) -> None:
    """Vectors have the length 1, do not depend on the encoding or on what stands beside them, and
    tell texts apart."""
    texts = [PROMPT, "Say something about the sea.", PROMPT]
    whole = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    first, other, again = (item.embedding for item in whole.data)
    assert sum(x * x for x in first) == pytest.approx(1, rel=1e-5)
    assert first == pytest.approx(again, abs=1e-4)
    assert sum(x * y for x, y in zip(first, other, strict=True)) < 0.999
    encoded = client.embeddings.create(model=MODEL, input=PROMPT)
    assert encoded.data[0].embedding == pytest.approx(first, abs=1e-4)
    assert 0 < encoded.usage.prompt_tokens < whole.usage.prompt_tokens

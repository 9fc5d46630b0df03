"""vLLM's fields: which tokens may be sampled, the forms of a structured output by their other
names, cut prompts, and tokens that are spelled as ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from minisrv.request import FinishReason, StructuredOutput
from minisrv.text.structured import GrammarBackend
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs, scored
from tests.text.walks import follow

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS: dict[str, Any] = {
    COMPLETIONS: {"prompt": "The quick brown fox"},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
}
END = 2
GBNF = 'root ::= greeting "!"\ngreeting ::= "hello" | "stop" " " [a-c]+  # a comment\n'


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(outputs([5, END], FinishReason.STOP, logprobs=2))


@pytest.mark.parametrize("path", PROMPTS)
async def test_tokens_reach_the_engine(
    connect: Connect, tokenizer: Tokenizer, engine: FakeEngine, path: str
) -> None:
    """A bad word is ruled out at the beginning of a text and behind a space."""
    body = PROMPTS[path] | {"allowed_token_ids": [5, 7], "bad_words": ["fox", " fox", "lazy dog"]}
    async with connect(engine) as client:
        assert (await client.post(path, json=body)).status_code == 200
    params = engine.requests[0].params
    assert params.allowed_token_ids == (5, 7)
    assert params.bad_words == ()
    texts = [tokenizer.decode(list(ids)) for ids in params.bad_words_token_ids]
    assert texts == ["fox", " fox", "lazy dog", " lazy dog"]


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [INFO.vocab_size]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": 5}, "allowed_token_ids"),
        ({"allowed_token_ids": [5], "guided_regex": "a"}, "allowed_token_ids"),
        ({"bad_words": ["fox"], "guided_regex": "a"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": [" "]}, "bad_words[0]"),
        ({"bad_words": "fox"}, "bad_words"),
        ({"bad_words": ["x" * 65]}, "bad_words[0]"),
        ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_json"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_json": {"minimum": "x"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": 'root ::= "a'}, "guided_grammar"),
        ({"guided_grammar": "root ::= other"}, "guided_grammar"),
        ({"guided_whitespace_pattern": "x"}, "guided_whitespace_pattern"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}, "structured_outputs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
async def test_what_is_refused(
    connect: Connect, engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    async with connect(engine) as client:
        response = await client.post(path, json=PROMPTS[path] | fields)
    assert response.status_code == 400, response.text
    assert str(response.json()["error"]["param"]).startswith(param)


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"guided_json": {"type": "integer"}}, "17", "x"),
        ({"guided_json": '{"type": "integer"}'}, "17", "x"),
        ({"guided_regex": "[ab]+"}, "abba", "abc"),
        ({"guided_choice": ["hello", "world"]}, "world", "fox"),
        ({"guided_grammar": 'start: "hello" " world"?'}, "hello world", "world"),
        ({"guided_grammar": GBNF}, "stop cab!", "stop d!"),
        ({"structured_outputs": {"grammar": GBNF, "disable_fallback": True}}, "hello!", "hello"),
    ],
)
async def test_forms(
    connect: Connect,
    tokenizer: Tokenizer,
    engine: FakeEngine,
    path: str,
    fields: dict[str, Any],
    good: str,
    bad: str,
) -> None:
    async with connect(engine) as client:
        response = await client.post(path, json=PROMPTS[path] | fields)
    assert response.status_code == 200, response.text
    form = engine.requests[0].structured_output
    assert isinstance(form, StructuredOutput)
    assert form.param == next(iter(fields))
    backend = GrammarBackend(tokenizer, INFO.vocab_size, [END])
    assert follow(backend, tokenizer, form, good)
    assert not follow(backend, tokenizer, form, bad)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, 3),
        ({"truncate_prompt_tokens": 100}, None),
        ({"truncate_prompt_tokens": -1}, None),
        ({"truncate_prompt_tokens": -1, "max_tokens": 195}, 5),
        ({"truncate_prompt_tokens": -1, "max_tokens": 200}, 1),
    ],
)
@pytest.mark.parametrize("as_ids", [False, True])
async def test_prompts_are_cut_to_their_end(
    connect: Connect,
    tokenizer: Tokenizer,
    engine: FakeEngine,
    fields: dict[str, Any],
    kept: int | None,
    as_ids: bool,
) -> None:
    """The context has 200 tokens. An echo holds what is left of the prompt."""
    text = "The quick brown fox jumps over the lazy dog."
    ids = tokenizer.encode(text)
    assert len(ids) > 5
    prompt = ids if as_ids else text
    async with connect(engine) as client:
        body = {"prompt": [prompt], "echo": True, "return_token_ids": True, **fields}
        response = await client.post(COMPLETIONS, json=body)
    if kept == 1:  # 200 tokens leave room for no prompt at all
        assert response.status_code == 400
        return
    [choice] = response.json()["choices"]
    left = ids if kept is None else ids[-kept:]
    assert engine.requests[0].prompt_token_ids == choice["prompt_token_ids"] == left
    assert choice["text"].startswith(tokenizer.decode(left))


async def test_the_prompt_of_a_chat_is_cut_too(connect: Connect, engine: FakeEngine) -> None:
    async with connect(engine) as client:
        told = (await client.post("/tokenize", json=PROMPTS[CHAT])).json()["tokens"]
        await client.post(CHAT, json=PROMPTS[CHAT] | {"truncate_prompt_tokens": 4})
    assert engine.requests[0].prompt_token_ids == told[-4:]


async def test_tokens_are_spelled_as_ids(connect: Connect, tokenizer: Tokenizer) -> None:
    script = outputs([5, 9], FinishReason.LENGTH, logprobs=2)
    async with connect(scored(script, 2)) as client:
        body = PROMPTS[COMPLETIONS] | {"logprobs": 2, "echo": True}
        body |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
        [choice] = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    ids = [*choice["prompt_token_ids"], 5, 9]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids]
    assert choice["logprobs"]["top_logprobs"][-1] == {"token_id:9": -0.5, "token_id:10": -1.5}
    async with connect(script) as client:
        body = PROMPTS[CHAT] | {"logprobs": True, "top_logprobs": 2}
        body |= {"return_tokens_as_token_ids": True}
        [choice] = (await client.post(CHAT, json=body)).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert [first["token"], *(top["token"] for top in first["top_logprobs"])] == [
        "token_id:5",
        "token_id:5",
        "token_id:6",
    ]
    assert first["bytes"] == list(tokenizer.token_text(5)[1]), "the bytes are the token's own"

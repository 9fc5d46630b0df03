"""POST /tokenize and /detokenize: the tokens that a generation would see, in vLLM's format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
TEXT = "Hello world 🎉<|im_end|>"
MESSAGES = [{"role": "user", "content": "Hi"}]


async def post(connect: Connect, route: str, **body: Any) -> httpx.Response:
    async with connect(FakeEngine(outputs([300]))) as client:
        return await client.post(route, json=body)


async def test_a_prompt_there_and_back(connect: Connect, tokenizer: Tokenizer) -> None:
    body = (await post(connect, "/tokenize", model="tiny", prompt=TEXT)).json()
    ids = tokenizer.encode(TEXT)
    assert body == {
        "count": len(ids),
        "max_model_len": INFO.max_model_len,
        "tokens": ids,
        "token_strs": None,
    }
    assert (await post(connect, "/detokenize", tokens=ids)).json() == {"prompt": TEXT}
    assert (await post(connect, "/detokenize", tokens=[])).json() == {"prompt": ""}
    spelled = await post(connect, "/tokenize", prompt="a b", return_token_strs=True)
    assert "".join(spelled.json()["token_strs"]) == "aĠb"


async def test_a_long_prompt(connect: Connect, tokenizer: Tokenizer) -> None:
    """A long prompt and its many tokens are processed in a thread, in both directions."""
    text = "hello world " * 9000
    ids = (await post(connect, "/tokenize", prompt=text)).json()["tokens"]
    assert ids == tokenizer.encode(text)
    assert len(ids) > 20_000
    assert (await post(connect, "/detokenize", tokens=ids)).json() == {"prompt": text}


@pytest.mark.parametrize("begun", [True, False])
async def test_messages(connect: Connect, tokenizer: Tokenizer, begun: bool) -> None:
    body = await post(connect, "/tokenize", messages=MESSAGES, add_generation_prompt=begun)
    assert body.json()["tokens"] == tokenizer.apply_chat_template(MESSAGES, begun)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "what": 1}, "what"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [INFO.vocab_size]}, "tokens"),
    ],
)
async def test_what_is_refused(
    connect: Connect, route: str, body: dict[str, Any], param: str
) -> None:
    response = await post(connect, route, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": MESSAGES}])
async def test_null_is_absent(connect: Connect, body: dict[str, Any]) -> None:
    nulls = {"model": None, "add_special_tokens": None, "return_token_strs": None, "tools": None}
    nulls["add_generation_prompt"] = None
    with_nulls = await post(connect, "/tokenize", **nulls, **body)
    assert with_nulls.json() == (await post(connect, "/tokenize", **body)).json()


async def test_the_model_and_the_content_type(connect: Connect) -> None:
    assert (await post(connect, "/tokenize", model="gpt", prompt="a")).status_code == 404
    assert (await post(connect, "/detokenize", model="gpt", tokens=[1])).status_code == 404
    async with connect(FakeEngine(outputs([300]))) as client:
        for route in ("/tokenize", "/detokenize"):
            assert (await client.post(route, content=b"{}")).status_code == 415

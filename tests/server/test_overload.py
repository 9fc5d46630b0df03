"""With a full queue a request is refused before any work is spent on it, and no place is ever
lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.errors import EngineDeadError, RequestError
from minisrv.request import EngineOutput, EngineRequest
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, Script, outputs
from tests.waiting import GUARD_SECONDS, until

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
LONG = "x" * 30_000
"""A prompt so long that it is tokenised in a thread."""


class CountingTokenizer:
    """A tokenizer that counts the texts that it encodes and the chats that it renders; both wait
    until `go` is set."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded = 0
        self.rendered = 0
        self.go = threading.Event()
        self.go.set()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += 1
        assert self.go.wait(GUARD_SECONDS)
        return self._tokenizer.encode(text, add_special_tokens)

    def render_chat(self, *arguments: Any) -> str:
        self.rendered += 1
        assert self.go.wait(GUARD_SECONDS)
        return self._tokenizer.render_chat(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.fixture
def counting(tokenizer: Tokenizer) -> CountingTokenizer:
    return CountingTokenizer(tokenizer)


def engine_of(places: int, script: Script) -> FakeEngine:
    """An engine with this many places, for running and waiting requests together."""
    engine = FakeEngine(script)
    engine.info = msgspec.structs.replace(INFO, max_num_seqs=1, max_waiting=places - 1)
    return engine


def until_told(go: asyncio.Event) -> Script:
    """A script that waits for `go` and then gives one token."""

    def script(request: EngineRequest) -> Iterable[Any]:
        yield go
        yield from outputs([300])(request)

    return script


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused_before_it_is_tokenised(
    connect: Connect, counting: CountingTokenizer, route: str, stream: bool
) -> None:
    go = asyncio.Event()
    engine = engine_of(3, until_told(go))
    async with connect(engine, tokenizer=counting) as client:
        body = ROUTES[route] | {"stream": stream}
        held = [asyncio.create_task(client.post(route, json=body)) for _ in range(3)]
        await until(lambda: len(engine.requests) == 3)
        encoded = counting.encoded
        refused = await client.post(route, json=body)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert counting.encoded == encoded
        go.set()
        assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 3
        assert (await client.post(route, json=body)).status_code == 200


async def test_each_prompt_of_a_list_takes_a_place(
    connect: Connect, counting: CountingTokenizer
) -> None:
    """A list of prompts is refused with 429 if there is no room for all now, and with 400 if there
    never is."""
    go = asyncio.Event()
    engine = engine_of(4, until_told(go))
    async with connect(engine, tokenizer=counting) as client:

        async def complete(*prompts: str) -> httpx.Response:
            return await client.post("/v1/completions", json={"prompt": prompts})

        held = asyncio.create_task(complete("a", "b", "c"))
        await until(lambda: len(engine.requests) == 3)
        assert (await complete("d", "e")).status_code == 429
        never = await complete("a", "b", "c", "d", "e")
        assert never.status_code == 400
        assert never.json()["error"]["param"] == "prompt"
        assert counting.encoded == 3
        last = asyncio.create_task(complete("d"))
        await until(lambda: len(engine.requests) == 4)
        go.set()
        assert {(await task).status_code for task in (held, last)} == {200}


async def test_requests_being_tokenised_count(
    connect: Connect, counting: CountingTokenizer
) -> None:
    """A request takes its place while it is tokenised, even after its client is gone: the thread
    goes on working for it."""
    engine = engine_of(1, outputs([300]))
    counting.go.clear()
    async with connect(engine, tokenizer=counting) as client:
        route = "/v1/completions"
        cut = {"prompt": LONG, "truncate_prompt_tokens": 5}  # or it would be refused at once
        first = asyncio.create_task(client.post(route, json=cut))
        await until(lambda: counting.encoded == 1)
        assert (await client.post(route, json={"prompt": "x"})).status_code == 429
        first.cancel()
        for _ in range(20):  # enough turns of the event loop for the cancellation to take effect
            assert (await client.post(route, json={"prompt": "x"})).status_code == 429
        assert counting.encoded == 1
        counting.go.set()
        await until(lambda: engine.admission.num_taken == 0)
        assert (await client.post(route, json={"prompt": "x"})).status_code == 200
    assert len(engine.requests) == 1, "nobody waits for the first any more"


def fails_late(request: EngineRequest) -> Iterable[Any]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300])
    yield EngineDeadError("gone")


def fails_for_the_second(request: EngineRequest) -> Iterable[Any]:
    if request.request_id.endswith("-1"):
        yield RequestError("no")
    yield EngineOutput(request_id=request.request_id, token_ids=[300])
    yield asyncio.Event()


@pytest.mark.parametrize(
    ("fields", "script"),
    [
        ({}, outputs([300, 301])),
        ({"stop": "a"}, outputs([300] * 50)),
        ({"prompt": ""}, outputs([300])),
        ({"prompt": [7] * 500}, outputs([300])),
        ({"prompt": LONG}, outputs([300])),
        ({}, lambda request: [EngineDeadError("gone")]),
        ({}, lambda request: [ValueError("a bug")]),
        ({}, fails_late),
        ({"prompt": ["a", "b", "c"]}, fails_for_the_second),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_end_gives_the_places_back(
    connect: Connect, fields: dict[str, Any], script: Script, stream: bool
) -> None:
    """Whatever ends a request, its places are free afterwards."""
    engine = engine_of(3, script)
    async with connect(engine) as client:
        await client.post("/v1/completions", json={"prompt": "hi", "stream": stream, **fields})
    assert engine.admission.num_taken == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_a_cancelled_response_gives_the_places_back(
    connect: Connect, stream: bool, prompt: object
) -> None:
    engine = engine_of(3, until_told(asyncio.Event()))
    async with connect(engine) as client:
        body = {"prompt": prompt, "stream": stream}
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        await engine.started.wait()
        assert engine.admission.num_taken == len(prompt)  # type: ignore[arg-type]
        task.cancel()
        await until(lambda: engine.admission.num_taken == 0)


async def test_long_messages_are_rendered_beside_the_event_loop(
    connect: Connect, counting: CountingTokenizer
) -> None:
    """Others are answered while a long chat is rendered in a thread, and that chat has its place by
    then."""
    engine = engine_of(2, outputs([300]))
    counting.go.clear()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}] * 200
    async with connect(engine, tokenizer=counting) as client:
        route = "/v1/chat/completions"
        first = asyncio.create_task(client.post(route, json={"messages": messages}))
        await until(lambda: counting.rendered == 1)
        assert engine.admission.num_taken == 1
        assert (await client.get("/health")).status_code == 200
        counting.go.set()
        assert (await first).status_code == 400  # longer than the context
    assert engine.admission.num_taken == 0

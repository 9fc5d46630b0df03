"""GET /debug/steps: who may read it, what is answered, and that nobody's memory grows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.config import ServerConfig
from minisrv.engine.client import EngineState
from minisrv.engine.trace_format import AskSteps, Steps, TracedBatch, TracedStep, TraceEvent
from minisrv.server import step_trace
from minisrv.server.app import create_app
from minisrv.server.step_trace import MAX_READERS
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import INFO, FakeEngine, outputs
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
PATH = "/debug/steps"
KEPT, ANSWER = 8, 3


def step(number: int) -> TracedStep:
    return TracedStep(
        number,
        1000.0 + number,
        *("FULL", "pure_decode", 4, 4, 3, 1, 3, 3, 0, 99, "TOKENS", None, None),
        *(0, 1, None, None),
        {"launch": 1 / 3},
        number,
    )


class Engine(FakeEngine):
    """A fake engine that has retired the steps before `end`, and keeps the last `KEPT`.

    An answer has at most `ANSWER` steps. One event follows step 5.
    """

    def __init__(self, end: int = 20) -> None:
        super().__init__(outputs([300]))
        self.end = end
        self.asked: list[AskSteps] = []
        self.requests = [("aa", 1), ("bb", 1), ("cc", 1)]

    async def steps(self, ask: AskSteps) -> Steps:
        self.check_serving()
        self.asked.append(ask)
        await asyncio.sleep(0)  # an answer comes over a socket, and never at once
        first = max(0, self.end - KEPT)
        after = self.end - 1 - ask.limit if ask.after is None else ask.after
        after = self.end - 1 - ask.limit if after >= self.end else after
        begin = max(first, after + 1)
        numbers = range(begin, min(self.end, begin + min(ANSWER, ask.limit)))
        found = [step(number) for number in numbers]
        event = TraceEvent(0, 5, 1005.5, "swap", {"generation": 1})
        events = [event] if ask.events_after < 0 and begin <= 6 <= begin + len(found) else []
        batches = [TracedBatch(number, self.requests) for number in numbers]
        return Steps(first, self.end, found, batches, events)


def lines_of(text: str) -> list[Any]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def ids(lines: list[Any]) -> list[Any]:
    """The ids of steps, and the kinds of events."""
    return [line["id"] if line["type"] == "step" else line["event"] for line in lines]


async def read(connect: Connect, query: str = "", end: int = 20) -> list[Any]:
    async with connect(Engine(end)) as client:
        response = await client.get(PATH + query)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    header, *lines = lines_of(response.text)
    assert header["type"] == "header"
    return ids(lines)


async def test_the_header(connect: Connect) -> None:
    async with connect(Engine()) as client:
        header = lines_of((await client.get(PATH)).text)[0]
    assert header["version"] == 1
    assert header["model"] == "tiny"
    assert header["server"].startswith("minisrv/")
    assert header["mode"] == "full-and-piecewise"
    assert (header["kv_blocks"], header["block_size"]) == (100, 16)
    assert header["ladders"].keys() == header["in_service"].keys() or not header["ladders"]
    assert header["kept"] == INFO.step_trace


async def test_a_step_has_its_requests_and_no_endless_digits(connect: Connect) -> None:
    async with connect(Engine()) as client:
        line = lines_of((await client.get(PATH + "?limit=1")).text)[-1]
    assert line["type"] == "step"
    assert line["requests"] == [["aa", 1], ["bb", 1], ["cc", 1]]
    assert line["host_ms"] == {"launch": 0.3333}
    assert line["padding"] == 1


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [*range(12, 20)]),
        ("?limit=2", [18, 19]),
        ("?limit=0", []),
        ("?limit=5", [*range(15, 20)]),
        ("?since=15", [16, 17, 18, 19]),
        ("?since=15&limit=2", [16, 17]),
        ("?since=19", []),
        ("?since=3", ["gap", *range(12, 20)]),
        ("?since=3&limit=1", ["gap", 12]),
        ("?since=999", [*range(12, 20)]),
        ("?follow=false&limit=1", [19]),
    ],
)
async def test_what_is_asked_for(connect: Connect, query: str, expected: list[Any]) -> None:
    assert await read(connect, query) == expected


async def test_an_event_stands_where_it_happened(connect: Connect) -> None:
    assert await read(connect, end=8) == [0, 1, 2, 3, 4, 5, "swap", 6, 7]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?since=-1", "since"),
        ("?since=1.5", "since"),
        ("?since=", "since"),
        ("?since=1" + 20 * "0", "since"),
        ("?limit=many", "limit"),
        ("?limit=1&limit=2", "limit"),
        ("?follow=yes", "follow"),
        ("?folow=true", "folow"),
    ],
)
async def test_what_cannot_be_asked_for(connect: Connect, query: str, param: str) -> None:
    async with connect(Engine()) as client:
        response = await client.get(PATH + query)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_no_trace(connect: Connect) -> None:
    engine = Engine()
    engine.info = msgspec.structs.replace(INFO, step_trace=0)
    async with connect(engine) as client:
        response = await client.get(PATH)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "step_trace_off"
    assert "--step-trace 0" in error["message"]
    assert not engine.asked


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.DRAINING, EngineState.DEAD])
async def test_an_engine_that_does_not_serve(connect: Connect, state: EngineState) -> None:
    engine = Engine()
    engine.state = state
    async with connect(engine) as client:
        assert (await client.get(PATH)).status_code == 503


async def test_a_key_is_needed_where_there_is_one(connect: Connect) -> None:
    async with connect(Engine(), settings=ServerConfig(api_keys=("key",))) as client:
        assert (await client.get(PATH)).status_code == 401
        headers = {"authorization": "Bearer key"}
        assert (await client.get(PATH, headers=headers)).status_code == 200


# ---- those who follow ------------------------------------------------------------------------


@asynccontextmanager
async def live(
    engine: Engine, tokenizer: Tokenizer, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(
        engine, tokenizer, served_model_names=("x",), generation=GenerationConfig(), **options
    )
    async with (
        serve(app) as (host, port),
        httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=GUARD_SECONDS) as client,
    ):
        yield client
    app.state.close()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_trace, "POLL_SECONDS", 0.01)


async def take(lines: AsyncIterator[str], number: int) -> list[Any]:
    return [json.loads(await anext(lines)) for _ in range(number)]


async def test_new_steps_come_until_the_server_drains(tokenizer: Tokenizer) -> None:
    engine = Engine()
    async with (
        live(engine, tokenizer) as client,
        client.stream("GET", PATH + "?follow=true&limit=2") as response,
    ):
        lines = response.aiter_lines()
        assert ids((await take(lines, 3))[1:]) == [18, 19]
        engine.end = 22
        assert ids(await take(lines, 2)) == [20, 21]
        engine.end = 40
        assert ids(await take(lines, 9)) == ["gap", *range(32, 40)]
        engine.state = EngineState.DRAINING
        (last,) = await take(lines, 1)
        assert (last["type"], last["event"]) == ("event", "end")
        assert "draining" in last["reason"]
        assert [line async for line in lines] == [], "the response is whole"


async def test_a_time_limit_ends_the_response_in_order(tokenizer: Tokenizer) -> None:
    settings = ServerConfig(request_timeout=1)
    async with live(Engine(), tokenizer, settings=settings) as client:
        text = (await client.get(PATH + "?follow=true&limit=0")).text
    assert ids(lines_of(text)[1:]) == ["end"]


async def test_who_is_gone_makes_room(tokenizer: Tokenizer) -> None:
    """As many may follow as the limit says; one more is refused until one of them has gone, and the
    engine is asked for nobody who has gone."""
    engine = Engine()
    async with live(engine, tokenizer) as client:
        streams = [client.stream("GET", PATH + "?follow=true") for _ in range(MAX_READERS)]
        for stream in streams:
            response = await stream.__aenter__()
            assert response.status_code == 200
        refused = await client.get(PATH)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_readers"
        assert int(refused.headers["retry-after"]) > 0
        await streams.pop().__aexit__(None, None, None)
        async with asyncio.timeout(GUARD_SECONDS):
            while (await client.get(PATH)).status_code != 200:
                await asyncio.sleep(0.01)
        for stream in streams:
            await stream.__aexit__(None, None, None)
        async with asyncio.timeout(GUARD_SECONDS):
            before = -1
            while len(engine.asked) != before:
                before = len(engine.asked)
                await asyncio.sleep(0.1)


async def test_the_engine_is_asked_no_more_for_who_does_not_read(tokenizer: Tokenizer) -> None:
    """The buffers between server and client fill, and then the questions stop."""
    engine = Engine()
    engine.requests = [("a" * 40, 1)] * 2000  # so that the buffers are full soon

    async def steps(ask: AskSteps) -> Steps:
        engine.end += KEPT
        return await Engine.steps(engine, ask)

    app = create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())
    engine.steps = steps  # type: ignore[method-assign]
    async with serve(app) as address:
        reader, writer = await asyncio.open_connection(*address, limit=1)
        writer.write(b"GET /debug/steps?follow=true HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(GUARD_SECONDS):
            before = -1
            while len(engine.asked) != before:
                before = len(engine.asked)
                await asyncio.sleep(0.3)
        assert before > 1
        writer.transport.abort()
        del reader
    app.state.close()

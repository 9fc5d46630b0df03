"""A client that goes away aborts its requests: queued, in prefill, in decode, streaming or not.

Requests that go on are the most common leak of such servers (vLLM's bugs 10087, 9428, 54947).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.request import EngineOutput, EngineRequest
from minisrv.server.app import create_app
from minisrv.server.disconnect import while_connected
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS, until

pytestmark = pytest.mark.anyio

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["hi", "ho"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": ["hi", "ho"]},
    "/invocations": {"prompt": ["hi", "ho"]},
}


def stuck_after(tokens: int) -> Callable[[EngineRequest], Iterable[Any]]:
    """A script that gives `tokens` tokens and then never goes on."""

    def script(request: EngineRequest) -> Iterable[Any]:
        for _ in range(tokens):
            yield EngineOutput(request_id=request.request_id, token_ids=[300])
        yield asyncio.Event()

    return script


async def send(address: tuple[str, int], route: str, **body: Any) -> asyncio.StreamWriter:
    content = json.dumps(ROUTES[route] | body).encode()
    _, writer = await asyncio.open_connection(*address)
    head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return writer


@pytest.mark.parametrize("stream", [{}, {"stream": True}])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens", [0, 3])
async def test_disconnect_aborts(
    tokenizer: Tokenizer, route: str, stream: dict[str, bool], tokens: int
) -> None:
    if route == "/v1/embeddings" and stream:
        return  # embeddings are not streamed
    engine = FakeEngine(stuck_after(tokens))
    app = create_app(engine, tokenizer, served_model_names=("tiny",), generation=GenerationConfig())
    expected = 2 if ["hi", "ho"] in ROUTES[route].values() else 1
    async with serve(app) as address:
        writer = await send(address, route, **stream)
        await until(lambda: len(engine.requests) == expected)
        await asyncio.sleep(0.05)
        assert engine.aborted == []
        writer.close()
        await until(lambda: len(engine.aborted) == expected)
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)


async def test_one_of_many_connections_goes_away(tokenizer: Tokenizer) -> None:
    """A client that goes away aborts its own request only."""
    engine = FakeEngine(stuck_after(1))
    app = create_app(engine, tokenizer, served_model_names=("tiny",), generation=GenerationConfig())
    async with serve(app) as address:
        writers = [
            await send(address, "/v1/chat/completions", stream=bool(i % 2)) for i in range(6)
        ]
        await until(lambda: len(engine.requests) == 6)
        writers[3].close()
        await until(lambda: len(engine.aborted) == 1)
        await asyncio.sleep(0.05)
        assert len(engine.aborted) == 1
        for writer in writers:
            writer.close()
        await until(lambda: len(engine.aborted) == 6)


async def test_the_status_line_waits_for_the_first_output(tokenizer: Tokenizer) -> None:
    """A stream sends nothing before its first output, so that an earlier error can still set the
    status."""
    go = asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Any]:
        yield go
        yield EngineOutput(request_id=request.request_id, token_ids=[300])
        yield asyncio.Event()

    engine = FakeEngine(script)
    app = create_app(engine, tokenizer, served_model_names=("tiny",), generation=GenerationConfig())
    async with serve(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        content = json.dumps(ROUTES["/v1/chat/completions"] | {"stream": True}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json"
        writer.write(f"{head}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        go.set()
        async with asyncio.timeout(GUARD_SECONDS):
            assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
            received = await reader.readuntil(b'"role":"assistant"')
            received += await reader.readuntil(b'"content":"')
            assert b"text/event-stream" in received
        writer.close()
        await until(lambda: len(engine.aborted) == 1)


async def test_what_ends_the_work_besides_its_client_is_not_hidden() -> None:
    """The task of a client that is gone goes on, unless something else has cancelled it too."""
    waits = asyncio.Event()

    async def receive() -> dict[str, str]:
        await waits.wait()
        return {"type": "http.disconnect"}

    async def respond() -> str:
        is_done = await while_connected(asyncio.sleep(60), receive)
        await asyncio.sleep(0)
        return "done" if is_done else "gone"

    first, second, third = (asyncio.create_task(respond()) for _ in range(3))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    waits.set()
    await asyncio.sleep(0)
    third.cancel()
    with pytest.raises(asyncio.CancelledError):
        await third
    assert await first == "gone"

"""Clients that close their sending side after a request get their answers; clients that are gone,
which look the same at first, are noticed nevertheless.

test_disconnect.py has clients that are gone from the beginning.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.request import EngineOutput, EngineRequest, FinishReason
from minisrv.server.app import create_app
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, sse
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS, until

pytestmark = pytest.mark.anyio


def halting(*halts: asyncio.Event | None) -> Callable[[EngineRequest], Iterable[Any]]:
    """A script of one token for each of the events, which it waits for before the token; None waits
    for nothing."""

    def script(request: EngineRequest) -> Iterable[Any]:
        for index, halt in enumerate(halts, 1):
            if halt is not None:
                yield halt
            yield EngineOutput(
                request_id=request.request_id,
                token_ids=[300],
                finish_reason=FinishReason.LENGTH if index == len(halts) else None,
            )

    return script


def request_of(version: str = "1.1", **fields: Any) -> bytes:
    content = json.dumps({"prompt": "hi", "return_token_ids": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


class _Received:
    """The part of a socket that http.client needs, with data that was received before."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def makefile(self, mode: str) -> io.BytesIO:
        return self._data


def token_ids(received: bytes) -> list[int]:
    """The token ids of the one answer in `received`, streamed or not."""
    response = http.client.HTTPResponse(_Received(received))  # type: ignore[arg-type]
    response.begin()
    assert response.status == 200
    text = response.read().decode()
    assert response.isclosed()
    if not text.startswith("data: "):
        return list(json.loads(text)["choices"][0]["token_ids"])
    return [i for event in sse(text) for i in event["choices"][0]["token_ids"]]


@pytest.fixture
def go() -> asyncio.Event:
    return asyncio.Event()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("halted", [0, 2])
async def test_the_whole_answer_comes(
    tokenizer: Tokenizer, go: asyncio.Event, version: str, stream: bool, halted: int
) -> None:
    """The answer is complete whether it had begun when the client closed its side or not, and
    nothing follows it."""
    halts = [None, None, None, None]
    halts[halted] = go
    engine = FakeEngine(halting(*halts))
    app = create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())
    async with serve(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request_of(version, stream=stream, max_tokens=4))
        received = b""
        async with asyncio.timeout(GUARD_SECONDS):
            if stream and halted:
                while received.count(b"data: ") < halted:
                    received += await reader.read(1 << 16)
            await until(lambda: bool(engine.requests))
            writer.write_eof()
            if version == "1.1" or not (stream and halted):
                # This byte comes after the server has seen the end of what the client sends.
                received += await reader.readexactly(1)
            else:  # a stream that has begun, and has no chunks, goes on with its next event only
                await asyncio.sleep(0.05)
            go.set()
            received += await reader.read()
        writer.close()
    assert token_ids(received) == [300] * 4
    assert received.count(b"HTTP/1.1 ") == 1
    assert engine.aborted == []


async def test_requests_that_wait_behind_it_are_answered(
    tokenizer: Tokenizer, go: asyncio.Event
) -> None:
    """Complete requests in the pipeline are answered; one whose body was not sent to its end is
    not."""
    engine = FakeEngine(halting(go, None))
    app = create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())
    async with serve(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        request = request_of(stream=False)
        writer.write(request * 2 + request[:-5])
        await until(lambda: bool(engine.requests))
        writer.write_eof()
        go.set()
        async with asyncio.timeout(GUARD_SECONDS):
            received = await reader.read()
        writer.close()
    _, *answers = received.split(b"HTTP/1.1 ")
    assert [token_ids(b"HTTP/1.1 " + answer) for answer in answers] == [[300, 300]] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_who_resets_it_later_is_noticed_at_once(
    tokenizer: Tokenizer, go: asyncio.Event, stream: bool
) -> None:
    """If the client resets the connection after it has closed its side, its request is aborted."""
    engine = FakeEngine(halting(None, go))
    app = create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())
    async with serve(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request_of(stream=stream))
        await until(lambda: bool(engine.requests))
        writer.write_eof()
        async with asyncio.timeout(GUARD_SECONDS):
            await reader.readexactly(1)
        assert engine.aborted == []
        client: socket.socket = writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await until(lambda: len(engine.aborted) == 1)


async def test_half_a_request_is_not_waited_for(tokenizer: Tokenizer, go: asyncio.Event) -> None:
    """If the client closes its side in the middle of a request, the server closes the
    connection."""
    engine = FakeEngine(halting(None))
    app = create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())
    async with serve(app) as address:
        for length in (0, 5, 60, -1):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(request_of()[:length])
            writer.write_eof()
            async with asyncio.timeout(GUARD_SECONDS):
                assert await reader.read() == b""
            writer.close()
    assert engine.requests == []

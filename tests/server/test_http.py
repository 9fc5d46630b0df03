"""Requests that the application never sees or that stall: endless heads, data that is no HTTP, and
slow clients."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.request import EngineOutput, EngineRequest
from minisrv.server import listening, middleware
from minisrv.server.app import create_app
from minisrv.server.http import MAX_HEAD_BYTES
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, outputs
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS, until

pytestmark = pytest.mark.anyio

COMPLETIONS = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def app_of(engine: FakeEngine, tokenizer: Tokenizer) -> Any:
    return create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())


async def answer(address: tuple[str, int], *sent: bytes) -> bytes:
    """Send the pieces one by one, and return all that comes until the server closes the
    connection."""
    reader, writer = await asyncio.open_connection(*address)
    for piece in sent:
        writer.write(piece)
        await writer.drain()
    async with asyncio.timeout(GUARD_SECONDS):
        received = await reader.read()
    writer.close()
    return received


BODY = b"content-length: 16\r\nconnection: close\r\n\r\n" + b'{"prompt": "hi"}'
CHUNKED = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n10\r\n" + b'{"prompt": "hi"}\r\n'


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([COMPLETIONS, b"a: " + b"x" * (MAX_HEAD_BYTES - 500) + b"\r\n", BODY], 200),
        ([COMPLETIONS, b"a: " + b"x" * MAX_HEAD_BYTES], 431),
        ([COMPLETIONS, b"a: b\r\n" * (MAX_HEAD_BYTES // 6)], 431),
        ([b"GET /", b"x" * MAX_HEAD_BYTES], 431),
        ([COMPLETIONS, CHUNKED, b"0\r\n\r\n"], 200),
        ([b"no HTTP\r\n\r\n"], 400),
    ],
)
async def test_heads(tokenizer: Tokenizer, sent: list[bytes], status: int) -> None:
    """Heads up to the limit are read, longer ones get 431, and what is no HTTP gets 400."""
    engine = FakeEngine(outputs([300]))
    async with serve(app_of(engine, tokenizer)) as address:
        head, _, body = (await answer(address, *sent)).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    if status != 200:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert engine.requests == []


@pytest.mark.parametrize("keep", [b"", b"connection: keep-alive\r\n"])
async def test_http_1_0_gets_no_chunks(tokenizer: Tokenizer, keep: bytes) -> None:
    """A client of HTTP/1.0 cannot read chunks: a stream ends with its connection. An answer whose
    length is known has it."""
    old = COMPLETIONS.replace(b"HTTP/1.1", b"HTTP/1.0") + keep
    async with serve(app_of(FakeEngine(outputs([300, 301])), tokenizer)) as address:
        for more in (b"", b', "stream": true'):
            content = b'{"prompt": "hi"' + more + b"}"
            sized = b"content-length: %d\r\n\r\n" % len(content) + content
            head, _, body = (await answer(address, old, sized)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"transfer-encoding" not in head
            assert b"\r\nconnection: close" in head
            assert (b"\r\ncontent-length: %d" % len(body) in head) == (not more)
            assert body.endswith(b"data: [DONE]\n\n" if more else b"}")
            assert body.count(b"data: ") == body.count(b"\n\n")


@pytest.mark.parametrize(
    ("head", "statuses"),
    [
        (COMPLETIONS, [b"100", b"200", b"200"]),
        (COMPLETIONS.replace(b"application/json", b"text/plain"), [b"415"]),
        (COMPLETIONS.replace(b"/v1/completions", b"/"), [b"405"]),
        (COMPLETIONS.replace(b"/v1/completions", b"/nothing"), [b"404"]),
        (COMPLETIONS.replace(b"host: x", b"host: x\r\nhost: y"), [b"400"]),
    ],
)
async def test_a_body_that_was_not_asked_for_may_be_left_out(
    tokenizer: Tokenizer, head: bytes, statuses: list[bytes]
) -> None:
    """A client that waits for 100 Continue and gets its final answer instead may send no body but
    another request, which must not be read as the body."""
    request = head + b"expect: 100-continue\r\n" + BODY.replace(b"connection: close\r\n", b"")
    async with serve(app_of(FakeEngine(outputs([300])), tokenizer)) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request[:-16])
        async with asyncio.timeout(GUARD_SECONDS):
            received = await reader.readuntil(b"\r\n\r\n")
            if received == b"HTTP/1.1 100 Continue\r\n\r\n":
                writer.write(request[-16:])
            writer.write(COMPLETIONS + BODY)
            received += await reader.read()
        writer.close()
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == statuses


@pytest.mark.parametrize("more", [b"0\r\n" + b"a: b\r\n" * 200_000, b"1;" + b"x" * (1 << 20)])
async def test_trailers_and_chunk_extensions_have_an_end(tokenizer: Tokenizer, more: bytes) -> None:
    """Trailers and chunk extensions that are too long get 431."""
    engine = FakeEngine(outputs([300]))
    async with serve(app_of(engine, tokenizer)) as address:
        # Bytes that are unread when the server closes the connection reset it.
        with suppress(ConnectionResetError):
            assert (await answer(address, COMPLETIONS, CHUNKED, more)).startswith(b"HTTP/1.1 431 ")
    assert engine.requests == []


async def test_a_body_may_be_longer_than_a_head(tokenizer: Tokenizer) -> None:
    """The limit of heads does not apply to bodies, nor to the sizes of their chunks, even of many
    small ones."""
    text = b'{"prompt": [' + b"1, " * 100_000 + b"1]}"
    pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    head = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    async with serve(app_of(FakeEngine(outputs([300])), tokenizer)) as address:
        received = await answer(address, COMPLETIONS, head, b"".join(chunks) + b"0\r\n\r\n")
    assert b"maximum context length" in received


async def test_a_client_that_never_reads_is_cut_off(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its connection, and the tokens that were generated for it, would stay in memory."""
    monkeypatch.setattr(listening, "STALLED_SECONDS", 1)

    def script(request: EngineRequest) -> Iterable[Any]:
        while True:
            yield EngineOutput(request_id=request.request_id, token_ids=[300] * 100)

    engine = FakeEngine(script)
    async with serve(app_of(engine, tokenizer)) as address:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address)
            body = b'{"prompt": "hi", "stream": true, "return_token_ids": true}'
            client.sendall(COMPLETIONS + b"content-length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: bool(engine.aborted))
    assert engine.admission.num_taken == 0


async def test_large_bodies_that_never_end_leave_room(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Incomplete large bodies leave room for small bodies at any time, and for large ones once
    their clients are gone. A body that has been parsed takes no room while its request runs."""
    monkeypatch.setattr(middleware, "MAX_UNREAD_BYTES", 500_000)
    go = asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Any]:
        yield go
        yield from outputs([300])(request)

    engine = FakeEngine(script)
    body = b'{"prompt": "hi"' + b" " * 400_000 + b"}"
    large = COMPLETIONS + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with serve(app_of(engine, tokenizer)) as address:
        running = [asyncio.create_task(answer(address, large))]
        await until(lambda: len(engine.requests) == 1)
        clients = [await asyncio.open_connection(*address) for _ in range(2)]
        for _, writer in clients:
            writer.write(large[:-50_000])
        parts = [asyncio.create_task(reader.read()) for reader, _ in clients]
        async with asyncio.timeout(GUARD_SECONDS):
            (refused,), _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        head, _, content = refused.result().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 2" in head
        error = json.loads(content)["error"]
        assert (error["type"], error["code"]) == ("service_unavailable", "too_many_bodies")
        running.append(asyncio.create_task(answer(address, COMPLETIONS, BODY)))
        await until(lambda: len(engine.requests) == 2)
        for _, writer in clients:
            writer.close()
        go.set()
        async with asyncio.timeout(GUARD_SECONDS):
            while not (await answer(address, large)).startswith(b"HTTP/1.1 200 "):
                pass  # the server may not have noticed so far that those clients are gone
        assert {(await answered)[:13] for answered in running} == {b"HTTP/1.1 200 "}

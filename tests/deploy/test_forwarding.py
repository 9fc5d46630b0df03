"""A request that is read in one place and answered in another gets the answer that it would have
got at once."""

from __future__ import annotations

import asyncio
import json
import pickle
from contextlib import aclosing
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from minisrv.deploy.forwarding import ReadRequest, answer, read
from minisrv.server.app import DEFAULT_MAX_BODY_BYTES


def scope(path: str = "/echo") -> Scope:
    return {
        **{"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""},
        **{"headers": [(b"host", b"x")], "client": ("1.2.3.4", 5), "server": ("x", 80)},
        **{"asgi": {"version": "3.0"}, "state": {"what": lambda: "cannot be pickled"}},
    }


def receiver(*pieces: bytes, gone: bool = False) -> Receive:
    left = list(pieces)

    async def receive() -> Message:
        if not left:
            assert gone, "it was asked for more than there is"
            return {"type": "http.disconnect"}
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": gone or bool(left)}

    return receive


def read_body(*pieces: bytes, gone: bool = False) -> ReadRequest | None:
    return asyncio.run(read(scope(), receiver(*pieces, gone=gone)))


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"prompt": "Once", "n": 2}, "Once"),
        ({"prompt": [[1, 2], [3]]}, "[[1, 2], [3]]"),
        ({"messages": [{"content": "Hi"}]}, "[{'content': 'Hi'}]"),
        ({"tokens": [1]}, ""),
        ([1], ""),
    ],
)
def test_the_prompt_is_found(body: Any, prompt: str):
    found = read_body(json.dumps(body).encode())
    assert found is not None
    assert found.prompt == prompt


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"1" * 100_000 + b"}"]
)
def test_a_body_that_cannot_be_read_is_passed_on(body: bytes):
    found = read_body(body[:3], body[3:])
    assert found is not None
    assert found.body == body


def test_of_a_body_that_is_too_large_only_enough_is_read():
    pieces = [b"x" * (1 << 20)] * 6
    found = read_body(*pieces)
    assert found is not None
    assert DEFAULT_MAX_BODY_BYTES < len(found.body) <= DEFAULT_MAX_BODY_BYTES + len(pieces[0])


def test_a_client_that_goes_away_has_sent_no_request():
    assert read_body(b"{", gone=True) is None


def echo() -> FastAPI:
    app = FastAPI()

    @app.post("/echo")
    async def _echo(request: Request) -> StreamingResponse:
        body = await request.body()

        async def pieces() -> Any:
            for byte in body:
                yield bytes([byte])

        return StreamingResponse(pieces(), headers={"x-client": str(request.client)})

    return app


def test_the_answer_is_that_of_the_application():
    async def run() -> list[Message]:
        request = await read(scope(), receiver(b"ab", b"c"))
        there = pickle.loads(pickle.dumps(request))
        return [message async for message in answer(echo(), there)]

    start, *parts = asyncio.run(run())
    assert start["status"] == 200
    assert (b"x-client", b"Address(host='1.2.3.4', port=5)") in start["headers"]
    assert [part["body"] for part in parts] == [b"a", b"b", b"c", b""]
    assert [part.get("more_body", False) for part in parts] == [True, True, True, False]


def test_an_answer_that_nobody_reads_any_more_is_cancelled():
    ended = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"{}"
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await receive()
        finally:
            ended.append("cancelled")

    async def run() -> None:
        async with aclosing(answer(endless, ReadRequest(scope(), b"{}", ""))) as messages:
            await anext(messages)

    asyncio.run(run())
    assert ended == ["cancelled"]


def test_an_error_of_the_application_is_raised():
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("broken")

    async def run() -> None:
        async for _ in answer(broken, ReadRequest(scope(), b"", "")):
            pass

    with pytest.raises(LookupError, match="broken"):
        asyncio.run(run())

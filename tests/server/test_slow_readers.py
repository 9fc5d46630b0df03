"""A stream has one event for each token, and a single event for all tokens that came while the
client did not read."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from minisrv.checkpoint import GenerationConfig
from minisrv.server.app import create_app
from minisrv.server.choices import coalesce
from minisrv.text.output_processor import CompletionDelta
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, outputs, sse
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS, until_still

pytestmark = pytest.mark.anyio

NUMBER = 20_000
IDS = [300 + index % 5 for index in range(NUMBER)]
BODY: dict[str, Any] = {
    "prompt": ["a", "b"],
    "max_tokens": 100,
    "stream": True,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
}
WHOLE = {"stream": False, "stream_options": None}


def choices(events: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """The choices with this index, in the order of their events."""
    found = [event["choices"][0] for event in events if event["choices"]]
    return [choice for choice in found if choice["index"] == index]


async def test_a_reader_that_keeps_up_gets_each_token_by_itself(
    connect: Callable[..., httpx.AsyncClient],
) -> None:
    async with connect(outputs(IDS[:200])) as client:
        events = sse((await client.post("/v1/completions", json=BODY)).text)
    for index in range(2):
        assert [choice["token_ids"] for choice in choices(events, index)] == [
            [token] for token in IDS[:200]
        ]


async def test_a_reader_that_does_not_gets_the_same_in_fewer_events(
    tokenizer: Tokenizer, connect: Callable[..., httpx.AsyncClient]
) -> None:
    """A client that reads late gets the same tokens, text and usage in fewer events."""
    script = outputs(IDS, cached=3)
    async with connect(script) as client:
        whole = (await client.post("/v1/completions", json=BODY | WHOLE)).json()
    engine = FakeEngine(script)
    app = create_app(engine, tokenizer, served_model_names=("x",), generation=GenerationConfig())
    async with serve(app) as address:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address)
            content = json.dumps(BODY).encode()
            head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
            connection.sendall(head + b"content-length: %d\r\n\r\n" % len(content) + content)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await until_still(lambda: engine.num_messages)
            async with asyncio.timeout(GUARD_SECONDS):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
                received = []
                while piece := await loop.sock_recv(connection, 1 << 20):
                    received.append(piece)
    lines = [line for line in b"".join(received).splitlines() if line.startswith(b"data: ")]
    *events, usage = sse("\n\n".join(line.decode() for line in (*lines, b"")))
    assert usage["usage"] == whole["usage"]
    for index in range(2):
        found = choices(events, index)
        assert len(found) < NUMBER
        assert [token for choice in found for token in choice["token_ids"]] == IDS
        assert "".join(choice["text"] for choice in found) == whole["choices"][index]["text"]
        assert [c["finish_reason"] for c in found if c["finish_reason"]] == ["length"]
        assert found[-1]["finish_reason"] == "length"


def test_deltas_of_a_choice_become_one() -> None:
    """Merged deltas keep the order of their choices, and add up their texts, tokens and counts."""
    first, other = CompletionDelta(0, "a", [1], None, 5), CompletionDelta(1, "x", [9], None)
    last = CompletionDelta(0, "b", [2], None, 0, "stop", {"FULL/pure_decode": 2})
    assert coalesce([first, other, last]) == [
        CompletionDelta(0, "ab", [1, 2], None, 5, "stop", {"FULL/pure_decode": 2}),
        CompletionDelta(1, "x", [9], None),
    ]

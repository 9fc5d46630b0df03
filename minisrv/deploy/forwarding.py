"""A request whose body has been read in one process, and that is answered in another one.

Knows: ASGI, and which fields of a body hold its prompt. Knows nothing of how the request travels,
or of what else is in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope

from minisrv.server.app import DEFAULT_MAX_BODY_BYTES

_SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server"),
)
"""The items of an ASGI scope that an application reads."""


class _Body(msgspec.Struct):
    """The fields of a request's body that hold its prompt."""

    prompt: Any = None
    messages: Any = None


@dataclass(frozen=True)
class ReadRequest:
    """A request whose body has been read.

    scope: its ASGI scope.
    body: its body; of one that is larger than a replica accepts, enough for the replica to see it.
    prompt: its prompt or its messages as text that begins alike for prompts that begin alike; empty
        if it has neither.
    """

    scope: Scope
    body: bytes
    prompt: str


async def read(scope: Scope, receive: Receive) -> ReadRequest | None:
    """Read a request; return None if its client has gone away meanwhile."""
    pieces: list[bytes] = []
    size, more = 0, True
    while more and size <= DEFAULT_MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        more = message.get("more_body", False)
    body = b"".join(pieces)
    try:
        fields = msgspec.json.decode(body, type=_Body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        fields = _Body()  # the replica says what is wrong with it
    kept = {name: scope[name] for name in _SCOPE if name in scope}
    prompt = fields.prompt or fields.messages or ""
    return ReadRequest(kept, body, prompt if isinstance(prompt, str) else str(prompt))


async def answer(app: ASGIApp, request: ReadRequest) -> AsyncGenerator[Message]:
    """Run a request in an ASGI application, and yield the messages of its response. If the
    iteration is ended early, the application is cancelled."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    body = [request.body]

    async def receive() -> Message:
        if not body:
            await asyncio.Future()  # a client that disconnects ends the iteration
        return {"type": "http.request", "body": body.pop(), "more_body": False}

    async def run() -> None:
        try:
            await app(request.scope, receive, sent.put)
        finally:
            sent.put_nowait(None)

    work = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

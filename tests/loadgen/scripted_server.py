"""A scripted OpenAI-compatible server for the load generator's tests; it computes nothing.

`ScriptedServer(script)` answers each POST by the steps `script(number, body)` returns: bytes are
written, `Status` answers instead of a stream, `Wait` waits for other requests, `Sleep` for a time,
`DROP` cuts the connection. It runs on a thread of its own, so that subprocesses can reach it too.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

DROP = "drop"
DONE = b"data: [DONE]\n\n"


@dataclass
class Status:
    code: int
    body: dict[str, Any]


@dataclass
class Wait:
    """A step that waits until `count` requests have reached it, or for ever if they never do.

    `reached` is set when `seen` requests have reached it, for the test's own thread.
    """

    count: int
    seen: int = 1
    waiting: int = 0
    event: asyncio.Event = field(default_factory=asyncio.Event)
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass
class Sleep:
    seconds: float


Step = bytes | Status | Wait | Sleep | str
Script = Callable[[int, dict[str, Any]], Sequence[Step]]


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None) -> bytes:
    return event({"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(completion: int, prompt: int = 4, cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"id": "x", "choices": [], "usage": counts})


def answer(tokens: int, per_chunk: int = 1) -> list[Step]:
    """Return the steps of a well-behaved stream of `tokens` tokens."""
    texts = ["t" * min(per_chunk, tokens - start) for start in range(0, tokens, per_chunk)]
    return [*(chunk(text) for text in texts), chunk("", "length"), usage(tokens), DONE]


def honest(number: int, body: dict[str, Any]) -> list[Step]:
    return answer(body["max_tokens"])


class ScriptedServer:
    def __init__(
        self, script: Script = honest, models: Sequence[str] = ("m",), port: int = 0
    ) -> None:
        self.script = script
        self.models = models
        self.port = port
        self.health = 200
        self.metrics = ""
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: set[str | None] = set()
        self.metrics_keys: set[str | None] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with self.served():
            self._started.set()
            await self._end.wait()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Serve on the running loop within this context."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._list)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=1024)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": m} for m in self.models]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _metrics(self, request: web.Request) -> web.Response:
        self.metrics_keys.add(request.headers.get("Authorization"))
        return web.Response(text=self.metrics)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.keys.add(request.headers.get("Authorization"))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        for step in self.script(len(self.bodies) - 1, body):
            if isinstance(step, Status):
                return web.json_response(step.body, status=step.code)
            if isinstance(step, Wait):
                step.waiting += 1
                if step.waiting >= step.seen:
                    step.reached.set()
                if step.waiting >= step.count:
                    step.event.set()
                await step.event.wait()
                continue
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                continue
            if not response.prepared:
                await response.prepare(request)
            if isinstance(step, bytes):
                await response.write(step)
            else:
                assert step == DROP
                assert request.transport is not None
                request.transport.abort()
                return response
        await response.write_eof()
        return response

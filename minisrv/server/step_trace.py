"""GET /debug/steps: the recorded steps as lines of JSON (docs/trace.md), at once or as they come.

Nothing is asked of the engine while a client does not read what it was sent: a reader that is too
slow is told which steps it has missed, and nobody's memory grows.

Knows: ASGI, and the order of the lines. Knows nothing of how steps are recorded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv import __version__
from minisrv.engine.client import EngineClient
from minisrv.engine.messages import EngineInfo
from minisrv.engine.trace_format import (
    VERSION,
    AskSteps,
    Startup,
    Steps,
    TracedStep,
    TraceHeader,
)
from minisrv.errors import MinisrvError, TraceFullError, TraceOffError
from minisrv.server.disconnect import while_connected

CONTENT_TYPE = "application/x-ndjson"

MAX_READERS = 16
"""Maximum number of clients that read the trace from one API worker at the same time."""

POLL_SECONDS = 0.25
"""Number of seconds between two questions to the engine on behalf of a client that has read all
there is."""

_HEADERS = [
    (b"content-type", CONTENT_TYPE.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_encode_lines = msgspec.json.Encoder().encode_lines

Line = TraceHeader | TracedStep | dict[str, Any]


@dataclass(frozen=True)
class TraceQuery:
    """What a client asks for.

    since: the id of the last step that it has; None if it has none.
    limit: how many steps it wants; None for all that are kept. Without `since` they are the last
        ones. A client that follows gets those that come later too.
    follow: whether the response goes on with new steps as they come.
    """

    since: int | None = None
    limit: int | None = None
    follow: bool = False


class TraceReaders:
    """The clients that read the trace from one API worker.

    client: the connection to the engine.
    model: the first name of the model that is served.
    seconds: the time that a response may take; None sets no limit.
    """

    def __init__(self, client: EngineClient, model: str, seconds: float | None) -> None:
        self.client = client
        self.model = model
        self.seconds = seconds
        self._number = 0

    def info(self) -> EngineInfo:
        """Return the description of the engine. Raises TraceOffError if it keeps no steps, and what
        `EngineClient.check_serving` raises."""
        self.client.check_serving()
        info = self.client.info
        assert info is not None, "an engine that serves has described itself"
        if not info.step_trace:
            raise TraceOffError(
                "This server keeps no trace of its steps: it was started with --step-trace 0; "
                "start it without that flag."
            )
        return info

    @contextmanager
    def place(self) -> Iterator[None]:
        """Count one more reader for the block. Raises TraceFullError."""
        if self._number == MAX_READERS:
            raise TraceFullError(
                f"{MAX_READERS} clients read the trace already, the most that this server allows; "
                "end one of them, or try again later."
            )
        self._number += 1
        try:
            yield
        finally:
            self._number -= 1


class TraceResponse(Response):
    """Streams the trace to one client."""

    def __init__(self, readers: TraceReaders, query: TraceQuery) -> None:
        super().__init__()
        self._readers = readers
        self._query = query

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._readers.place():
            await while_connected(self._answer(send), receive)

    async def _answer(self, send: Send) -> None:
        readers = self._readers
        header = header_of(readers.info(), readers.model)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await _send_lines(send, [header])
        last: list[Line] = []
        try:
            async with asyncio.timeout(readers.seconds):
                async for lines in _lines(readers.client, self._query):
                    await _send_lines(send, lines)
        except TimeoutError:
            last = [_end(f"a response takes at most {readers.seconds:g} s here; ask again.")]
        except MinisrvError as error:
            last = [_end(error.message)]
        await _send_lines(send, last, more=False)


async def _lines(client: EngineClient, query: TraceQuery) -> AsyncIterator[list[Line]]:
    """Yield the lines behind the header. Raises what `EngineClient.steps` raises."""
    after, events_after, target = query.since, -1, None
    limit = _ALL if query.limit is None else query.limit
    while True:
        answer = await client.steps(AskSteps(after, events_after, limit))
        if answer is None:
            continue
        if target is None:
            target = answer.end  # steps that come later are for those who follow
        if after is not None and after >= answer.end:
            after = None  # the id is of an earlier start of the server
        lines = list(_merged(answer))
        if after is not None and after + 1 < answer.first:
            lines.insert(0, _gap(after + 1, answer.first - 1))
        if answer.events:
            events_after = answer.events[-1].number
        after = answer.steps[-1].id if answer.steps else answer.end - 1
        limit = _ALL if query.follow else limit - len(answer.steps)
        if lines:
            yield lines
        if not query.follow and (limit == 0 or after + 1 >= target):
            return
        if after + 1 >= answer.end:
            await asyncio.sleep(POLL_SECONDS)


_ALL = 1 << 31


def _merged(answer: Steps) -> Iterator[Line]:
    """Yield the steps of an answer, each with its requests, and the events where they happened."""
    requests = {batch.id: batch.requests for batch in answer.batches}
    events = list(answer.events)
    for step in answer.steps:
        while events and events[0].after < step.id:
            yield events.pop(0).line()
        step.requests = requests[step.batch]
        step.host_ms = {part: round(ms, 4) for part, ms in step.host_ms.items()}
        step.measured_ms, step.wall_ms = round(step.measured_ms, 4), round(step.wall_ms, 4)
        yield step
    for event in events:
        yield event.line()


def header_of(info: EngineInfo, model: str) -> TraceHeader:
    """Return the header of a trace of the engine as it is now."""
    compilation, ladder = info.compilation, info.ladder
    return TraceHeader(
        version=VERSION,
        server=f"minisrv/{__version__}",
        model=model,
        time=time.time(),
        device=info.device,
        device_name=info.device_name,
        mode=info.cudagraph_mode,
        compilation={
            "state": compilation.state.value,
            "generation": compilation.generation,
            "reason": compilation.reason,
        },
        ladders=info.ladders,
        in_service=ladder.sizes,
        graphs={"captured": ladder.graphs, "total": ladder.total},
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        block_size=info.block_size,
        kv_blocks=info.num_kv_blocks,
        async_scheduling=info.async_scheduling,
        itl_target_ms=info.itl_target_ms or None,
        simulated_launch_us=info.simulated_launch_us,
        startup=[Startup(part, seconds) for part, seconds in info.startup_seconds.items()],
        kept=info.step_trace,
    )


def _event(event: str, **details: Any) -> dict[str, Any]:
    return {"type": "event", "time": time.time(), "event": event, **details}


def _gap(first: int, last: int) -> dict[str, Any]:
    return _event("gap", **{"from": first, "to": last})


def _end(reason: str) -> dict[str, Any]:
    return _event("end", reason=reason)


async def _send_lines(send: Send, lines: list[Any], *, more: bool = True) -> None:
    body = _encode_lines(lines)
    await send({"type": "http.response.body", "body": body, "more_body": more})

"""The HTTP response of a generation: runs it, streamed or not, as long as the client is connected.

Everything that can take long (tokenising, queueing, prefill, decode) happens inside the response
and races the client's disconnect, which cancels it and so aborts it in the engine. The status line
is sent only after the first output of every choice, so that a refused request never gets a 200.

Knows: ASGI. The meaning of a request is the matter of `serving`, and the shape of a body that of
`response_builders`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.errors import DeadlineError, MinisrvError
from minisrv.server import sse
from minisrv.server.auth import owner
from minisrv.server.choices import Generation, coalesce
from minisrv.server.disconnect import while_connected
from minisrv.server.errors import JSON, error_status
from minisrv.server.middleware import CLIENT_CLOSED_REQUEST
from minisrv.server.offload import offload
from minisrv.server.request_schemas import ChatCompletionRequest, CompletionRequest
from minisrv.server.response_builders import ResponseBuilder
from minisrv.server.serving import Serving
from minisrv.text.output_processor import CompletionDelta


class AbortableResponse(Response, ABC):
    """A response that is worked on as long as the client is connected, and within its time."""

    def __init__(self, serving: Serving) -> None:
        super().__init__()
        self._serving = serving
        self._arrival = time.perf_counter()
        self._log_fields: dict[str, Any] = {}
        """Fields of this request's line in the access log."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not await while_connected(self._answer(scope, receive, send), receive):
                self._serving.metrics.failed(CLIENT_CLOSED_REQUEST)
                self._log_fields["status"] = CLIENT_CLOSED_REQUEST
        finally:
            self._log_fields |= self._described()
            scope["log_fields"] = self._log_fields

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do the work and send the response."""

    @abstractmethod
    def _described(self) -> dict[str, Any]:
        """Return what the access log says of the response."""

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Raise DeadlineError when the request's time is over."""
        seconds = self._serving.request_timeout
        left = None if seconds is None else seconds - (time.perf_counter() - self._arrival)
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError as error:
            raise DeadlineError(
                f"The request has not ended within {seconds:g} s, which is what this server gives; "
                "ask for less, or try again when it is less busy."
            ) from error


class GenerationResponse(AbortableResponse):
    """Answers `request` with a body made by `builder`."""

    def __init__(
        self,
        serving: Serving,
        request: CompletionRequest | ChatCompletionRequest,
        builder: ResponseBuilder,
    ) -> None:
        super().__init__(serving)
        self._request = request
        self._builder = builder

    def _described(self) -> dict[str, Any]:
        return self._builder.log_fields(self._arrival)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, builder = self._request, self._builder
        with self._serving.places(request, builder.id, scope["key"]):
            async with self._in_time():
                prepared = await self._serving.prepare(request, owner(scope))
            choices = self._serving.choices(
                request, prepared, builder.id, scope["key"], self._arrival
            )
            generation = Generation(choices)
            builder.begin(prepared)
            if request.stream:
                await self._stream(generation, send)
                return
            batches = self._serving.client.generate(generation.requests)
            async with self._in_time(), aclosing(batches):
                async for outputs in batches:
                    for delta in generation.read(outputs):
                        builder.add(delta)
                    if generation.has_ended:
                        break
            generation.check_ended()
        whole = await offload(lambda: JSON(builder.response()), builder.size)
        await whole(scope, receive, send)

    async def _stream(self, generation: Generation, send: Send) -> None:
        builder, client = self._builder, self._serving.client
        silent = set(range(len(generation.requests)))
        early = b""  # events of choices that came before another choice's first output
        started = behind = False
        try:
            batches = client.generate(generation.requests)
            async with self._in_time(), aclosing(batches):
                async for outputs in batches:
                    deltas = generation.read(outputs)
                    # Each token gets an event, but tokens that came while a send waited for the
                    # client share one.
                    reported = coalesce(deltas) if behind else deltas
                    if started and not generation.has_ended:
                        events = b"".join(map(builder.events, reported))
                    else:
                        events = await self._outer_events(reported)
                    if not started:
                        silent.difference_update([delta.index for delta in deltas])
                        early += events
                        if silent:
                            continue
                        started, events = True, early
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": sse.HEADERS}
                        )
                    if events:
                        before = client.num_messages
                        await send(
                            {"type": "http.response.body", "body": events, "more_body": True}
                        )
                        behind = client.num_messages != before
                    if generation.has_ended:
                        break
            generation.check_ended()
            last = await offload(builder.last_events, builder.size_of_end)
        except Exception as error:
            if not started:
                raise
            self._serving.metrics.failed(error_status(error))
            self._log_fields["error"] = (
                error.code or error.type if isinstance(error, MinisrvError) else MinisrvError.type
            )
            failed = error  # which the name means within this clause only
            last = await offload(lambda: builder.error_events(failed), builder.size_of_end)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _outer_events(self, deltas: list[CompletionDelta]) -> bytes:
        """Return the events of the first deltas, or of the last; they may hold the echoed prompt
        with its log-probabilities, or the whole answer, so that large ones are made in a thread."""
        builder = self._builder
        return await offload(lambda: b"".join(map(builder.events, deltas)), builder.size_of(deltas))

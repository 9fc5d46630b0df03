"""The API worker's side of the engine: asynchronous generators of outputs.

Knows: the socket, the engine's state, and which of its own requests are open. Every open request
ends in exactly one finish reason or error, also when the engine dies: its process id is watched, so
that its death is seen at once and not by a timeout. Knows nothing of HTTP or text, and imports no
torch.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
from collections.abc import AsyncGenerator, Callable

import zmq
import zmq.asyncio

from minisrv.engine.admission import Admission
from minisrv.engine.messages import (
    EngineInfo,
    EngineStats,
    Failed,
    Loading,
    Ready,
    StepOutputs,
    Submit,
    decode_engine_message,
    encode,
)
from minisrv.errors import (
    EngineDeadError,
    EngineNotReadyError,
    MinisrvError,
    RequestError,
)
from minisrv.request import EngineOutput, EngineRequest, RequestFailure

logger = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    """Whether requests can be served, and if not, why not."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class EngineClient:
    """A connection to an engine. Its methods belong to one event loop."""

    def __init__(self, address: str, engine_pid: int) -> None:
        self.admission = Admission()
        self._address = address
        self._engine_pid = engine_pid
        self._state = EngineState.LOADING
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._loading = Loading("starting")
        self._death = EngineDeadError("the engine has ended unexpectedly; see its log.")
        self._open: dict[str, asyncio.Queue[EngineOutput | MinisrvError]] = {}
        self._requests: list[EngineRequest] = []
        self._aborts: list[str] = []
        self._settled = asyncio.Event()

    @property
    def state(self) -> EngineState:
        """The engine's state as this worker knows it."""
        return self._state

    @property
    def info(self) -> EngineInfo | None:
        """What the engine serves with; None until it is ready."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The counters as of the last message."""
        return self._stats

    @property
    def loading(self) -> Loading:
        """How far the engine's start-up is."""
        return self._loading

    @property
    def death(self) -> EngineDeadError:
        """Why the engine is dead, once it is."""
        return self._death

    async def start(
        self, on_loading: Callable[[str, int, int], None] = lambda phase, done, total: None
    ) -> None:
        """Connect, and watch the engine. Call it once, in the loop that uses the client.

        on_loading: told the start-up's phase, how much of it is done, and of how much.
        """
        self._on_loading = on_loading
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.connect(self._address)
        await self._socket.send(encode(Submit()))
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(self._on_reader_end)
        # A process file descriptor becomes readable when the process ends, whoever its parent is.
        self._pidfd = os.pidfd_open(self._engine_pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    async def settled(self) -> None:
        """Wait until the engine is ready or dead."""
        await self._settled.wait()

    def drain(self) -> None:
        """Refuse new requests from now on; open ones go on."""
        if self._state is not EngineState.DEAD:
            self._state = EngineState.DRAINING

    def end_open(self) -> None:
        """End every open request with an error: the time to finish is over."""
        self._end_all(EngineNotReadyError("the server is shutting down."))

    async def close(self) -> None:
        """Stop watching and disconnect; what is still open ends with an error."""
        self._unwatch()
        self._reader.cancel()
        self.end_open()
        self._socket.close(linger=0)
        self._context.term()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput]:
        """Submit a request and yield its outputs; the last one carries the finish reason.

        Ending the iteration early aborts the request in the engine.
        Raises EngineNotReadyError, EngineDeadError; RequestError (or a branch of it) if the engine
        refuses the request.
        """
        if self._state is EngineState.DEAD:
            raise self._death
        if self._state is not EngineState.READY:
            raise EngineNotReadyError(f"the server is {self._state}; try again later.")
        queue: asyncio.Queue[EngineOutput | MinisrvError] = asyncio.Queue()
        self._open[request.request_id] = queue
        self._requests.append(request)
        self._flush_soon()
        try:
            while True:
                output = await queue.get()
                if isinstance(output, MinisrvError):
                    raise output
                if output.error is not None:
                    raise _as_exception(output.error)
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self.abort(request.request_id)
            self._open.pop(request.request_id, None)
            self.admission.leave(request.request_id)

    def abort(self, request_id: str) -> None:
        """Ask the engine to drop a request; nothing happens if it has ended. Its iteration ends
        with the engine's answer."""
        if request_id in self._open:
            self._aborts.append(request_id)
            self._flush_soon()

    def _flush_soon(self) -> None:
        # One message for all that this turn of the event loop brings.
        if len(self._requests) + len(self._aborts) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._state is not EngineState.DEAD:
            message = encode(Submit(self._requests, self._aborts))
            self._socket.send(message, zmq.NOBLOCK)
        self._requests, self._aborts = [], []

    async def _read(self) -> None:
        while True:
            match decode_engine_message(await self._socket.recv()):
                case StepOutputs(outputs, stats):
                    self._stats = stats
                    for output in outputs:
                        self._dispatch(output)
                case Loading() as loading:
                    self._loading = loading
                    self._on_loading(loading.phase, loading.done, loading.total)
                case Ready(info):
                    self._info = info
                    if self._state is EngineState.LOADING:  # and not draining already
                        self._state = EngineState.READY
                    self._settled.set()
                case Failed(failure):
                    self._death = EngineDeadError(failure.message)

    def _dispatch(self, output: EngineOutput) -> None:
        queue = self._open.get(output.request_id)
        if queue is None:
            return  # aborted here, and the engine did not know yet
        if output.finish_reason is not None or output.error is not None:
            del self._open[output.request_id]
            self.admission.leave(output.request_id)
        queue.put_nowait(output)

    def _on_reader_end(self, reader: asyncio.Task[None]) -> None:
        # Whatever ends the reader but `close`: nobody would hear of the engine any more.
        if not reader.cancelled():
            logger.error("cannot read from the engine", exc_info=reader.exception())
            self._death = EngineDeadError("the engine's answers cannot be read; see the log.")
            self._die()

    def _on_exit(self) -> None:
        self._unwatch()
        # The last words may still be in the socket; they are read before this runs.
        asyncio.get_running_loop().call_later(0.05, self._die)

    def _die(self) -> None:
        if self._state is not EngineState.LOADING:  # else it is the caller's to say
            logger.error("every request is refused from now on: %s", self._death.message)
        self._state = EngineState.DEAD
        self._end_all(self._death)
        self._settled.set()

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _end_all(self, error: MinisrvError) -> None:
        for queue in self._open.values():
            queue.put_nowait(error)
        self._open.clear()


def _as_exception(failure: RequestFailure) -> MinisrvError:
    """The error of the tree that the engine sent."""
    kind: type[MinisrvError] = RequestError
    for branch in _branches(MinisrvError):
        if (branch.http_status, branch.code) == (failure.status, failure.code):
            kind = branch
    error = kind(failure.message)
    error.param = failure.param
    return error


def _branches(kind: type[MinisrvError]) -> list[type[MinisrvError]]:
    return [kind, *(leaf for branch in kind.__subclasses__() for leaf in _branches(branch))]

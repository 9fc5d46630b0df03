"""The API worker's side of the engine: asynchronous generators of outputs.

Knows: the socket, the engine's state, and which of its own requests are open. Every open request
ends with exactly one finish reason or error, even when the engine dies: the end of its process is
watched, so that it is noticed at once and not by a timeout. Knows nothing of HTTP or text, and
imports no torch.

A step's outputs come in one message, which wakes each response that they are for once. Every token
takes this path, so nothing on it logs, waits or makes a task.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

import zmq

from minisrv.engine.admission import Admission
from minisrv.engine.messages import (
    AskStats,
    Command,
    CommandDone,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Failed,
    Hello,
    Loading,
    Ready,
    SleepReport,
    StepOutputs,
    Submit,
    WorkerMessage,
    decode_engine_message,
    encode,
)
from minisrv.engine.trace_format import AskSteps, Steps
from minisrv.errors import (
    EngineDeadError,
    EngineNotReadyError,
    MinisrvError,
    QueueFullError,
    shutting_down_error,
)
from minisrv.request import EngineOutput, EngineRequest, RequestFailure

logger = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    """Whether requests can be served, and if not, why not."""

    LOADING = "loading"
    READY = "ready"
    ASLEEP = "asleep"
    DRAINING = "draining"
    DEAD = "dead"

    @property
    def is_served(self) -> bool:
        """Whether requests go to the engine, which decides about each. Only the engine knows for
        sure whether it sleeps."""
        return self in (EngineState.READY, EngineState.ASLEEP)


LAST_WORDS_SECONDS = 0.2
"""Number of seconds for reading messages that the engine sent before it ended. On a busy machine
they come later than the news of its end."""

STATS_SECONDS = 1.0
"""Number of seconds to wait for the engine's counters or steps; a step may take longer."""


class _Mailbox:
    """The outputs for the requests of one response that have not been read."""

    __slots__ = ("error", "outputs", "waiter")

    def __init__(self) -> None:
        self.outputs: list[EngineOutput] = []
        self.error: MinisrvError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the reader if it waits."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class EngineClient:
    """A connection to an engine. Its methods must be called from one event loop.

    address: the address of the engine's socket.
    engine_pid: the process id of the engine.
    name: the name of this worker; a worker that replaces a dead one has the same name.
    exit_report_seconds: the number of seconds to wait for the engine's parent to say how the engine
        ended (`engine_ended`); the kernel tells this to nobody else.
    """

    def __init__(
        self,
        address: str,
        engine_pid: int,
        name: str,
        exit_report_seconds: float = LAST_WORDS_SECONDS,
    ) -> None:
        self.admission = Admission()
        self._address = address
        self._engine_pid = engine_pid
        self._name = name
        self._state = EngineState.LOADING
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._stats_asked: deque[asyncio.Future[None]] = deque()
        self._steps_asked: deque[asyncio.Future[Steps | None]] = deque()
        self._commands: deque[asyncio.Future[SleepReport]] = deque()
        self._loading = Loading("starting")
        self._exit_report_seconds = exit_report_seconds
        self._death_timer: asyncio.TimerHandle | None = None
        self._known_cause = ""
        """Why the engine is dead, if it is known before the parent says how it ended."""
        self._exit_description = ""
        self._open: dict[str, _Mailbox] = {}
        self._requests: list[EngineRequest] = []
        self._aborts: list[str] = []
        self._flushing = False
        self._num_messages = 0
        self._settled = asyncio.Event()

    @property
    def state(self) -> EngineState:
        """The state of the engine as far as this worker knows."""
        return self._state

    @property
    def info(self) -> EngineInfo | None:
        """The settings that the engine serves with; None until it is ready."""
        return self._info

    @property
    def num_messages(self) -> int:
        """Number of messages read so far. A change shows that the event loop has advanced."""
        return self._num_messages

    @property
    def loading(self) -> Loading:
        """The progress of the engine's start-up."""
        return self._loading

    @property
    def death(self) -> EngineDeadError:
        """The reason why the engine is dead, once it is. It is a new exception each time: one that
        is raised again keeps the frames of all who have raised it, and with them their requests."""
        how = self._exit_description
        ended = f"the engine has ended unexpectedly{how}; see its log, and restart the server."
        return EngineDeadError(self._known_cause or ended)

    async def start(
        self, on_loading: Callable[[str, int, int], None] = lambda phase, done, total: None
    ) -> None:
        """Connect, and watch the engine. Call it once, in the loop that uses the client.

        on_loading: is called with the phase of the start-up, how much of it is done, and the total.
        """
        self._on_loading = on_loading
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.set(zmq.ROUTING_ID, self._name.encode())
        self._socket.connect(self._address)
        self._loop.add_reader(self._socket.FD, self._read)
        # A process file descriptor becomes readable when the process ends, whoever its parent is.
        try:
            self._pidfd = os.pidfd_open(self._engine_pid)
            self._loop.add_reader(self._pidfd, self._on_exit)
        except ProcessLookupError:  # it has ended already
            self._pidfd = -1
            self._die_in(self._exit_report_seconds)
        self._send(Hello())

    async def settled(self) -> None:
        """Wait until the engine is ready or dead."""
        await self._settled.wait()

    def engine_ended(self, exit_description: str) -> None:
        """Register that the engine's parent has seen it end.

        exit_description: how it ended, in words that can follow "the engine has ended unexpectedly"
            and a comma.
        """
        self._exit_description = f", {exit_description}"
        self._unwatch()
        self._die_in(LAST_WORDS_SECONDS)

    def drain(self) -> None:
        """Refuse new requests from now on; open ones continue."""
        if self._state is not EngineState.DEAD:
            self._state = EngineState.DRAINING

    def end_open(self) -> None:
        """End every open request with an error, because the time to finish is over."""
        self._end_all(shutting_down_error())

    async def stats(self) -> EngineStats:
        """Return the engine's current counters. If it is loading, dead or in the middle of a long
        step, return its last known ones."""
        if self._info is not None and self._state is not EngineState.DEAD:
            answer = self._loop.create_future()
            self._stats_asked.append(answer)  # answers come in the order of the questions
            self._send(AskStats())
            await asyncio.wait((answer,), timeout=STATS_SECONDS)
        return self._stats

    async def steps(self, ask: AskSteps) -> Steps | None:
        """Return recorded steps; None if the engine is in the middle of a long step, in which case
        the question may be asked again, or has died.

        Raises EngineNotReadyError, EngineDeadError.
        """
        self.check_serving()
        answer = self._loop.create_future()
        self._steps_asked.append(answer)  # answers come in the order of the questions
        self._send(ask)
        await asyncio.wait((answer,), timeout=STATS_SECONDS)
        return answer.result() if answer.done() else None

    async def command(self, command: Command) -> SleepReport:
        """Have the engine carry out a command, wait until it has, and return how the engine slept
        then; the next command may have changed it by now.

        Raises EngineNotReadyError, EngineDeadError, and what keeps the engine from it.
        """
        self.check_serving()
        done = self._loop.create_future()
        self._commands.append(done)  # answers come in the order of the commands
        self._send(command)
        return await asyncio.shield(done)  # the engine answers also if nobody waits

    def check_serving(self) -> None:
        """Raise EngineNotReadyError while the engine loads or drains, EngineDeadError if it is
        dead."""
        if self._state is EngineState.DEAD:
            raise self.death
        if not self._state.is_served:
            raise EngineNotReadyError(f"the server is {self._state}; try again later.")

    async def close(self) -> None:
        """Stop watching the engine and disconnect; requests that are still open end with an
        error."""
        self._unwatch()
        self._loop.remove_reader(self._socket.FD)
        self.end_open()
        self._socket.close(linger=0)
        self._context.term()

    async def generate(
        self, requests: Sequence[EngineRequest]
    ) -> AsyncGenerator[list[EngineOutput]]:
        """Submit requests and yield their outputs since the last time; the last output of each
        request carries its finish reason.

        If the iteration is ended early, the requests that have not ended are aborted in the engine.

        Raises EngineNotReadyError, EngineDeadError; RequestError (or a subclass) if the engine
        refuses one of the requests.
        """
        self.check_serving()
        box = _Mailbox()
        running = len(requests)
        for request in requests:
            self._open[request.request_id] = box
        self._requests += requests
        self._flush_soon()
        try:
            while running:
                if not box.outputs:
                    if box.error is not None:
                        raise box.error
                    box.waiter = self._loop.create_future()
                    await box.waiter
                outputs, box.outputs = box.outputs, []
                for output in outputs:
                    if output.error is not None:
                        raise self._as_exception(output.error)
                    running -= output.finish_reason is not None
                if outputs:
                    yield outputs
        finally:
            for request in requests:
                self.abort(request.request_id)
                self._open.pop(request.request_id, None)
                self.admission.leave(request.request_id)

    def abort(self, request_id: str) -> None:
        """Ask the engine to abort a request; nothing happens if it has ended. The engine answers
        with the request's last output."""
        if request_id in self._open:
            self._aborts.append(request_id)
            self._flush_soon()

    def _flush_soon(self) -> None:
        # One message carries everything that is submitted in one turn of the event loop.
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._state is not EngineState.DEAD:
            self._send(Submit.of(self._requests, self._aborts))
        self._requests, self._aborts = [], []

    def _send(self, message: WorkerMessage) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)
        # The socket's file descriptor signals only changes of state, and sending may consume one.
        self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._socket.closed:
            return
        try:
            while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                self._handle_message(decode_engine_message(self._socket.recv(zmq.NOBLOCK)))
        except Exception:
            # Otherwise nobody would hear from the engine any more.
            self._loop.remove_reader(self._socket.FD)
            logger.exception("cannot read from the engine")
            self._known_cause = "the engine's answers cannot be read; see the log."
            self._die()

    def _handle_message(self, message: EngineMessage) -> None:
        self._num_messages += 1
        match message:
            case StepOutputs(outputs):
                for output in outputs:
                    self._deliver(output)
            case EngineStats():
                self._stats = message
                if self._stats_asked:  # otherwise the wait of those who asked has timed out
                    self._stats_asked.popleft().set_result(None)
            case Steps():
                if self._steps_asked:  # otherwise a shutdown has ended the wait
                    self._steps_asked.popleft().set_result(message)
            case Loading():
                self._loading = message
                self._on_loading(message.phase, message.done, message.total)
            case Ready(info):
                self._info = info
                if self._state is EngineState.LOADING or self._state.is_served:  # and not draining
                    refuses = info.sleep.refuses_requests
                    self._state = EngineState.ASLEEP if refuses else EngineState.READY
                self._settled.set()
            case CommandDone(failure):
                done = self._commands.popleft() if self._commands else None
                if done is None or done.done():
                    pass  # a worker that has died asked, or a shutdown has ended the wait
                elif failure is None:
                    assert self._info is not None, "a command goes to an engine that is ready"
                    done.set_result(self._info.sleep)
                else:
                    done.set_exception(failure.as_exception())
            case Failed(failure):
                self._known_cause = failure.message

    def _deliver(self, output: EngineOutput) -> None:
        box = self._open.get(output.request_id)
        if box is None:
            return  # aborted here before the engine knew
        if output.finish_reason is not None or output.error is not None:
            del self._open[output.request_id]
            self.admission.leave(output.request_id)
        box.outputs.append(output)
        box.wake()

    def _on_exit(self) -> None:
        self._unwatch()
        self._die_in(self._exit_report_seconds)

    def _die_in(self, seconds: float) -> None:
        """Declare the engine dead after so many seconds, in which messages on their way can still
        be read."""
        if self._death_timer is not None:
            self._death_timer.cancel()
        self._death_timer = self._loop.call_later(seconds, self._die)

    def _die(self) -> None:
        if self._state is EngineState.DEAD:
            return
        if self._state is not EngineState.LOADING:  # while loading, the caller reports it
            logger.error("every request is refused from now on: %s", self.death.message)
        self._state = EngineState.DEAD
        self._end_all(self.death)
        self._settled.set()

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _end_all(self, error: MinisrvError) -> None:
        for box in self._open.values():
            box.error = error
            box.wake()
        self._open.clear()
        for done in self._commands:
            if not done.done():
                done.set_exception(error)
        while self._stats_asked:
            self._stats_asked.popleft().set_result(None)
        while self._steps_asked:
            self._steps_asked.popleft().set_result(None)

    def _as_exception(self, failure: RequestFailure) -> MinisrvError:
        """Return the exception that the engine sent."""
        error = failure.as_exception()
        if isinstance(error, QueueFullError):
            error.retry_after = self.admission.retry_after
        return error

"""The client process: sends the requests of its phases when they are due, and records them.

Knows: how requests are kept in flight. In a closed loop each of C lanes sends its next request when
its last one has ended. In an open loop each request is sent when it is due, whatever became of
those before it; one that cannot be, because the client is late or too many are in flight, is sent
as soon as it can be, and never left out. Knows nothing of the content of a request (prompts), of
how it is judged (client), or of what is computed from it (stats).
"""

import asyncio
import ctypes
import multiprocessing
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import msgspec
from msgspec.structs import replace

from loadgen.arrivals import Arrivals
from loadgen.client import send
from loadgen.http import Client
from loadgen.prompts import Conversation, endpoint
from loadgen.records import ClientLoad, Leg, RequestRecord, RunConfig, clock
from loadgen.samples import Distribution

_TICK_S = 0.02
_FAILURE_PAUSE_S = 0.05  # a lane pauses after a failure, to not flood a server that refuses
_NEAR_S = 0.001  # timers count in milliseconds, so this much of a wait passes without one
_SPARE_FILES = 256


class Phase(msgspec.Struct, frozen=True):
    """One worker's part of a warm-up or of a measurement."""

    leg: Leg
    warmup: bool
    lanes: int
    """Maximum number of requests that this worker keeps in flight."""
    requests: int
    """Maximum number of conversations, most of which are one request, of all workers together,
    which share one counter."""
    time_limit_s: float
    start_s: float | None
    """The time from which those of an open loop are due; None for a closed loop."""


class PhaseResult(msgspec.Struct, frozen=True):
    """The result of one worker's part of a phase. It has no records of requests that an interrupt
    has cut off."""

    records: list[RequestRecord]
    load: ClientLoad


class Shared:
    """Counters that all processes of a run share, in shared memory."""

    _NEXT, _DONE, _FAILED, _STOP = range(4)

    def __init__(self, context: BaseContext) -> None:
        self._cells = context.Array(ctypes.c_longlong, 4)
        self._raw: Any = self._cells.get_obj()  # the same cells, accessed without the lock

    def reset(self) -> None:
        """Reset the counters for a new phase, but not the sign to stop."""
        for cell in (self._NEXT, self._DONE, self._FAILED):
            self._raw[cell] = 0

    def take(self, limit: int) -> int | None:
        """Reserve and return the index of the next conversation, or None if `limit` have been
        reserved."""
        with self._cells:
            index = int(self._raw[self._NEXT])
            self._raw[self._NEXT] += index < limit
        return index if index < limit else None

    def count(self, failed: bool) -> None:
        """Count a conversation that has ended."""
        with self._cells:
            self._raw[self._DONE] += 1
            self._raw[self._FAILED] += failed

    def stop(self) -> None:
        """Ask all workers to abort their requests."""
        self._raw[self._STOP] = 1

    # NOTE: reads take no lock, so that a worker that is killed while it holds the lock cannot block
    # the parent.

    @property
    def stopped(self) -> bool:
        return bool(self._raw[self._STOP])

    @property
    def taken(self) -> int:
        return int(self._raw[self._NEXT])

    @property
    def progress(self) -> tuple[int, int]:
        """Numbers of conversations of the phase that have ended and that have failed: (ended,
        failed)."""
        return int(self._raw[self._DONE]), int(self._raw[self._FAILED])


def open_files(config: RunConfig) -> int:
    """Return the number of files that a client process must be able to open; each connection is
    one."""
    return max(map(config.lanes_at, config.loads)) + _SPARE_FILES


def main(config: RunConfig, api_key: str | None, parent: Connection, shared: Shared) -> None:
    """The main function of a client process: run phases until the parent closes the pipe."""
    _allow_open_files(open_files(config))
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        import uvloop

        new_loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_serve_phases(config, api_key, parent, shared))


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files to `count` if it is lower. The hard limit has been
    checked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def _serve_phases(
    config: RunConfig, api_key: str | None, parent: Connection, shared: Shared
) -> None:
    loop = asyncio.get_running_loop()
    with Client(api_key) as client:
        parent.send_bytes(b"ready")
        while True:
            try:
                # This waits in a thread, so that the event loop notices when the server closes idle
                # connections between phases.
                message = await loop.run_in_executor(None, parent.recv_bytes)
            except (EOFError, OSError):
                return
            phase = msgspec.msgpack.decode(message, type=Phase)
            result = await run_phase(phase, client, shared)
            parent.send_bytes(msgspec.msgpack.encode(result))


async def run_phase(phase: Phase, client: Client, shared: Shared) -> PhaseResult:
    """Send this process's part of a phase until one of its bounds is reached, and measure how busy
    this process is."""
    records: list[RequestRecord] = []
    started_s, cpu_s = clock(), time.process_time()
    sender = _Sender(phase, client, shared, records)
    sending = asyncio.ensure_future(sender.closed() if phase.start_s is None else sender.open())
    lags_s: list[float] = []
    while not sending.done():
        due_s = clock() + _TICK_S
        await asyncio.wait([sending], timeout=_TICK_S)
        if not sending.done():
            lags_s.append(max(0.0, clock() - due_s))
        parent = multiprocessing.parent_process()
        if shared.stopped or (parent is not None and not parent.is_alive()):
            sending.cancel()
            break
    with suppress(asyncio.CancelledError):
        await sending
    wall_s = max(clock() - started_s, 1e-9)
    lag = Distribution.of((value, 1.0) for value in lags_s)
    load = ClientLoad(
        streams=phase.lanes,
        cpu_share=(time.process_time() - cpu_s) / wall_s,
        lag_p99_s=lag.p99 if lag else 0.0,
        lag_max_s=lag.max if lag else 0.0,
    )
    return PhaseResult(records, load)


class _Sender:
    """Sends the requests of one process's part of a phase."""

    def __init__(
        self, phase: Phase, client: Client, shared: Shared, records: list[RequestRecord]
    ) -> None:
        """Make a sender. The record of each request is added to `records` when it has ended."""
        self._phase = phase
        self._config = phase.leg.config
        self._url = endpoint(self._config)
        self._client = client
        self._shared = shared
        self._records = records
        self._until_s = (clock() if phase.start_s is None else phase.start_s) + phase.time_limit_s

    async def closed(self) -> None:
        """Keep as many conversations going as the phase has lanes."""
        await asyncio.gather(*(self._lane() for _ in range(self._phase.lanes)))

    async def _lane(self) -> None:
        while clock() < self._until_s:
            index = self._shared.take(self._phase.requests)
            if index is None:
                return
            if await self._converse(index):
                await asyncio.sleep(_FAILURE_PAUSE_S)

    async def open(self) -> None:
        """Begin each conversation when it is due. Of all processes the one that is free takes the
        next."""
        assert self._phase.start_s is not None
        arrivals = Arrivals(self._config, self._phase.leg.level)
        free = asyncio.Semaphore(self._phase.lanes)

        async def converse(index: int, due_s: float) -> None:
            try:
                await self._converse(index, due_s)
            finally:
                free.release()

        async with asyncio.TaskGroup() as conversations:
            while (index := self._shared.take(self._phase.requests)) is not None:
                due_s = self._phase.start_s + arrivals.at(index)
                if due_s >= self._until_s:
                    return
                await _sleep_until(due_s)
                await free.acquire()
                conversations.create_task(converse(index, due_s))

    async def _converse(self, index: int, due_s: float | None = None) -> bool:
        """Send the requests of conversation `index`, the first of which was due at `due_s`, and
        return whether one of them failed, which ends it."""
        leg = self._phase.leg
        conversation = Conversation(leg.config, leg.level, self._phase.warmup, index)
        failed = False
        for _ in range(conversation.turns):
            record = await send(
                self._client, self._url, conversation.request(), self._config, due_s
            )
            due_s = None  # later requests are due when the answers before them have come
            if record.answer is not None:
                conversation.add_answer(record.answer.text)
                if not self._config.keep_answers:
                    record = replace(record, answer=None)
            self._records.append(record)
            failed = record.failure is not None
            if failed or clock() >= self._until_s:
                break
        self._shared.count(failed)
        return failed


async def _sleep_until(due_s: float) -> None:
    """Return at the time `due_s`, and not up to a millisecond later, as a timer would."""
    while (left_s := due_s - clock()) > 0:
        await asyncio.sleep(max(0.0, left_s - _NEAR_S))

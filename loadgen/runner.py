"""Closed-loop load from several client processes.

Knows: how requests are kept in flight: C lanes are spread over P processes, and each lane sends its
next request when its last one has ended. Knows nothing of the content of a request (prompts), of
how it is judged (client), or of what is computed from it (stats).

    parent                                   each worker process (spawned; one event loop)
      Phase       -- pipe, msgpack -->         lanes: take an index, send, record
      _Shared     <- next index, done, failed, stop ->
      PhaseResult <-- pipe, msgpack --         records, CPU share, event loop lag

The parent sends no requests itself, so that its progress bar disturbs no measurement. A phase ends
after a number of requests or a time, and each request after its timeout; the parent waits for the
results of a phase for the sum of both times, and some seconds more.
"""

import asyncio
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import msgspec

from loadgen.client import send
from loadgen.errors import ConfigError, ServerError, WorkerError
from loadgen.http import Client
from loadgen.prompts import endpoint, request_body
from loadgen.records import (
    ClientLoad,
    Failure,
    Leg,
    LevelResult,
    RequestRecord,
    RunConfig,
    StoppedBy,
    clock,
)
from loadgen.stats import Distribution

_TICK_S = 0.02
_POLL_S = 0.1
_FAILURE_PAUSE_S = 0.05  # a lane pauses after a failure, to not flood a server that refuses
_START_GRACE_S = 60.0
_STOP_GRACE_S = 15.0
_SPARE_FILES = 256


class Observer(Protocol):
    """An object that is informed of the progress of a run. It is called in the parent process, not
    in the processes that measure."""

    def begin(self, leg: Leg, warmup: bool) -> None:
        """Called when a phase begins.

        warmup: whether it is the warm-up of `leg`, or else its measurement.
        """

    def update(self, done: int, failed: int, share: float) -> None:
        """Called now and then during a phase.

        done: number of requests of the phase that have ended.
        failed: number of those that have failed.
        share: how much of the phase's bound, its number of requests or its time, has been used,
            from 0 to 1.
        """


class Phase(msgspec.Struct, frozen=True):
    """One worker's part of a warm-up or of a measurement."""

    leg: Leg
    warmup: bool
    lanes: int
    requests: int
    """Maximum number of requests of all workers together, which share one counter."""
    time_limit_s: float


class PhaseResult(msgspec.Struct, frozen=True):
    """The result of one worker's part of a phase. It has no records of requests that an interrupt
    has cut off."""

    records: list[RequestRecord]
    load: ClientLoad


class _Shared:
    """Counters that all processes of a run share, in shared memory."""

    _NEXT, _DONE, _FAILED, _STOP = range(4)

    def __init__(self, context: SpawnContext) -> None:
        self._cells = context.Array(ctypes.c_longlong, 4)
        self._raw: Any = self._cells.get_obj()  # the same cells, accessed without the lock

    def reset(self) -> None:
        """Reset the counters for a new phase, but not the sign to stop."""
        for cell in (self._NEXT, self._DONE, self._FAILED):
            self._raw[cell] = 0

    def take(self, limit: int) -> int | None:
        """Reserve and return the index of the next request, or None if `limit` requests have been
        reserved."""
        with self._cells:
            index = int(self._raw[self._NEXT])
            self._raw[self._NEXT] += index < limit
        return index if index < limit else None

    def count(self, failed: bool) -> None:
        """Count a request that has ended."""
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
        """Numbers of requests of the phase that have ended and that have failed: (ended,
        failed)."""
        return int(self._raw[self._DONE]), int(self._raw[self._FAILED])


def run_legs(
    legs: Sequence[Leg], api_key: str | None, observer: Observer
) -> Generator[LevelResult, None, None]:
    """Run the warm-up and the measurement of each leg in turn, and yield its raw result.

    The legs may belong to several servers, but their configurations may not differ otherwise. The
    client processes are started and ended here. While this runs, SIGINT and SIGTERM end the
    measurement: the partial result is yielded, then KeyboardInterrupt is raised.

    Raises ConfigError if the limit of open files is too low for the connections, ServerError if all
    requests of the first warm-up of a configuration are refused, WorkerError if a client process
    died or does not answer.
    """
    _check_open_files(legs[0].config)
    with _Pool(legs, api_key, observer) as pool:
        for leg in legs:
            if pool.interrupted:
                raise KeyboardInterrupt
            warmup_failures: list[Failure] = []
            if count := leg.config.warmup_at(leg.concurrency):
                results = pool.run(leg, True, count)
                if pool.interrupted:
                    raise KeyboardInterrupt
                outcomes = [record.failure for result in results for record in result.records]
                warmup_failures = [failure for failure in outcomes if failure is not None]
                if leg.level == 0:
                    _check_not_refused(outcomes)
            requests = leg.config.requests_at(leg.concurrency)
            results = pool.run(leg, False, requests)
            stopped_by = StoppedBy.REQUESTS if pool.taken >= requests else StoppedBy.DURATION
            yield LevelResult(
                concurrency=leg.concurrency,
                stopped_by=StoppedBy.INTERRUPT if pool.interrupted else stopped_by,
                records=sorted(
                    (record for result in results for record in result.records),
                    key=lambda record: record.start_s,
                ),
                warmup_failures=warmup_failures,
                clients=[result.load for result in results],
            )
        if pool.interrupted:
            raise KeyboardInterrupt


def _check_not_refused(outcomes: list[Failure | None]) -> None:
    """Raise ServerError if every request was refused with a status 4xx, other than 408 and 429: the
    requests are wrong, and more of them would show nothing new."""
    refusals = [
        failure
        for failure in outcomes
        if failure is not None
        and failure.status is not None
        and 400 <= failure.status < 500
        and failure.status not in (408, 429)
    ]
    if outcomes and len(refusals) == len(outcomes):
        first = refusals[0]
        hints = [
            f" (see --no-{name.replace('_', '-')})"
            for name in ("ignore_eos", "return_token_ids")
            if name in first.message
        ]
        raise ServerError(
            f"the server refuses these requests: {first.status}: {first.message}{''.join(hints)}"
        )


@contextmanager
def _safe_path() -> Generator[None]:
    """Keep the working directory out of the module path of Python processes that are started within
    this context: it may hold a file of somebody who is not trusted, with the name of a module of
    the standard library. It is not used for servers that are compared, whose command is the
    user's."""
    name = "PYTHONSAFEPATH"
    before, path = os.environ.get(name), sys.path
    here, own = os.getcwd(), str(Path(__file__).parents[1])
    os.environ[name] = "1"
    sys.path = [entry for entry in path if entry == own or os.path.abspath(entry) != here]
    try:
        yield
    finally:
        sys.path = path
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class _Pool:
    """The worker processes of one run, and the handlers of the signals that end it."""

    def __init__(self, legs: Sequence[Leg], api_key: str | None, observer: Observer) -> None:
        self.interrupted = False
        self._config = legs[0].config
        self._observer = observer
        self._context = multiprocessing.get_context("spawn")
        with _safe_path():  # this starts a helper process of multiprocessing
            self._shared = _Shared(self._context)
        self._connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._api_key = api_key
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # NOTE: children inherit that SIGINT is ignored. Ctrl-C reaches the whole process group, and
        # only the parent may act on it.
        self._old_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(max(map(self._config.processes_at, self._config.concurrencies))):
                ours, theirs = self._context.Pipe()
                arguments = (self._config, self._api_key, theirs, self._shared)
                process = self._context.Process(target=_worker, args=arguments, daemon=True)
                with _safe_path():
                    process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
            signal.signal(signal.SIGINT, self._on_signal)
            self._old_handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)
            # Each worker sends a message once it is ready.
            self._collect(self._connections, _START_GRACE_S, lambda: None)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:  # the second signal: do not wait for the workers
            raise KeyboardInterrupt
        self.interrupted = True
        self._shared.stop()

    @property
    def taken(self) -> int:
        """Number of requests started in the last phase."""
        return self._shared.taken

    def run(self, leg: Leg, warmup: bool, requests: int) -> list[PhaseResult]:
        """Run one phase on as many workers as `processes_at` gives for its concurrency, and return
        their results.

        requests: maximum number of requests of all workers together.
        """
        self._shared.reset()
        self._observer.begin(leg, warmup)
        limit_s = self._config.time_limit_s
        busy = self._connections[: self._config.processes_at(leg.concurrency)]
        lanes, rest = divmod(leg.concurrency, len(busy))
        for position, connection in enumerate(busy):
            share = lanes + (position < rest)
            phase = Phase(leg, warmup, share, requests, limit_s)
            with suppress(OSError):  # a dead worker is reported by _collect
                connection.send_bytes(msgspec.msgpack.encode(phase))
        started_s = clock()

        def show() -> None:
            done, failed = self._shared.progress
            used = max(done / requests, min(1.0, (clock() - started_s) / limit_s))
            self._observer.update(done, failed, used)

        patience_s = limit_s + self._config.timeout_s + _STOP_GRACE_S
        return [
            msgspec.msgpack.decode(message, type=PhaseResult)
            for message in self._collect(busy, patience_s, show)
        ]

    def _collect(
        self, connections: list[Connection], patience_s: float, show: Callable[[], None]
    ) -> list[bytes]:
        """Receive one message from each connection, and return the messages in the order of the
        connections. Raises WorkerError if one is closed or `patience_s` seconds have passed.

        show: called again and again meanwhile.
        """
        messages: dict[Connection, bytes] = {}
        give_up_s = clock() + patience_s
        while len(messages) < len(connections):
            if self.interrupted:
                give_up_s = min(give_up_s, clock() + _STOP_GRACE_S)
            if clock() > give_up_s:
                raise WorkerError(
                    f"no answer from {len(connections) - len(messages)} of {len(connections)} "
                    "client processes; lower --concurrency, or give the client more of the machine"
                )
            for ready in wait([c for c in connections if c not in messages], _POLL_S):
                assert isinstance(ready, Connection)
                try:
                    messages[ready] = ready.recv_bytes()
                except (EOFError, OSError):
                    raise WorkerError(self._describe_exit(ready)) from None
            show()
        return [messages[connection] for connection in connections]

    def _describe_exit(self, connection: Connection) -> str:
        position = self._connections.index(connection)
        process = self._processes[position]
        process.join(_STOP_GRACE_S)
        status = process.exitcode
        reason = "its status is not known" if status is None else f"exited with status {status}"
        if status is not None and status < 0:
            reason = f"killed by signal {-status}"
        return (
            f"client process {position + 1} of {len(self._processes)} died ({reason}), and with it "
            "what was measured at this concurrency. What it wrote is above, if anything; if memory "
            "ran out, lower --concurrency or --processes"
        )


def _open_files(config: RunConfig) -> int:
    """Return the number of files that a client process must be able to open; each connection is
    one."""
    return max(map(config.lanes_at, config.concurrencies)) + _SPARE_FILES


def _check_open_files(config: RunConfig) -> None:
    """Raise ConfigError if a client process could not open all its connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and (needed := _open_files(config)) > most:
        raise ConfigError(
            f"--concurrency {max(config.concurrencies)} needs {needed} open files in a client "
            f"process, and {most} are allowed (ulimit -Hn): raise that or --processes, or lower "
            "--concurrency"
        )


def _worker(config: RunConfig, api_key: str | None, parent: Connection, shared: _Shared) -> None:
    """The main function of a client process: run phases until the parent closes the pipe."""
    _allow_open_files(_open_files(config))
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
    config: RunConfig, api_key: str | None, parent: Connection, shared: _Shared
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
            result = await _run_phase(phase, client, shared)
            parent.send_bytes(msgspec.msgpack.encode(result))


async def _run_phase(phase: Phase, client: Client, shared: _Shared) -> PhaseResult:
    """Keep `phase.lanes` requests in flight until a bound of the phase is reached, and measure how
    busy this process is."""
    config = phase.leg.config
    url = endpoint(config)
    records: list[RequestRecord] = []
    started_s, cpu_s = clock(), time.process_time()

    async def lane() -> None:
        while clock() - started_s < phase.time_limit_s:
            index = shared.take(phase.requests)
            if index is None:
                return
            body = request_body(config, phase.leg.level, phase.warmup, index)
            record = await send(client, url, body, index, config)
            records.append(record)
            shared.count(record.failure is not None)
            if record.failure is not None:
                await asyncio.sleep(_FAILURE_PAUSE_S)

    lanes = asyncio.gather(*(lane() for _ in range(phase.lanes)))
    lags_s: list[float] = []
    while not lanes.done():
        due_s = clock() + _TICK_S
        await asyncio.wait([lanes], timeout=_TICK_S)
        if not lanes.done():
            lags_s.append(max(0.0, clock() - due_s))
        parent = multiprocessing.parent_process()
        if shared.stopped or parent is None or not parent.is_alive():
            lanes.cancel()
            break
    with suppress(asyncio.CancelledError):
        await lanes
    wall_s = max(clock() - started_s, 1e-9)
    lag = Distribution.of((value, 1.0) for value in lags_s)
    load = ClientLoad(
        streams=phase.lanes,
        cpu_share=(time.process_time() - cpu_s) / wall_s,
        lag_p99_s=lag.p99 if lag else 0.0,
        lag_max_s=lag.max if lag else 0.0,
    )
    return PhaseResult(records, load)

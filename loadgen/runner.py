"""Runs the levels of a load from several client processes.

Knows: the client processes, how the load of a level is spread over them, and the signals that end a
run. Knows nothing of how a client process sends requests (worker), or of what is computed from
their records (stats).

    parent                                   each client process (spawned; one event loop)
      Phase       -- pipe, msgpack -->         take an index, send, record
      Shared      <- next index, done, failed, stop ->
      PhaseResult <-- pipe, msgpack --         records, CPU share, event loop lag

The parent sends no requests itself, so that its progress bar disturbs no measurement. A phase ends
after a number of requests or a time, and each request after its timeout; the parent waits for the
results of a phase for the sum of both times, and some seconds more.
"""

import asyncio
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

import msgspec

from loadgen import server_metrics, worker
from loadgen.errors import ConfigError, RefusedError, WorkerError
from loadgen.records import (
    MAX_DURATION_S,
    OPEN_WARMUP,
    Failure,
    Leg,
    LevelResult,
    RunConfig,
    StoppedBy,
    clock,
)
from loadgen.worker import Phase, PhaseResult, Shared

_POLL_S = 0.1
_LEAD_S = 0.1  # from the message to the workers until the first request of an open loop can be due
_START_GRACE_S = 60.0
_STOP_GRACE_S = 15.0


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


def run_legs(
    legs: Sequence[Leg], api_key: str | None, observer: Observer
) -> Generator[LevelResult, None, None]:
    """Run the warm-up and the measurement of each leg in turn, and yield its raw result.

    The legs may belong to several servers, but their configurations may not differ otherwise. The
    client processes are started and ended here. While this runs, SIGINT and SIGTERM end the
    measurement: the partial result is yielded, then KeyboardInterrupt is raised.

    Raises ConfigError if the limit of open files is too low for the connections, RefusedError if
    all requests of the first warm-up of a configuration are refused, WorkerError if a client
    process died or does not answer.
    """
    _check_open_files(legs[0].config)
    with _Pool(legs, api_key, observer) as pool:
        for leg in legs:
            if pool.interrupted:
                raise KeyboardInterrupt
            warmup_failures: list[Failure] = []
            if count := leg.config.warmup_at(leg.load):
                results = pool.run(leg, True, count)
                if pool.interrupted:
                    raise KeyboardInterrupt
                outcomes = [record.failure for result in results for record in result.records]
                warmup_failures = [failure for failure in outcomes if failure is not None]
                if leg.level == 0:
                    _check_not_refused(outcomes)
            requests = leg.config.requests_at(leg.load)
            before = asyncio.run(server_metrics.read(leg.config.base_url, api_key))
            results = pool.run(leg, False, requests)
            after = asyncio.run(server_metrics.read(leg.config.base_url, api_key))
            stopped_by = StoppedBy.REQUESTS if pool.taken >= requests else StoppedBy.DURATION
            yield LevelResult(
                load=leg.load,
                stopped_by=StoppedBy.INTERRUPT if pool.interrupted else stopped_by,
                records=sorted(
                    (record for result in results for record in result.records),
                    key=lambda record: record.due_s,
                ),
                warmup_failures=warmup_failures,
                clients=[result.load for result in results],
                shares_prefixes=leg.config.shares_prefixes,
                objectives=leg.config.objectives,
                server_counters=after.growth_since(before),
            )
        if pool.interrupted:
            raise KeyboardInterrupt


def _check_not_refused(outcomes: list[Failure | None]) -> None:
    """Raise RefusedError if every request was refused with 500 or a status 4xx, other than 408 and
    429: the requests are wrong, and more of them would show nothing new."""
    refusals = [
        failure
        for failure in outcomes
        if failure is not None
        and failure.status is not None
        and 400 <= failure.status <= 500
        and failure.status not in (408, 429)
    ]
    if outcomes and len(refusals) == len(outcomes):
        first = refusals[0]
        hints = [
            f" (see --no-{name.replace('_', '-')})"
            for name in ("ignore_eos", "return_token_ids")
            if name in first.message
        ]
        raise RefusedError(
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
            self._shared = Shared(self._context)
        self._connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._api_key = api_key
        self._old_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # NOTE: children inherit that SIGINT is ignored. Ctrl-C reaches the whole process group, and
        # only the parent may act on it.
        self._old_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(max(map(self._config.processes_at, self._config.loads))):
                ours, theirs = self._context.Pipe()
                arguments = (self._config, self._api_key, theirs, self._shared)
                process = self._context.Process(target=worker.main, args=arguments, daemon=True)
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
        """Run one phase on as many workers as `processes_at` gives for its load, and return their
        results. A warm-up is a closed loop.

        requests: maximum number of conversations of all workers together.
        """
        self._shared.reset()
        self._observer.begin(leg, warmup)
        limit_s = self._config.time_limit_s
        busy = self._connections[: self._config.processes_at(leg.load)]
        in_flight = self._config.in_flight_at(leg.load)
        start_s = None
        if leg.load.is_open and warmup:
            in_flight = max(OPEN_WARMUP, len(busy))
        elif leg.load.is_open:
            start_s = clock() + _LEAD_S
        lanes, rest = divmod(in_flight, len(busy))
        for position, connection in enumerate(busy):
            share = lanes + (position < rest)
            phase = Phase(leg, warmup, share, requests, limit_s, start_s)
            with suppress(OSError):  # a dead worker is reported by _collect
                connection.send_bytes(msgspec.msgpack.encode(phase))
        started_s = clock()

        def show() -> None:
            done, failed = self._shared.progress
            used = max(done / requests, min(1.0, (clock() - started_s) / limit_s))
            self._observer.update(done, failed, used)

        # An open loop sends late what it cannot send in time, and so may need longer.
        sending_s = limit_s if start_s is None else MAX_DURATION_S
        patience_s = sending_s + self._config.timeout_s + _STOP_GRACE_S
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


def _check_open_files(config: RunConfig) -> None:
    """Raise ConfigError if a client process could not open all its connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and (needed := worker.open_files(config)) > most:
        raise ConfigError(
            f"{max(map(config.in_flight_at, config.loads))} requests in flight need {needed} open "
            f"files in a client process, and {most} are allowed (ulimit -Hn): raise that or "
            "--processes, or lower --concurrency or --max-concurrency"
        )

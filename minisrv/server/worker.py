"""An API worker: one event loop that serves HTTP and talks to the engine.

It reports to the launcher the progress of the engine's start and that it is ready itself, is told
by it how the engine has ended, and ends when the launcher closes the pipe between them.

Knows: uvicorn, and what an application needs. Knows nothing of other workers, except that they
count in the same files.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import cast

import uvicorn
from fastapi import FastAPI

from minisrv.checkpoint import Checkpoint
from minisrv.engine.client import EngineClient, EngineState
from minisrv.engine.messages import Loading, Ready
from minisrv.errors import MinisrvError
from minisrv.metrics import Metrics
from minisrv.processes import bound_resource
from minisrv.server.app import create_app
from minisrv.server.auth import KeyLimit
from minisrv.server.connections import Connections
from minisrv.server.hosts import HostNames
from minisrv.server.http import BoundedProtocol
from minisrv.server.listening import HttpServer
from minisrv.server.worker_config import CHECKPOINT, Report, WorkerConfig
from minisrv.text.tokenizer import Tokenizer

EXIT_REPORT_SECONDS = 5
"""Seconds that the launcher gets to report how the engine has ended. It is notified at once, but it
may be stopped or busy, and without its report requests end with a less precise reason."""

SWITCH_SECONDS = 0.0005
"""Interval in seconds at which a thread must give up the GIL: a tenth of Python's default, which a
request for /health would have to wait several times."""

TURN_SECONDS = 20
TURN_SECONDS_OF_A_PROCESSOR = 4
"""Processor time of the process within which its event loop has a turn, or the kernel ends it; and
more of it for each processor, on all of which threads may tokenise meanwhile."""

MEMORY_BYTES = 4 << 30
"""Maximum number of bytes of a worker's private memory, of which it normally takes a fiftieth. The
kernel counts all writable memory, touched or not: the whole stack of each thread (8 MiB for each of
some forty threads, and 2 MiB for one per core in the tokenizer's library); of the C library's
arenas only what is in use."""

LAST_WORDS_SECONDS = 2
"""Seconds that clients get to read the error that ends their requests when the server shuts
down."""


def run_worker(config: WorkerConfig, listener: socket.socket, launcher: Connection) -> None:
    """Serve on `listener` until the launcher closes its end of the pipe."""
    bound_interpreter()
    # This makes an allocation fail that would exhaust the machine's memory: a chat template is a
    # stranger's program, and can ask for as much as it likes.
    bound_resource(resource.RLIMIT_DATA, MEMORY_BYTES)
    client = EngineClient(config.address, config.engine_pid, config.name, EXIT_REPORT_SECONDS)
    settings = config.settings
    connections = Connections()
    hosts = HostNames.of(settings, listener.getsockname()[0])
    try:
        app = worker_app(
            config,
            client,
            hosts,
            max_open=connections.max_served,
            is_alone=config.number == 1,
        )
    except MinisrvError as error:
        _send_report(launcher, f"API worker {config.index} did not start: {error.message}")
        return
    # Objects that exist now stay for good: a garbage collection that went through all of them would
    # stall every stream.
    gc.collect()
    gc.freeze()
    http = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,  # the process has configured logging
        log_level="warning",
        access_log=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        # Later than our own time limit: uvicorn cancels requests, while ours ends them with an
        # error.
        timeout_graceful_shutdown=settings.shutdown_timeout + LAST_WORDS_SECONDS + 1,
    )
    server = _Server(
        http, listener, connections, client, app.state.close, settings.shutdown_timeout
    )
    with asyncio.Runner(loop_factory=http.get_loop_factory()) as runner:
        runner.run(_serve(config, client, server, launcher))
    app.state.close()


def bound_interpreter() -> None:
    """Set what the interpreter bounds for the sake of other requests, in this process."""
    # A thread that parses or renders a large body makes the event loop wait this long, each time
    # that the loop wants to go on.
    sys.setswitchinterval(SWITCH_SECONDS)
    # The time to parse an integer grows with the square of its length; no request needs more
    # digits.
    sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)


def worker_app(
    config: WorkerConfig,
    client: EngineClient,
    hosts: HostNames,
    *,
    max_open: int = sys.maxsize,
    is_alone: bool,
) -> FastAPI:
    """Return the application of an API worker, which counts in the server's private directory.

    client: the client of the engine, which need not be connected yet.
    hosts: the host names that the server answers to.
    max_open: maximum number of open choices, where the engine would take more.
    is_alone: whether every request of a client comes to this application.
    Raises EngineError or ConfigError if a file of the private directory cannot be read or made.
    """
    settings = config.settings
    place = {"worker": config.index, "workers": config.number}
    key_limit = None
    if settings.max_requests_per_key:
        key_limit = KeyLimit(
            config.private_dir / "open-requests",
            keys=len(settings.api_keys),
            limit=settings.max_requests_per_key,
            **place,
        )
    checkpoint = Checkpoint.load(config.private_dir / CHECKPOINT)
    return create_app(
        client,
        Tokenizer.from_description(checkpoint.tokenizer),
        served_model_names=config.served_model_names,
        generation=checkpoint.generation,
        root=config.root,
        metrics=Metrics(config.private_dir / "metrics", **place),
        settings=settings,
        enable_sleep_mode=config.enable_sleep_mode,
        key_limit=key_limit,
        max_open=max_open,
        hosts=hosts,
        is_alone=is_alone,
    )


class _Server(HttpServer):
    """Tells the engine client and the connections when the shutdown begins and when time is up."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        connections: Connections,
        client: EngineClient,
        close: Callable[[], None],
        seconds: float,
    ) -> None:
        """Wrap uvicorn's server.

        close: the application's `state.close`.
        seconds: seconds that open requests get to finish.
        """
        super().__init__(config, listener, connections)
        self.client = client
        self.close = close
        self.seconds = seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the launcher handles them."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let open ones finish, end those that do not finish with an error,
        and close the connections of clients that do not read it."""
        self.client.drain()
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self.seconds, self._end_open),
            loop.call_later(self.seconds + LAST_WORDS_SECONDS, self._abort_open),
        ]
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()

    def _end_open(self) -> None:
        """End the open requests, whatever they wait for: the engine, a grammar, or the rest of
        their own body."""
        self.client.end_open()
        self.close()
        for connection in self._open():
            connection.give_up()

    def _abort_open(self) -> None:
        for connection in self._open():
            connection.abort()

    def _open(self) -> list[BoundedProtocol]:
        return cast(list[BoundedProtocol], [*self.server_state.connections])


async def _serve(
    config: WorkerConfig,
    client: EngineClient,
    server: _Server,
    launcher: Connection,
) -> None:
    loop = asyncio.get_running_loop()

    def hear() -> None:
        try:
            client.engine_ended(launcher.recv())
        except (EOFError, OSError):
            loop.remove_reader(launcher)
            server.should_exit = True

    loop.add_reader(launcher, hear)
    await client.start(lambda *phase: _send_report(launcher, Loading(*phase)))
    settled = asyncio.create_task(_report(client, launcher))
    watch = asyncio.create_task(watch_event_loop())
    try:
        if config.engine_is_ready:
            await client.settled()  # the engine must confirm it before this worker serves
        await server.serve()
    finally:
        settled.cancel()
        watch.cancel()
        await client.close()


async def watch_event_loop() -> None:
    """Let the kernel end this process, by SIGPROF, once its event loop has no more turns. A single
    operation of Python's in a stranger's chat template, as to compare lists that hold each other a
    billion times, may go on for ever and let no other thread run. Time in which the process is
    stopped or waits for a processor does not count."""
    seconds = TURN_SECONDS + TURN_SECONDS_OF_A_PROCESSOR * len(os.sched_getaffinity(0))
    try:
        while True:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            await asyncio.sleep(1)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


async def _report(client: EngineClient, launcher: Connection) -> None:
    """Tell the launcher the outcome of the engine's start."""
    await client.settled()
    if client.state is EngineState.DEAD:
        _send_report(launcher, f"the engine did not start: {client.death.message}")
    elif client.info is not None:
        _send_report(launcher, Ready(client.info))


def _send_report(launcher: Connection, report: Report) -> None:
    with suppress(BrokenPipeError):  # the launcher wants this worker to end
        launcher.send(report)

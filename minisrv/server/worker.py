"""An API worker: one event loop that serves HTTP and talks to the engine.

It tells the launcher how the engine's start comes along and that it is ready itself, is told how
the engine has ended, and ends when the launcher closes the line between them.

Knows: uvicorn, and what an application needs. Knows nothing of other workers, but that they count
in the same file.
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
from minisrv.server.process import CHECKPOINT, Report, WorkerConfig
from minisrv.text.tokenizer import Tokenizer

OBITUARY_SECONDS = 5
"""What the launcher gets to say how the engine has ended. It is told at once, but it may be stopped
or busy, and without its word requests end with less of a reason."""

SWITCH_SECONDS = 0.0005
"""A tenth of Python's own, which a request for /health would wait several times."""

TURN_SECONDS = 20
TURN_SECONDS_OF_A_PROCESSOR = 4
"""Processor time of the process within which its event loop has a turn, or the kernel ends it; and
more of it for each processor, on all of which threads may tokenise meanwhile."""

MEMORY_BYTES = 4 << 30
"""Private memory of a worker, which takes a fiftieth of it. The kernel counts what may be written,
touched or not: the whole stack of each thread, 8 MiB, of which there are some forty, and one of 2
MiB for each core in the tokenizer's library; of the C library's arenas what is in use."""

LAST_WORDS_SECONDS = 2
"""What clients get to read the error that ends their requests when the server shuts down."""


def run_worker(config: WorkerConfig, listener: socket.socket, launcher: Connection) -> None:
    """Serve on `listener` until the launcher closes its end of the line."""
    # What a thread that reads or renders a large body keeps the event loop waiting for, each time
    # that the loop wants to go on.
    sys.setswitchinterval(SWITCH_SECONDS)
    # To read an integer takes the square of its length. Requests have none of so many digits.
    sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)
    # So that an allocation fails that would take the machine's memory: a chat template is a
    # stranger's program, and can ask for as much as it likes.
    bound_resource(resource.RLIMIT_DATA, MEMORY_BYTES)
    client = EngineClient(config.address, config.engine_pid, config.name, OBITUARY_SECONDS)
    settings = config.settings
    place = {"worker": config.index, "workers": config.number}
    connections = Connections()
    key_limit = None
    try:
        metrics = Metrics(config.private_dir / "metrics", **place)
        if settings.max_requests_per_key:
            key_limit = KeyLimit(
                config.private_dir / "open-requests",
                keys=len(settings.api_keys),
                limit=settings.max_requests_per_key,
                **place,
            )
        checkpoint = Checkpoint.load(config.private_dir / CHECKPOINT)
        app = create_app(
            client,
            Tokenizer.from_description(checkpoint.tokenizer),
            served_model_names=config.served_model_names,
            generation=checkpoint.generation,
            root=config.root,
            metrics=metrics,
            settings=settings,
            key_limit=key_limit,
            max_open=connections.most_lasting,
            hosts=HostNames.of(settings, listener.getsockname()[0]),
        )
    except MinisrvError as error:
        _tell(launcher, f"API worker {config.index} did not start: {error.message}")
        return
    # What is there now stays: a collection that went through all of it would hold every stream up.
    gc.collect()
    gc.freeze()
    http = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,  # its lines are the process's
        log_level="warning",
        access_log=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        # Behind our own, as it fails requests instead of ending them.
        timeout_graceful_shutdown=settings.shutdown_timeout + LAST_WORDS_SECONDS + 1,
    )
    server = _Server(
        http, listener, connections, client, app.state.close, settings.shutdown_timeout
    )
    with asyncio.Runner(loop_factory=http.get_loop_factory()) as runner:
        runner.run(_serve(config, client, server, launcher))
    app.state.close()


class _Server(HttpServer):
    """Tells everybody when the end begins and when time is up."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        connections: Connections,
        client: EngineClient,
        close: Callable[[], None],
        seconds: float,
    ) -> None:
        """close: of the application. seconds: what open requests get to finish."""
        super().__init__(config, listener, connections)
        self.client = client
        self.close = close
        self.seconds = seconds

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the launcher's."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let open ones finish, end with an error those that do not, and cut
        off who does not read it."""
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
        """Whatever a request waits for: the engine, a grammar, or the rest of its own body."""
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
    await client.start(lambda *phase: _tell(launcher, Loading(*phase)))
    settled = asyncio.create_task(_report(client, launcher))
    life = asyncio.create_task(show_life())
    try:
        if config.engine_is_ready:
            await client.settled()  # it has to say so, before this worker may
        await server.serve()
    finally:
        settled.cancel()
        life.cancel()
        await client.close()


async def show_life() -> None:
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
    """Tell the launcher what has come of the engine's start."""
    await client.settled()
    if client.state is EngineState.DEAD:
        _tell(launcher, f"the engine did not start: {client.death.message}")
    elif client.info is not None:
        _tell(launcher, Ready(client.info))


def _tell(launcher: Connection, report: Report) -> None:
    with suppress(BrokenPipeError):  # it wants this worker to end
        launcher.send(report)

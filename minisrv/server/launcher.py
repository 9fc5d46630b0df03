"""`minisrv serve`: starts, watches and ends the server's processes.

This process starts the engine, which imports its modules while the small files of the checkpoint
are read here, then the API workers, which import their modules and open the port while the engine
loads: `/health` answers soon, `/ready` once the engine is ready. After that it only watches.
A worker that dies is replaced; one that dies before it was ready ends the server. SIGTERM and
SIGINT stop admission, give open requests `shutdown_timeout` seconds, and end all processes; a
second SIGINT ends them at once.

Knows: which process starts which, and how all of them end. Knows nothing of requests, and imports
neither torch nor anything of HTTP.
"""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from minisrv.config import EngineConfig, ServerConfig
from minisrv.engine.messages import EngineInfo, Loading, Ready
from minisrv.errors import ConfigError
from minisrv.processes import PARENTS_SIGNALS, raise_descriptor_limit
from minisrv.progress import StartupClock, StartupProgress
from minisrv.server.process import WorkerProcess
from minisrv.server.watched_engine import (
    WatchedEngine,
    check_settings,
    usable_temporary_directory,
)
from minisrv.server.worker_config import Report

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
"""Seconds between two looks at the engine's sign of life."""

PAUSED_SECONDS = 2
"""If the last look was more seconds ago than this, this process itself did not run, as when a
terminal or a container stops it. The engine was then stopped with it and may need a moment too."""

STUCK_SECONDS = 5
"""Seconds that workers get to end, beyond the time of their open requests."""


def serve(engine: EngineConfig, server: ServerConfig, clock: StartupClock) -> int:
    """Serve until a signal comes; return the exit status: 0 after SIGTERM or SIGINT, 1 if the
    server could not start or go on, or the engine had died by then.

    clock: measures the start-up, which has begun already.
    Raises ConfigError or ModelError for what can be seen to be wrong before weights are read.
    """
    # Until there are child processes that have to end in order, SIGTERM interrupts the current
    # work, as SIGINT does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise_descriptor_limit()
    check_settings(engine)
    _check_certificate(server)
    with ExitStack() as stack:
        listeners = listen(server)
        for listener in listeners:
            stack.enter_context(listener)
        with usable_temporary_directory():
            private_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minisrv-")))
        clock.end("launcher")
        watched = WatchedEngine(engine, server, private_dir)
        stack.callback(watched.process.stop)
        watched.load()
        stop = stack.enter_context(_stop_signals())
        tree = _ProcessTree(watched)
        stack.callback(tree.stop_workers)
        for index, listener in enumerate(listeners):
            config = watched.worker_config(index, len(listeners))
            tree.workers.append(WorkerProcess(config, listener))
        scheme = "http" if server.ssl_certfile is None else "https"
        in_order = tree.watch(stop, f"{scheme}://{_host_and_port(listeners[0])}", clock)
        for listener in listeners:
            listener.close()
        in_order &= tree.drain(stop, server.shutdown_timeout + STUCK_SECONDS)
        return 0 if in_order and watched.process.exit_status is None else 1


class _ProcessTree:
    """The engine and the API workers, from their first report to their last exit status."""

    def __init__(self, watched: WatchedEngine) -> None:
        """Take an engine that has been started; the workers are added later."""
        self.watched = watched
        self.engine = watched.process
        self.workers: list[WorkerProcess] = []
        self.progress = StartupProgress()
        self.announced = False
        self.engine_ended = False

    def watch(self, stop: socket.socket, url: str, clock: StartupClock) -> bool:
        """Watch until a signal comes (returns True) or the server cannot go on (False)."""
        try:
            last = time.monotonic()
            while True:
                lines = {worker.reports: worker for worker in self.workers}
                ends = [worker.sentinel for worker in self.workers]
                if not self.engine_ended:
                    ends.append(self.engine.sentinel)
                ready = wait([stop, *lines, *ends], timeout=WATCH_SECONDS)
                before, last = last, time.monotonic()
                if last - before < PAUSED_SECONDS:
                    self.watched.check(is_ready=self.announced)
                if stop in ready:
                    stop.recv(1)
                    return True
                if not self.engine_ended and self.engine.sentinel in ready:
                    self._report_engine_exit()
                for worker in (lines[line] for line in ready if line in lines):
                    if not self._handle_report(worker, url, clock):
                        return False
                for index, worker in enumerate(self.workers):
                    if worker.sentinel in ready and not self._replace(index, worker):
                        return False
        finally:
            self.progress.close()

    def _report_engine_exit(self) -> None:
        """Tell the workers how the engine has ended."""
        self.engine_ended = True
        how = self.watched.describe_exit()
        for worker in self.workers:
            worker.engine_ended(how)

    def _handle_report(self, worker: WorkerProcess, url: str, clock: StartupClock) -> bool:
        """Receive a report of a worker; return whether the server can go on."""
        try:
            report: Report = worker.reports.recv()
        except (EOFError, ConnectionResetError):
            return True  # the worker has died, which `watch` sees by its sentinel
        match report:
            case Loading(phase, done, total) if worker is self.workers[0] and not self.announced:
                self.progress(phase, done, total)
            case Ready(info):
                worker.is_ready = True
                if not self.announced and all(each.is_ready for each in self.workers):
                    self.announced = True
                    self.progress.close()
                    _announce(info, url, clock)
            case str(reason):
                logger.error("%s", reason)
                return False
        return True

    def _replace(self, index: int, worker: WorkerProcess) -> bool:
        """Start a new worker in the place of one that has died; return whether the server can go
        on."""
        what = f"API worker {index} (process {worker.pid}) has died, {worker.describe_exit()}"
        if not worker.is_ready or self.engine.exit_status is not None:
            logger.error("%s; the server ends.", what)
            return False
        logger.error("%s; its requests are lost, and another takes its place.", what)
        self.workers[index] = worker.successor()
        return True

    def drain(self, stop: socket.socket, seconds: float) -> bool:
        """Let the workers finish and end; return whether all ended in order. Another SIGINT ends
        the wait, as somebody is waiting. Another SIGTERM does not, as some programs send it first
        to a process and then to its group."""
        for worker in self.workers:
            worker.drain()
        deadline = time.monotonic() + seconds
        while open_ends := [each.sentinel for each in self.workers if each.exit_status is None]:
            ready = wait([stop, *open_ends], timeout=max(0.0, deadline - time.monotonic()))
            if stop in ready and signal.SIGINT in stop.recv(64):
                return True
            if not ready:
                logger.error("an API worker does not end; it is killed.")
                return False
        return all(worker.exit_status == 0 for worker in self.workers)

    def stop_workers(self) -> None:
        """End the workers that are left, at once."""
        for worker in self.workers:
            worker.stop()


@contextmanager
def _stop_signals() -> Iterator[socket.socket]:
    """Yield a socket that receives a byte for each SIGTERM or SIGINT that comes: the signal's
    number."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for signum in PARENTS_SIGNALS:
            signal.signal(signum, lambda signum, frame: None)
        try:
            yield reader
        finally:
            for signum in PARENTS_SIGNALS:
                signal.signal(signum, signal.SIG_IGN)  # there is nothing left to interrupt
            signal.set_wakeup_fd(-1)


def listen(server: ServerConfig) -> list[socket.socket]:
    """Return a listening socket for each worker, all on one port, so that the kernel spreads
    connections over them.

    With one socket that all workers accept from, most of a burst would go to the worker that wakes
    up first.
    """
    listeners = [_bind(server, server.port)]
    # NOTE: SO_REUSEPORT is set only after the first socket has the port to itself; otherwise a
    # second server could share the port.
    for listener in listeners if server.api_workers > 1 else ():
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port = listeners[0].getsockname()[1]
    while len(listeners) < server.api_workers:
        listeners.append(_bind(server, port, socket.SO_REUSEPORT))
    return listeners


def _bind(server: ServerConfig, port: int, *options: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
    for option in (socket.SO_REUSEADDR, *options):
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        listener.bind((server.host, port))
        # Listen at once: of two servers that have only bound to a port, neither would notice the
        # other.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {server.host}:{port} ({error.strerror}); "
            "choose another --host or --port."
        ) from None
    return listener


def _host_and_port(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_certificate(server: ServerConfig) -> None:
    """Raise ConfigError if the certificate cannot be used, before any worker would fail on it."""
    if server.ssl_certfile is None or server.ssl_keyfile is None:
        return
    try:
        # An empty password is given, as OpenSSL would otherwise prompt for one if the key needs it.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"--ssl-certfile {server.ssl_certfile} and --ssl-keyfile {server.ssl_keyfile} cannot "
            f"be used ({error}); they must be PEM files that belong together, the key without a "
            "password."
        ) from None


def _announce(info: EngineInfo, url: str, clock: StartupClock) -> None:
    clock.include(info.startup_seconds)
    clock.end("API workers")
    phases = ", ".join(f"{name} {took:.2f}" for name, took in clock.seconds.items())
    logger.info("ready in %.2f s (%s): %s/v1", sum(clock.seconds.values()), phases, url)

"""The API worker as a process: how the launcher starts one, hears of it and lets it end.

Each worker listens on a socket of its own, all of them on one port: the kernel spreads connections
over them. The launcher keeps the sockets open too, so that a connection waits while a dead worker
is replaced.

Knows: processes. Imports nothing of HTTP, which would take half a second before the engine starts.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from minisrv import threads
from minisrv.config import ServerConfig
from minisrv.engine.messages import Loading, Ready
from minisrv.processes import ChildProcess

CHECKPOINT = "checkpoint"
"""The file in the server's private directory that says what is served, for all processes."""

Report = Loading | Ready | str
"""What a worker tells the launcher: what the engine told it, or why it cannot serve."""


@dataclass(frozen=True)
class WorkerConfig:
    """What an API worker is started with.

    index: its number, out of `number` workers.
    address, engine_pid: of the engine.
    private_dir: the server's own, where workers share their metrics, and CHECKPOINT lies.
    root: the checkpoint as the server was told of it, which served_model_names stand for.
    settings: the server's.
    engine_is_ready: or else it is starting as well, and the worker answers that it does.
    """

    index: int
    number: int
    address: str
    engine_pid: int
    private_dir: Path
    root: str
    served_model_names: tuple[str, ...]
    settings: ServerConfig
    engine_is_ready: bool = False

    @property
    def name(self) -> str:
        """Of the process, and on the engine's socket."""
        return f"api-{self.index}"


class WorkerProcess(ChildProcess):
    """The launcher's handle of an API worker.

    is_ready: it has said so. reports: its end of the line, readable if there is something to take.
    """

    def __init__(self, config: WorkerConfig, listener: socket.socket) -> None:
        """Start the process at once."""
        self.config = config
        self.listener = listener
        self.is_ready = False
        self.reports, theirs = Pipe()
        with theirs:
            super().__init__(
                config.name, _main, config, listener, theirs, private_dir=config.private_dir
            )

    def engine_ended(self, how: str) -> None:
        """Tell it how the engine has ended."""
        with suppress(OSError):  # it has died as well
            self.reports.send(how)

    def drain(self) -> None:
        """Let it refuse new requests, finish the open ones and end."""
        self.reports.close()

    def successor(self) -> WorkerProcess:
        """Another process in the place of this one, which has ended."""
        self.stop()
        self.reports.close()
        return WorkerProcess(replace(self.config, engine_is_ready=True), self.listener)


def _main(config: WorkerConfig, listener: socket.socket, launcher: Connection) -> None:
    threads.without_blas()
    from minisrv.server.worker import run_worker

    run_worker(config, listener, launcher)

"""The API worker as a process: how the launcher starts one, receives its reports and lets it end.

Each worker listens on a socket of its own, and all of these are bound to one port: the kernel
spreads connections over them. The launcher keeps the sockets open too, so that connections wait
while a dead worker is replaced.

Knows: processes. Imports nothing of HTTP, which would take half a second before the engine starts.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from minisrv import threads
from minisrv.processes import ChildProcess
from minisrv.server.worker_config import WorkerConfig


class WorkerProcess(ChildProcess):
    """The launcher's handle of an API worker.

    is_ready: whether the worker has reported that it is ready.
    reports: the launcher's end of the pipe between them; it is readable if there is a report.
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
        """Tell the worker how the engine has ended."""
        with suppress(OSError):  # the worker has died as well
            self.reports.send(how)

    def drain(self) -> None:
        """Let the worker refuse new requests, finish the open ones and end."""
        self.reports.close()

    def successor(self) -> WorkerProcess:
        """Start another worker process in the place of this one, which has ended."""
        self.stop()
        self.reports.close()
        return WorkerProcess(replace(self.config, engine_is_ready=True), self.listener)


def _main(config: WorkerConfig, listener: socket.socket, launcher: Connection) -> None:
    threads.without_blas()
    from minisrv.server.worker import run_worker

    run_worker(config, listener, launcher)

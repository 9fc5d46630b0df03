"""A server as a child process: started on a free port, waited for, watched, and always ended.

Knows command lines, process groups, and the pages that tell a server's state: /ready and /health.
Does not know what is asked of it, nor what it is compared with.
"""

import os
import shlex
import signal
import socket
import subprocess
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self

from loadgen.errors import ConfigError, ServerError
from loadgen.records import clock

_HOST = "127.0.0.1"
_POLL_S = 0.05
_PAGE_TIMEOUT_S = 5.0
_STOP_S = 30.0  # from SIGTERM to SIGKILL
_TAIL_BYTES = 3000


class Server:
    """One server, alive within `with`. It is in a session of its own, so a terminal's Ctrl-C
    reaches it as SIGTERM and after everything that was in flight."""

    def __init__(self, name: str, command: str, log: Path) -> None:
        """`{port}` in the command stands for its port; without it `--host` and `--port` are
        appended. Raises ConfigError if the command is none."""
        self.name = name
        self.log = log
        with socket.create_server((_HOST, 0)) as listener:
            self._port = int(listener.getsockname()[1])
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ConfigError(f"{command!r} is no command line: {error}") from None
        self.command = [word.replace("{port}", str(self._port)) for word in words]
        if self.command == words:
            self.command += ["--host", _HOST, "--port", str(self._port)]

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Its first process, whose number is that of its process group too."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Start it. Raises ConfigError if there is no such program."""
        self._started_s = clock()
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigError(f"cannot start {shlex.join(self.command)}: {error}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        finally:  # also if a second Ctrl-C ends the wait; and for what outlived its parent
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_ready(self, patience_s: float) -> float:
        """Return the seconds from its start until it said it was ready.

        /ready decides, or /health where there is none. Raises ServerError if it ends before, or
        after `patience_s`.
        """
        while True:
            self.check()
            status = self._status("/ready")
            if status == 404:
                status = self._status("/health")
            waited_s = clock() - self._started_s
            if status == 200:
                return waited_s
            if waited_s > patience_s:
                raise ServerError(f"{self.name} is not ready after {waited_s:.0f} s{self._tail()}")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise ServerError if it has ended."""
        if (status := self._process.poll()) is not None:
            raise ServerError(f"{self.name} ended with status {status}{self._tail()}")

    def _status(self, path: str) -> int:
        """The status of a GET; 0 if it does not answer."""
        connection = HTTPConnection(_HOST, self._port, timeout=_PAGE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, HTTPException):
            return 0
        finally:
            connection.close()

    def _tail(self) -> str:
        end = self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").rstrip()
        return f"; {self.log} ends with:\n{end}" if end else f"; {self.log} is empty"

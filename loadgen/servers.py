"""A server as a child process: started on a free port, waited for, watched, and always ended.

Knows command lines, and the pages that tell a server's state: /ready and /health. What ends a
server, whatever becomes of this process, is `supervisor`. Does not know what is asked of it, nor
what it is compared with.
"""

import os
import shlex
import socket
import subprocess
import sys
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
_SPARE_S = 5.0
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
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
        return self._pid

    def __enter__(self) -> Self:
        """Start it. Raises ConfigError if there is no such program, or no place for its log."""
        supervisor = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(_STOP_S)]
        try:
            log = self.log.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write the log of {self.name}: {error}") from None
        self._line, theirs = socket.socketpair()
        with log, theirs:
            self._process = subprocess.Popen(
                supervisor + self.command,
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._started_s, self._pid = self._hear_start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _hear_start(self) -> tuple[float, int]:
        """When the command was started, and its process. Raises ConfigError."""
        said = self._line.recv(1024).decode()
        try:
            started, pid = said.split()
            return float(started), int(pid)
        except ValueError:
            reason = said or f"its supervisor has ended{self._tail()}"
            raise ConfigError(f"cannot start {shlex.join(self.command)}: {reason}") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._line.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S + _SPARE_S)
        finally:  # also if a second Ctrl-C ends the wait
            self._process.terminate()
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
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                end = log.read().decode(errors="replace").rstrip()
        except OSError as error:  # long runs outlive what is cleared of temporary directories
            return f"; {self.log} cannot be read: {error.strerror}"
        return f"; {self.log} ends with:\n{end}" if end else f"; {self.log} is empty"

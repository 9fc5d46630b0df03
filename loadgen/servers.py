"""A server as a child process: started on a free port, waited for, watched, and always ended.

`supervisor` ends the server, even if this process is killed.

Knows: command lines, and the pages that show a server's state, /ready and /health. Knows nothing of
the requests to it, nor of what it is compared with.
"""

import json
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
_STOP_S = 30.0  # seconds from SIGTERM to SIGKILL
_SPARE_S = 5.0
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_TAIL_BYTES = 3000


class Server:
    """One server, which runs while this object's context is open. It is in a session of its own, so
    that Ctrl-C in a terminal does not reach it directly: it gets SIGTERM when the context ends,
    after all requests in flight."""

    def __init__(self, name: str, command: str, log: Path) -> None:
        """Choose a free port and prepare the command.

        name: the name of the server in messages.
        command: the command line. `{port}` in it stands for the port; without it `--host` and
            `--port` are appended.
        log: the file to which the server's output is written.
        Raises ConfigError if the command cannot be parsed.
        """
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
        """The URL of the server, without a path."""
        return f"http://{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """The id of the server's first process, which is also that of its process group."""
        return self._pid

    def __enter__(self) -> Self:
        """Start the server. Raises ConfigError if there is no such program, or its log cannot be
        written."""
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
        """Wait until the supervisor has started the command, and return the time of `clock` at
        which it did, and the process id. Raises ConfigError if it could not be started."""
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
        finally:  # this runs also if a second Ctrl-C ends the wait
            self._process.terminate()
            self._process.wait()

    def wait_ready(self, patience_s: float) -> float:
        """Wait until the server is ready, and return the seconds from its start until then.

        It is ready when /ready answers 200, or /health if there is no /ready. Raises ServerError if
        the server ends before that, or is not ready after `patience_s` seconds.
        """
        while True:
            self.check()
            status, _ = self._get("/ready")
            if status == 404:
                status, _ = self._get("/health")
            waited_s = clock() - self._started_s
            if status == 200:
                return waited_s
            if waited_s > patience_s:
                raise ServerError(f"{self.name} is not ready after {waited_s:.0f} s{self._tail()}")
            time.sleep(_POLL_S)

    def wait_whole(self, patience_s: float) -> None:
        """Wait until a server that is ready has captured all its graphs, if its /ready says that
        some are missing, as minisrv's does. Raises ServerError if the server ends before that, or
        some are missing after `patience_s` seconds."""
        until_s = clock() + patience_s
        while (missing := self._missing_graphs()) > 0:
            self.check()
            if clock() > until_s:
                raise ServerError(f"{self.name} still lacks {missing} graphs{self._tail()}")
            time.sleep(_POLL_S)

    def _missing_graphs(self) -> int:
        """Return the number of graphs that are still to be captured; 0 if the server does not say
        so."""
        _, body = self._get("/ready")
        try:
            return int(json.loads(body)["graphs"]["missing"])
        except (ValueError, TypeError, LookupError):
            return 0

    def check(self) -> None:
        """Raise ServerError if the server has ended."""
        if (status := self._process.poll()) is not None:
            raise ServerError(f"{self.name} ended with status {status}{self._tail()}")

    def _get(self, path: str) -> tuple[int, bytes]:
        """Return the HTTP status and the body of a GET for `path`; 0 if the server does not
        answer."""
        connection = HTTPConnection(_HOST, self._port, timeout=_PAGE_TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _tail(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                end = log.read().decode(errors="replace").rstrip()
        except OSError as error:  # in a long run the temporary directory may have been cleared
            return f"; {self.log} cannot be read: {error.strerror}"
        return f"; {self.log} ends with:\n{end}" if end else f"; {self.log} is empty"

"""A real `minisrv serve`: its processes, its sockets and its log.

Knows: how to start it on a free port, to wait for it, to see its process group in /proc, to send
it requests, and to end it whatever state it is in.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.waiting import GUARD_SECONDS

SMALL = (
    *("--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "64"),
    *("--max-model-len", "512"),
)
"""Few and small graphs, so that a server starts in seconds."""

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

_READY = re.compile(r"ready in .* (https?://\S+)/v1")


def until(condition: Callable[[], Any], what: str, seconds: float = GUARD_SECONDS) -> Any:
    """Wait for `condition` to be true and return its value; behind the guard, AssertionError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def events_of(text: str) -> list[Any]:
    """The data of server-sent events. The last must be [DONE]; it is left out."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1:] == ["[DONE]"], text[-500:]
    return [json.loads(item) for item in data[:-1]]


def by_mode(graph_steps: dict[str, int]) -> dict[str, int]:
    """Steps by mode, whatever the reason: on a GPU it is "cheaper" now and then."""
    found: Counter[str] = Counter()
    for key, steps in graph_steps.items():
        found[key.partition("/")[0]] += steps
    return dict(found)


def request_bytes(
    path: str,
    body: bytes | dict[str, Any],
    *headers: str,
    method: str = "POST",
    kind: str | None = "application/json",
) -> bytes:
    """An HTTP request, as bytes to be cut, repeated or sent as they are.

    kind: its content type; None declares none.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: localhost",
        *headers,
        f"content-length: {len(content)}",
    ]
    if kind is not None:
        lines.append(f"content-type: {kind}")
    return "\r\n".join((*lines, "\r\n")).encode() + content


def read_all(connection: socket.socket) -> bytes:
    """Everything that comes until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class Server:
    """`minisrv serve FLAGS`, in a process group of its own and with its own temporary files."""

    def __init__(
        self,
        *flags: str,
        temporary: str = "tmp",
        before: str = "",
        program: tuple[str, ...] = ("-m", "minisrv.cli"),
        directory: Path | None = None,
    ) -> None:
        """Start it; it chooses its port unless the flags name one.

        temporary: the name of its directory for temporary files.
        before: Python for the process that is started, to run before anything else.
        program: what Python runs where there is nothing to run before.
        directory: where it is started; None is where the tests are.
        """
        # NOTE: not pytest's directory, whose long names do not fit a socket's path.
        self._directory = TemporaryDirectory(prefix="e2e-")
        self._temporary = Path(self._directory.name, temporary)
        self._temporary.mkdir()
        self._log = Path(self._directory.name, "log")
        self._url: str | None = None
        run = f"{before}\nimport sys; from minisrv.cli import main; sys.exit(main())"
        started = ("-c", run) if before else program
        command = [sys.executable, *started, "serve", *flags]
        if "--port" in flags:
            self._url = f"http://127.0.0.1:{flags[flags.index('--port') + 1]}"
        else:
            command += ["--port", "0"]
        env = os.environ | {"TMPDIR": str(self._temporary)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, cwd=directory, start_new_session=True
            )
        self._threads = ThreadPoolExecutor(max_workers=256)

    @property
    def pid(self) -> int:
        """The process that was started: the launcher."""
        return self.process.pid

    @property
    def sockets(self) -> list[Path]:
        """Those that its processes speak over."""
        return [path for path in self._temporary.rglob("*") if path.is_socket()]

    @property
    def log(self) -> str:
        """What all its processes have printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where it serves; if it chose the port itself, known once it is ready."""
        assert self._url is not None, "wait_ready first"
        return self._url

    def wait_ready(self) -> Server:
        """Wait until it serves requests."""

        def ready() -> re.Match[str] | None:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log}"
            return _READY.search(self.log)

        self._url = until(ready, "ready")[1]
        assert self.get("/ready").status_code == 200
        return self

    # ---- processes ---------------------------------------------------------------------------

    def group(self) -> set[int]:
        """The processes of its group that are alive."""
        found = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
        return {pid for pid in found if _group_of(pid) == self.pid}

    def named(self, name: str) -> set[int]:
        """The processes of its group that are called so; none before they say it themselves."""
        return {pid for pid in self.group() if _read(f"/proc/{pid}/comm").strip() == name.encode()}

    def engine_pid(self) -> int:
        (pid,) = self.named("minisrv-engine")
        return pid

    def worker_pid(self, index: int = 0) -> int:
        (pid,) = self.named(f"minisrv-api-{index}")
        return pid

    def worker_of(self, connection: socket.socket) -> int:
        """The process that has accepted a connection, which has been answered."""
        ports = [f":{port:04X}" for _, port in (connection.getpeername(), connection.getsockname())]
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        (inode,) = [line[9] for line in lines if [line[1][8:], line[2][8:]] == ports]
        for pid in self.group():
            for file in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(file) == f"socket:[{inode}]":
                    return pid
        raise AssertionError("no process has it")

    def socket_dirs(self) -> list[Path]:
        """The directories of engine sockets that exist."""
        return list(self._temporary.glob("minisrv-*"))

    def send(self, signum: signal.Signals, *, to_group: bool = False) -> None:
        """Signal the process that was started, or as a terminal does, all of them."""
        (os.killpg if to_group else os.kill)(self.pid, signum)

    def wait(self, seconds: float = GUARD_SECONDS) -> int:
        """Wait for its end; returns the exit status."""
        return self.process.wait(seconds)

    def assert_nothing_left(self) -> None:
        """No process of its group and no socket directory is left, or very soon will be."""
        until(lambda: not self.group(), "no process left")
        assert self.socket_dirs() == []

    def stop(self) -> None:
        """End all of it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()
        for pid in self.group():
            os.kill(pid, signal.SIGKILL)
        self._threads.shutdown()
        self._directory.cleanup()

    # ---- requests ----------------------------------------------------------------------------

    def connect(self, *, buffer: int | None = None) -> socket.socket:
        """A connection for bytes of the test's choice.

        buffer: of what is received; a small one is full as soon as nobody reads.
        """
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection.settimeout(60)
        connection.connect((host, int(port)))
        return connection

    def get(self, path: str) -> httpx.Response:
        with _http() as http:
            return http.get(self.url + path)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a body and read all of the answer, streamed or not."""
        with _http() as http:
            return http.post(self.url + path, json=body)

    def post_all(self, path: str, bodies: Iterable[dict[str, Any]]) -> list[Future[httpx.Response]]:
        """Send all bodies at once, each on a thread of its own."""
        return [self._threads.submit(self.post, path, **body) for body in bodies]

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The answer to a completion, greedy unless the fields say otherwise."""
        response = self.post(COMPLETIONS, **{"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def metrics(self) -> dict[str, float]:
        """Every series, by its name and labels."""
        lines = self.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("minisrv:"): float(value) for name, _, value in pairs}


def _http() -> httpx.Client:
    """A client for one request. A pool that threads share may close a connection as idle that it
    has just given to one of them, whose answer is then lost."""
    return httpx.Client(timeout=60, verify=False, trust_env=False)


def _group_of(pid: int) -> int | None:
    """The process group of a process that is alive."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[2]) if fields and fields[0] not in b"ZX" else None


def _read(path: str) -> bytes:
    """A file of /proc; empty if its process is gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""

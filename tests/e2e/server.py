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
"""Flags for few and small graphs, so that a server starts in seconds."""

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

_READY = re.compile(r"ready in .* (https?://\S+)/v1")


def until(condition: Callable[[], Any], what: str, seconds: float = GUARD_SECONDS) -> Any:
    """Wait for `condition` to be true and return its value; after `seconds` raise
    AssertionError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def events_of(text: str) -> list[Any]:
    """The JSON data of all server-sent events in `text` but the last, which must be [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1:] == ["[DONE]"], text[-500:]
    return [json.loads(item) for item in data[:-1]]


def by_mode(graph_steps: dict[str, int]) -> dict[str, int]:
    """Steps by mode, added up over the reasons: on a GPU the reason is "cheaper" now and then."""
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
    """An HTTP request as bytes, which a test cuts, repeats or sends as they are.

    kind: its content type; None sends no content-type header.
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
    """Read everything that comes until the server closes the connection."""
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
        """Start the server; it chooses its port unless the flags name one.

        temporary: the name of its directory for temporary files.
        before: Python code that the started process runs before anything else.
        program: the arguments of Python that start the command, used if `before` is empty.
        directory: the working directory of the server; None is that of the tests.
        """
        # NOTE: not pytest's directory, whose long names do not fit into the path of a socket.
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
        """The Unix sockets over which the server's processes talk to each other."""
        return [path for path in self._temporary.rglob("*") if path.is_socket()]

    @property
    def log(self) -> str:
        """Everything that all its processes have printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def url(self) -> str:
        """The server's base URL; if the server chose its port itself, known once it is ready."""
        assert self._url is not None, "wait_ready first"
        return self._url

    def wait_ready(self) -> Server:
        """Wait until the server accepts requests."""

        def ready() -> re.Match[str] | None:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log}"
            return _READY.search(self.log)

        self._url = until(ready, "ready")[1]
        assert self.get("/ready").status_code == 200
        return self

    def wait_filled(self) -> Server:
        """Wait until all graphs serve."""
        until(lambda: self.get("/ready").json()["graphs"]["missing"] == 0, "all graphs")
        return self

    # ---- processes ---------------------------------------------------------------------------

    def group(self) -> set[int]:
        """The ids of the processes of its process group that are alive."""
        found = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
        return {pid for pid in found if _group_of(pid) == self.pid}

    def named(self, name: str) -> set[int]:
        """The processes of its group with this name; a process has its name only once it has set
        it."""
        return {pid for pid in self.group() if _read(f"/proc/{pid}/comm").strip() == name.encode()}

    def only(self, name: str) -> int:
        """The process id of the one process with this name. Until a child of that process, such as
        a compiler, runs its own program, it has the same name, so this waits for that."""
        found: set[int] = until(lambda: len(pids := self.named(name)) == 1 and pids, f"one {name}")
        return found.pop()

    def engine_pid(self) -> int:
        """The process id of the engine."""
        return self.only("minisrv-engine")

    def hold_engine(self) -> int:
        """Stop the engine while it loads, and wait until an API worker answers, as the engine may
        be ready before it otherwise. Returns the engine's process id, for SIGCONT. The server must
        have been started with a port."""

        def answers() -> bool:
            try:
                return self.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        engine = self.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        until(answers, "the port is open")
        return engine

    def worker_pid(self, index: int = 0) -> int:
        """The process id of the API worker with this index."""
        return self.only(f"minisrv-api-{index}")

    def worker_of(self, connection: socket.socket) -> int:
        """The process id of the API worker that accepted `connection`, on which an answer has
        come."""
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
        """Signal the launcher or, as a terminal does, all processes of its group."""
        (os.killpg if to_group else os.kill)(self.pid, signum)

    def wait(self, seconds: float = GUARD_SECONDS) -> int:
        """Wait for the launcher to end and return its exit status."""
        return self.process.wait(seconds)

    def assert_nothing_left(self) -> None:
        """Check that every process of the group ends soon and that no socket directory is left."""
        until(lambda: not self.group(), "no process left")
        assert self.socket_dirs() == []

    def stop(self) -> None:
        """End all processes of the server, whatever state they are in."""
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
        """Open a connection on which a test sends bytes of its own choice.

        buffer: the size of the receive buffer in bytes; a small one is full as soon as nobody
        reads.
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
        """Send a body as JSON and read all of the answer, streamed or not."""
        with _http() as http:
            return http.post(self.url + path, json=body)

    def post_all(self, path: str, bodies: Iterable[dict[str, Any]]) -> list[Future[httpx.Response]]:
        """Send all bodies at once, each on a thread of its own."""
        return [self._threads.submit(self.post, path, **body) for body in bodies]

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The answer to a completion, which is greedy unless the fields say otherwise."""
        response = self.post(COMPLETIONS, **{"prompt": prompt, "temperature": 0, **fields})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def metrics(self) -> dict[str, float]:
        """The value of every series of /metrics, by its name and labels."""
        lines = self.get("/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("minisrv:"): float(value) for name, _, value in pairs}


def _http() -> httpx.Client:
    """A client for one request. A connection pool that threads share may close a connection as idle
    that it has just handed to one of them, whose answer is then lost."""
    return httpx.Client(timeout=60, verify=False, trust_env=False)


def _group_of(pid: int) -> int | None:
    """The process group of a process, or None if the process is not alive."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[2]) if fields and fields[0] not in b"ZX" else None


def _read(path: str) -> bytes:
    """The contents of a file of /proc; empty if its process is gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""

"""`minisrv trace`: whole lines only, an end for every reason, and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minisrv.cli import main
from tests.e2e.server import until

HEADER = {"type": "header", "version": 1}
KEY = "secret"


def steps(*numbers: int) -> list[dict[str, object]]:
    return [{"type": "step", "id": number} for number in numbers]


class Handler(BaseHTTPRequestHandler):
    """Answers with lines, the last of which may be cut off, and then stays silent or ends."""

    lines: list[dict[str, object]]
    rest: bytes
    ends: bool
    status: int
    asked: list[tuple[str, str | None]]
    silent: threading.Event

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("authorization")))
        self.send_response(self.status)
        self.end_headers()
        if self.status != 200:
            self.wfile.write(json.dumps({"error": {"message": "No, because."}}).encode())
            return
        for line in self.lines:
            self.wfile.write(json.dumps(line).encode() + b"\n")
        self.wfile.write(self.rest)
        self.wfile.flush()
        if not self.ends:
            self.silent.wait()  # until the end of the test

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[tuple[str, str | None]]]]]:
    """A function that starts a server, and returns its address and what it is asked for."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread, threading.Event]] = []

    def start(
        lines: list[dict[str, object]], *, rest: bytes = b"", ends: bool = False, status: int = 200
    ) -> tuple[str, list[tuple[str, str | None]]]:
        asked: list[tuple[str, str | None]] = []
        silent = threading.Event()
        answers = {"lines": lines, "rest": rest, "ends": ends, "status": status}
        kind = type("Answers", (Handler,), {**answers, "asked": asked, "silent": silent})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread, silent))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread, silent in running:
        silent.set()
        server.shutdown()
        thread.join()
        server.server_close()


def recorded(file: Path) -> list[int]:
    """The ids of the steps in a file, whose lines must be whole."""
    text = file.read_text()
    assert text.endswith("\n")
    header, *lines = map(json.loads, text.splitlines())
    assert header == HEADER
    return [line["id"] for line in lines if line["type"] == "step"]


def test_as_many_steps_as_asked_for(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINISRV_API_KEY", KEY)
    url, asked = serve([HEADER, *steps(4, 5, 6, 7)])
    file = tmp_path / "out"
    assert main(["trace", str(file), "--url", f"{url}/v1", "--steps", "3", "--last", "9"]) == 0
    assert recorded(file) == [4, 5, 6]
    assert asked == [("/debug/steps?follow=true&limit=9", f"Bearer {KEY}")]
    assert "3 steps and 0 events written to" in capsys.readouterr().err


def test_as_long_as_asked_for(serve, tmp_path):
    """The server is silent behind half a line, which is left out."""
    url, _ = serve([HEADER, *steps(1, 2)], rest=b'{"type":"st')
    file = tmp_path / "out"
    assert main(["trace", str(file), "--url", url, "--seconds", "3"]) == 0
    assert recorded(file) == [1, 2]


def test_lines_can_be_read_while_they_come(serve, tmp_path):
    """So whatever ends the process leaves whole lines."""
    url, _ = serve([HEADER, *steps(1, 2)])
    file, seen = tmp_path / "out", threading.Event()

    def end_when_seen() -> None:
        until(lambda: file.exists() and file.read_bytes().count(b"\n") == 3, "lines", 20)
        seen.set()
        os.kill(os.getpid(), signal.SIGINT)

    reader = threading.Thread(target=end_when_seen)
    reader.start()
    assert main(["trace", str(file), "--url", url, "--seconds", "25"]) == 0
    reader.join()
    assert seen.is_set()


def test_what_is_no_trace_is_told(serve, tmp_path, capsys):
    url, _ = serve([["no", "trace"]])
    assert main(["trace", str(tmp_path / "out"), "--url", url]) == 1
    assert "is no trace of steps" in capsys.readouterr().err


def test_steps_that_were_missed_are_told(serve, tmp_path, capsys):
    gap = {"type": "event", "event": "gap", "from": 3, "to": 7}
    url, _ = serve([HEADER, *steps(1, 2), gap, *steps(8)])
    assert main(["trace", str(tmp_path / "out"), "--url", url, "--steps", "3"]) == 0
    told = capsys.readouterr().err
    assert "3 steps and 1 events" in told
    assert "5 steps came too fast to be read" in told


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ([{"type": "event", "event": "end", "reason": "it drains."}], "it drains."),
        ([], "the connection was lost."),
    ],
)
def test_a_server_that_ends(serve, tmp_path, capsys, last, reason):
    """What has come is kept, and the status says that it is not all."""
    url, _ = serve([HEADER, *steps(1, 2), *last], rest=b'{"typ', ends=True)
    file = tmp_path / "out"
    assert main(["trace", str(file), "--url", url]) == 1
    assert recorded(file) == [1, 2]
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "message"), [(401, "MINISRV_API_KEY"), (404, "No, because."), (503, "No, because.")]
)
def test_a_server_that_refuses(serve, tmp_path, capsys, status, message):
    url, _ = serve([], status=status)
    file = tmp_path / "out"
    assert main(["trace", str(file), "--url", url]) == 1
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_no_server_and_no_address(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "127.0.0.1:8000", "http://", "http://x:port"):
        assert main(["trace", str(tmp_path / "out"), "--url", url]) == 1
        assert f"--url {url}" in capsys.readouterr().err


def test_a_file_that_cannot_be_written(serve, tmp_path, capsys):
    url, _ = serve([HEADER])
    assert main(["trace", str(tmp_path / "no" / "out"), "--url", url]) == 1
    assert "cannot be written" in capsys.readouterr().err

"""A log that nobody reads blocks no process, and in JSON format every line of the log is an
object."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.e2e.server import COMPLETIONS, SMALL, Server, read_all, until

Start = Callable[..., Server]

BLOCKED = """
import fcntl, os
pipe = os.open({fifo!r}, os.O_RDWR)
os.write(pipe, b"\\n" * fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096))
os.dup2(pipe, 2)
"""
"""Code that gives a process a stderr that is full and that nobody reads."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_ready(server: Server) -> bool:
    assert server.process.poll() is None, server.log
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_nobody_reads_the_log(start: Start, tiny: Path, tmp_path: Path) -> None:
    """The server starts, serves and ends although its stderr is full, and later tells a reader how
    many lines are missing. A server that wrote each line at once would block on its first: the
    launcher before it had begun."""
    fifo = tmp_path / "stderr"
    os.mkfifo(fifo)
    port = str(free_port())
    flags = (*SMALL, "--log-format", "json", "--port", port)
    server = start(str(tiny), *flags, before=BLOCKED.format(fifo=str(fifo)))
    until(lambda: is_ready(server), "ready")
    assert server.complete("a b", max_tokens=2)["usage"]["completion_tokens"] <= 2

    # More lines than a process keeps in memory.
    headers = {"x-request-id": "x" * 128}
    with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as client:
        for _ in range(900):
            client.get("/nowhere/" + "x" * 120)
    assert is_ready(server)
    reader = os.open(fifo, os.O_RDONLY)
    read = b""
    while b'"dropped": ' not in read:
        read += os.read(reader, 1 << 16)
    lines = [json.loads(line) for line in read.rpartition(b"\n")[0].splitlines() if line]
    assert {"launcher", "api-0"} <= {line["process"] for line in lines}
    [missing] = [line for line in lines if "dropped" in line]
    assert 0 < missing["dropped"] < 900
    assert f"{missing['dropped']} lines of the log are missing here" in missing["message"]
    os.close(reader)

    # Again nobody reads, and that may block no process.
    for _ in range(20):
        server.get("/nowhere/" + "x" * 120)
    server.send(signal.SIGTERM)
    assert server.wait() == 0
    server.assert_nothing_left()


def test_every_line_is_an_object(start: Start, tiny: Path) -> None:
    """The line of a request, uvicorn's lines and those about a process that dies are JSON
    objects."""
    server = start(str(tiny), *SMALL, "--log-format", "json").wait_ready()
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        headers = {"x-request-id": "mine-7"}
        body = {"prompt": "my diary", "max_tokens": 3, "ignore_eos": True}
        assert client.post(COMPLETIONS, json=body, headers=headers).status_code == 200
    with server.connect() as connection:
        connection.sendall(b"no HTTP at all\r\n\r\n")
        assert b"400" in read_all(connection).partition(b"\r\n")[0]
    os.kill(server.engine_pid(), signal.SIGKILL)
    until(lambda: server.get("/health").status_code == 503, "it is seen")
    server.send(signal.SIGTERM)
    assert server.wait() == 1

    lines = [json.loads(line) for line in server.log.splitlines()]
    assert {line["process"] for line in lines} >= {"launcher", "api-0"}
    loggers = {line["logger"] for line in lines}
    assert {"uvicorn.error", "minisrv.engine.client"} <= loggers
    [line] = [line for line in lines if line.get("request_id") == "mine-7"]
    assert (line["logger"], line["status"]) == ("minisrv.access", 200)
    assert line["completion_tokens"] == 3
    assert "diary" not in server.log


def test_the_last_line_of_one_that_cannot_start_is_an_object(start: Start, tmp_path: Path) -> None:
    """A server that cannot start says why in a last line that is a JSON object too."""
    server = start(str(tmp_path / "nothing"), "--log-format", "json")
    assert server.wait() == 1
    last = json.loads(server.log.splitlines()[-1])
    assert last["level"] == "error"
    assert "nothing" in last["message"]

"""Log lines as text and as JSON, with the id of the request, whatever code writes them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minisrv import logs
from tests.waiting import GUARD_SECONDS

Log = Callable[[str, Callable[[], None]], list[str]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Log]:
    """A function that configures logging for a format as a process does, calls `write`, and returns
    the lines."""
    root, factory = logging.getLogger(), logging.getLogRecordFactory()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(logs, "LAST_SECONDS", GUARD_SECONDS)

    def log(format: str, write: Callable[[], None]) -> list[str]:
        monkeypatch.setenv(logs.VARIABLE, format)
        logs.flush()
        capfd.readouterr()  # what tests before this one have logged
        logs.configure("api-0")
        write()
        logs.flush()
        return capfd.readouterr().err.splitlines()

    yield log
    root.handlers[:], root.level = handlers, level
    logging.setLogRecordFactory(factory)


def write_some() -> None:
    logging.getLogger("minisrv.a").info("it is %d", 3, extra={"fields": {"status": 200, "ms": 1.5}})
    token = logs.REQUEST_ID.set("req-1")
    try:
        raise ValueError("broken\nline")
    except ValueError:
        logging.getLogger("b").exception("failed")
    finally:
        logs.REQUEST_ID.reset(token)


def test_text(log: Log) -> None:
    first, second, *rest = log("text", write_some)
    assert first.endswith("INFO api-0: it is 3 status=200 ms=1.5")
    assert second.endswith("ERROR api-0: failed request=req-1")
    assert rest[0].startswith("Traceback")


def test_what_the_message_says_has_fields_in_json_alone(log: Log) -> None:
    def write() -> None:
        logging.getLogger("minisrv.a").info("3 reqs", extra={"json_fields": {"running": 3}})

    (text,) = log("text", write)
    assert text.endswith("INFO api-0: 3 reqs")
    (line,) = log("json", write)
    assert json.loads(line)["running"] == 3


def test_json(log: Log) -> None:
    first, second = map(json.loads, log("json", write_some))
    assert first.pop("time")
    assert first == {
        "level": "info",
        "process": "api-0",
        "logger": "minisrv.a",
        "message": "it is 3",
        "status": 200,
        "ms": 1.5,
    }
    assert second["request_id"] == "req-1"
    assert "broken\nline" in second["exception"]


def test_a_line_is_made_where_it_is_logged(log: Log) -> None:
    """The message is formatted when it is logged: its arguments may change before it is written,
    and are not kept until then."""
    values = [1]

    def write() -> None:
        logging.getLogger("minisrv.a").info("%s", values)
        values.append(2)

    (line,) = log("json", write)
    assert json.loads(line)["message"] == "[1]"


WAYS = """
import asyncio, gc, logging, sys, threading, traceback, warnings
from minisrv import logs

logs.LAST_SECONDS = 60.0  # a busy machine may take longer than a second to write the last lines

class Bad:
    def __del__(self):
        raise ValueError("unraisable")

def fail():
    raise ValueError("in a thread")

async def lose():
    async def fail():
        raise ValueError("in a task")
    asyncio.create_task(fail())
    await asyncio.sleep(0.001)
    gc.collect()

def write():
    print("printed\\nas two lines", file=sys.stderr)
    print("a bar\\r", end="", file=sys.stderr)
    warnings.warn("a warning")
    try:
        fail()
    except ValueError:
        traceback.print_exc()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Bad()
    asyncio.run(lose())
    logging.getLogger("minisrv").error("%d", "no number")
    print("no end", end="", file=sys.stderr)
    raise ValueError("of the process")
"""

MAIN = """
from minisrv import logs
from minisrv.processes import ChildProcess
from ways import write

if __name__ == "__main__":
    logs.configure()
    logs.take_stderr()
    child = ChildProcess("child", write, private_dir="/nonexistent/private")
    assert child.wait() == 1
    write()
"""


@pytest.mark.parametrize("format", ["json", "text"])
def test_whatever_python_says_goes_one_way(tmp_path: Path, format: str) -> None:
    """All output of Python goes through the log, in the process that a user starts and in a child.
    In JSON format every line is an object."""
    (tmp_path / "ways.py").write_text(WAYS)
    path = tmp_path / "main.py"
    path.write_text(MAIN)
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {logs.VARIABLE: format},
        timeout=GUARD_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    said = ("as two lines", "a bar", "a warning", "unraisable", "in a thread", "in a task")
    said += ("no number", "of the process", "no end")
    if format == "text":
        assert all(done.stderr.count(words) >= 2 for words in said)
        return
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    for process in ("launcher", "child"):
        text = json.dumps([line for line in lines if line["process"] == process])
        assert all(words in text for words in said), process
    uncaught = [line for line in lines if "of the process" in line.get("exception", "")]
    assert {line["process"] for line in uncaught} == {"launcher", "child"}

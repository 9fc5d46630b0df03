"""The thread that writes a log: no caller waits for it, and lines that could not be written are
counted."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from minisrv.log_writer import LogWriter
from tests.waiting import GUARD_SECONDS

LINE = "{:04d} " + "x" * 90 + "\n"
CAPACITY = 20 * len(LINE.format(0))

LOGGING = "import logging, os, sys; from minisrv import logs; logs.configure('p')\n"


def notice(count: int) -> str:
    return f"{count} missing\n"


class Pipe:
    """A full pipe of one page, so that the next write to it blocks."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        size = fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(self.writer, b"\n" * size)

    def close(self) -> None:
        for end in (self.reader, self.writer):
            with suppress(OSError):
                os.close(end)

    def words(self, until: str) -> list[str]:
        """Read until `until` is the word at the end of a line, and return all words."""
        read = ""
        while not read.endswith(until + "\n"):
            read += os.read(self.reader, 1 << 16).decode()
        return read.split()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def numbers(words: list[str]) -> list[int]:
    return [int(word) for word in words if word.isdecimal()]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_nobody_reads(pipe: Pipe, blocking: bool) -> None:
    """Fails by hanging if `put` waits. Another process may have made the pipe non-blocking."""
    os.set_blocking(pipe.writer, blocking)
    writer = LogWriter(pipe.writer, notice, CAPACITY)
    for number in range(100):
        writer.put(LINE.format(number))
    writer.flush(0.01)  # It returns although nothing is written.
    *words, missing, _ = pipe.words(until="missing")
    kept = numbers(words)
    # The oldest lines are there, whole and in order, and behind them the number of those that are
    # missing.
    assert kept == list(range(len(kept)))
    assert 20 <= len(kept) < 100
    assert int(missing) == 100 - len(kept)
    assert {len(word) for word in words} == {4, 90}
    for number in (200, 201):
        writer.put(LINE.format(number))
    writer.flush(GUARD_SECONDS)
    assert numbers(os.read(pipe.reader, 1 << 16).decode().split()) == [200, 201]


def test_a_disk_that_is_full_and_gets_room(tmp_path: Path) -> None:
    target = os.open("/dev/full", os.O_WRONLY)
    writer = LogWriter(target, notice)
    for number in range(3):
        writer.put(LINE.format(number))
        writer.flush(GUARD_SECONDS)
    room = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(room, target)
    writer.put(LINE.format(3))  # A new line makes the writer try again.
    writer.flush(GUARD_SECONDS)
    writer.put(LINE.format(4))
    writer.flush(GUARD_SECONDS)
    assert (tmp_path / "log").read_text() == notice(4) + LINE.format(4)
    for fd in (target, room):
        os.close(fd)


def test_a_reader_that_has_gone(pipe: Pipe) -> None:
    os.close(pipe.reader)
    writer = LogWriter(pipe.writer, notice)
    for number in range(3):
        writer.put(LINE.format(number))
    writer.flush(GUARD_SECONDS)


def run(program: str, prepare: Callable[[], None] | None = None, stderr: int = -1) -> int:
    return subprocess.run(
        [sys.executable, "-c", LOGGING + program],
        stderr=stderr,
        preexec_fn=prepare,
        timeout=GUARD_SECONDS,
        check=False,
    ).returncode


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_process_ends_with_its_status_though_nobody_reads(pipe: Pipe, kind: str) -> None:
    program = """
logs.take_stderr()
from minisrv.progress import StartupProgress
StartupProgress()('loading', 1, 2)
print('x' * 9999, file=sys.stderr)
sys.exit(7)
"""
    if kind == "pipe":
        assert run(program, stderr=pipe.writer) == 7
        return
    master, terminal = os.openpty()
    os.set_blocking(terminal, False)
    with suppress(BlockingIOError):
        while os.write(terminal, b"x" * 4096):
            pass
    os.set_blocking(terminal, True)
    assert run(program, stderr=terminal) == 7
    for fd in (master, terminal):
        os.close(fd)


def test_a_fork_logs_though_a_line_is_being_written(pipe: Pipe) -> None:
    """A forked child can log: it has no writing thread, and any lock may have been held at the
    fork. From Python 3.12 on the parent warns of its threads then, which is a line of the log as
    well: it would wait for ever for the pipe otherwise."""
    program = """
logs.take_stderr()
for number in range(3): logging.error('x' * 9999)
with logs._writer._changed:
    child = os.fork()
    if child == 0:
        logging.error('a line of the child')
        os._exit(3)
    print('use of fork() may lead to deadlocks in the child', file=sys.stderr)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program, stderr=pipe.writer) == 3


def test_a_closed_stderr_is_no_other_file(tmp_path: Path) -> None:
    """With stderr closed nothing is logged: the next file that is opened gets its descriptor, and
    log lines must not go there."""
    path = str(tmp_path / "file")
    program = f"file = open({path!r}, 'w'); logging.error('lost'); logs.flush()"
    assert run(program, lambda: os.close(2)) == 0
    assert (tmp_path / "file").read_text() == ""

"""The way to stderr: a bounded queue, and a thread that writes what is in it.

Nobody waits for whoever reads stderr, be it a pipe, a terminal or a disk. What does not fit into
the queue is dropped and counted, and as soon as something can be written again a line tells how
much is missing, at the place where it is missing. The thread holds no lock while it writes, and is
a daemon, so that a process can end whatever its stderr does.

Knows: file descriptors, threads, and what happens to both in a fork. Knows nothing of how a line
looks.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

CAPACITY = 256 << 10
"""Bytes that wait at most, in a process: about two thousand lines."""


class LogWriter:
    """Writes text to a file descriptor, in the order in which it came."""

    def __init__(self, fd: int, notice: Callable[[int], str], capacity: int = CAPACITY) -> None:
        """The thread starts with the first text.

        notice: what to write where so many texts are missing.
        capacity: bytes that may wait.
        """
        self._fd = fd
        self._notice = notice
        self._capacity = capacity
        self._torn = False
        """The last write has failed within a text."""
        self.reset()

    def reset(self) -> None:
        """Begin anew in a process that has been forked: it has no thread, the lock may be held by
        one that it does not have, and what waits is the parent's to write."""
        # Reentrant: a collection of garbage may log while a text is being added.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._retry = False
        """Something has come since a write has failed."""
        self._writing = False
        self._thread: threading.Thread | None = None

    def put(self, text: str) -> None:
        """Have the text written, or count it. Never waits for the descriptor."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            # Once something is missing all is, until the queue is empty: so it is one gap.
            if self._dropped or self._size + len(data) > self._capacity:
                self._dropped += 1
            else:
                self._waiting.append(data)
                self._size += len(data)
            self._retry = True
            if self._thread is None:
                self._start()
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until everything has been written or dropped, but no longer than that."""
        deadline = time.monotonic() + seconds
        with suppress(KeyboardInterrupt), self._changed:
            while (self._writing or self._has_work()) and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        # Signals are for the main thread, which would not wake for one that came here.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            # Without room for a thread the text waits, and the next one tries again.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _has_work(self) -> bool:
        return bool(self._waiting) or (self._dropped > 0 and self._retry)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                while not self._has_work():
                    self._changed.wait()
                self._writing = True
                data, count = self._take()
            if not self._write(data):
                with self._changed:
                    self._dropped += count

    def _take(self) -> tuple[bytes, int]:
        """What is to be written next, and how many texts are missing without it."""
        if not self._waiting:
            count, self._dropped, self._retry = self._dropped, 0, False
            return self._notice(count).encode(), count
        taken = [self._waiting.popleft()]
        size = len(taken[0])
        # Several at once, as after each write a busy thread may keep the interpreter for 5 ms; no
        # more than what the kernel writes to a pipe without another process's lines in between.
        while self._waiting and size + len(self._waiting[0]) <= select.PIPE_BUF:
            taken.append(self._waiting.popleft())
            size += len(taken[-1])
        self._size -= size
        return b"".join(taken), len(taken)

    def _write(self, data: bytes) -> bool:
        """Write all of it, however long that takes; False if it cannot be written: nobody will
        ever read, or the disk is full."""
        rest = memoryview(b"\n" + data if self._torn else data)
        begun = False
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
                begun = True
            except BlockingIOError:  # another process that has the same file has made it so
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                self._torn |= begun
                return False
        self._torn = False
        return True

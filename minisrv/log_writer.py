"""Writes log lines to stderr through a bounded queue and a thread that empties it.

No code that logs ever waits for stderr to be read, be it a pipe, a terminal or a disk. Text that
does not fit into the queue is dropped and counted, and as soon as something can be written again a
line says how many are missing, at the place where they are missing. The thread holds no lock while
it writes, and is a daemon, so that the process can end even if its stderr blocks.

Knows: file descriptors, threads, and what happens to both in a fork. Knows nothing of the format of
a line.
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
"""Maximum number of bytes that wait in the queue of a process: about two thousand lines."""


class LogWriter:
    """Writes texts to a file descriptor, in the order in which they were put."""

    def __init__(self, fd: int, notice: Callable[[int], str], capacity: int = CAPACITY) -> None:
        """Make a writer, whose thread starts with the first text.

        fd: the file descriptor to which texts are written.
        notice: returns the text to write in the place of the given number of missing texts.
        capacity: maximum number of bytes that may wait.
        """
        self._fd = fd
        self._notice = notice
        self._capacity = capacity
        self._torn = False
        """Whether the last write failed in the middle of a text."""
        self.reset()

    def reset(self) -> None:
        """Begin anew in a process that has been forked: it does not have the thread, the lock may
        be held by a thread that it does not have, and the parent writes the texts that wait."""
        # The lock is reentrant, as a garbage collection may log while a text is being added.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._retry = False
        """Whether a text was put since the notice of missing texts was last tried to be written;
        only then is it tried again."""
        self._writing = False
        self._thread: threading.Thread | None = None

    def put(self, text: str) -> None:
        """Queue the text to be written, or count it as missing. Never waits for the descriptor."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            # After one dropped text all are dropped until the queue is empty, so that the missing
            # ones are together in one gap.
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
        """Wait until everything has been written or dropped, for at most that many seconds."""
        deadline = time.monotonic() + seconds
        with suppress(KeyboardInterrupt), self._changed:
            while (self._writing or self._has_work()) and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        # The main thread handles signals, and would not wake for one that this thread received.
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            # If the system has no room for a thread, the text waits and the next put tries again.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)

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
        """Return the bytes to write next, and how many texts are missing if they are not
        written."""
        if not self._waiting:
            count, self._dropped, self._retry = self._dropped, 0, False
            return self._notice(count).encode(), count
        taken = [self._waiting.popleft()]
        size = len(taken[0])
        # Several texts are written at once, as after each write a busy thread may hold the
        # interpreter lock for 5 ms; but no more than the kernel writes to a pipe atomically, with
        # no lines of another process in between.
        while self._waiting and size + len(self._waiting[0]) <= select.PIPE_BUF:
            taken.append(self._waiting.popleft())
            size += len(taken[-1])
        self._size -= size
        return b"".join(taken), len(taken)

    def _write(self, data: bytes) -> bool:
        """Write all of `data`, however long that takes. Returns False if it cannot be written, as
        the reader has closed its end or the disk is full."""
        rest = memoryview(b"\n" + data if self._torn else data)
        begun = False
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
                begun = True
            except BlockingIOError:  # another process with the same file has made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                self._torn |= begun
                return False
        self._torn = False
        return True

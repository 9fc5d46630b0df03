"""A heartbeat that costs nothing: the time of a loop's last iteration, in a mapped file.

A process that hangs, is stopped, or waits for a device that hangs keeps its sockets open and
accepts messages; the only sign is that nothing more is done. The loop writes one number in each
iteration, and whoever watches it reads the number at any time. For work that has no loop a thread
writes it, which shows less: that the process runs, and that nothing holds the interpreter.

Knows: a file. Knows nothing of what the loop or the work does.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minisrv.processes import map_shared

_SIZE = struct.calcsize("d")


class Heartbeat:
    """One end of a heartbeat, the writer's or the reader's. Creating either one is a beat.

    path: the file; it is created if it does not exist.

    Raises ConfigError if the file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._map = map_shared(path, _SIZE)
        self._time = memoryview(self._map).cast("d")  # written and read as one unit
        self.beat()

    def beat(self) -> None:
        """Record that the loop has begun another iteration."""
        self._time[0] = time.monotonic()  # the clock is the same for every process

    @contextmanager
    def beating(self, seconds: float) -> Iterator[None]:
        """Let a thread beat at this interval, in seconds, whatever the caller does meanwhile."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(seconds):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @property
    def age(self) -> float:
        """Number of seconds since the last beat."""
        return max(0.0, time.monotonic() - self._time[0])

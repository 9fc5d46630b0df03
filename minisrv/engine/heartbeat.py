"""A sign of life that costs nothing: the time at which a loop last came round, in a mapped file.

A process that hangs, is stopped, or waits for a device that hangs keeps its sockets open and takes
messages; only that nothing more is done tells. The loop writes one number each time round, and who
watches reads it whenever it likes. Work that has no loop leaves that to a thread, which tells less:
that the process runs, and that nothing holds the interpreter.

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
    """One end of it. To make either is a beat.

    path: of the file; made if it is not there.
    Raises ConfigError where it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._map = map_shared(path, _SIZE)
        self._time = memoryview(self._map).cast("d")  # written and read as one
        self.beat()

    def beat(self) -> None:
        """The loop has come round."""
        self._time[0] = time.monotonic()  # the machine's, the same for every process

    @contextmanager
    def beating(self, seconds: float) -> Iterator[None]:
        """Let a thread beat so often, whatever the caller does meanwhile."""
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
        """Seconds since the last beat."""
        return max(0.0, time.monotonic() - self._time[0])

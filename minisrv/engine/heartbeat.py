"""A sign of life that costs nothing: the time at which a loop last came round, in a mapped file.

A process that hangs, is stopped, or waits for a device that hangs keeps its sockets open and takes
messages; only that nothing more is done tells. The loop writes one number each time round, and who
watches reads it whenever it likes.

Knows: a file. Knows nothing of what the loop does.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

_SIZE = struct.calcsize("d")


class Heartbeat:
    """One end of it. Both may exist before the first beat.

    path: of the file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_SIZE)
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._time = memoryview(self._map).cast("d")  # written and read as one

    def beat(self) -> None:
        """The loop has come round."""
        self._time[0] = time.monotonic()  # the machine's, the same for every process

    @property
    def age(self) -> float:
        """Seconds since the last beat; 0 before the first."""
        last = self._time[0]
        return max(0.0, time.monotonic() - last) if last else 0.0

"""The progress of a start-up, and the time that each of its phases has taken.

Progress is a bar on a terminal, and a log line for each phase elsewhere.

Knows: clocks, bars and logging. Knows nothing of what is being done in a phase.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class StartupClock:
    """Measures the seconds of each phase of a start-up, in the order of the phases.

    A phase is all the time since the end of the one before it, so that the phases add up to the
    whole and no time belongs to none.

    began: the time at which the first phase began, on the clock of `time.monotonic`, which is the
        same for all processes of the machine; None for now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._last = time.monotonic() if began is None else began
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """End a phase. If the name has been used before, the time is added to it."""
        now = time.monotonic()
        self._add(phase, now - self._last)
        self._last = now

    def include(self, seconds: Mapping[str, float]) -> None:
        """Add phases that another process has gone through since the last phase here ended.

        seconds: the length of each phase by its name.
        """
        for phase, length in seconds.items():
            self._add(phase, length)
            self._last += length

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class StartupProgress:
    """Shows the progress of a start-up. Calls have the name of the phase, the number of its parts
    that are done, and the number of all."""

    def __init__(self) -> None:
        self._phase = ""
        self._bar: tqdm[Any] | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            if sys.stderr.isatty():
                self._bar = tqdm(total=total, desc=phase, leave=False)
            else:
                logger.info("%s", phase)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

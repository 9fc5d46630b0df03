"""How far a start-up is, for whoever waits for it, and how long its phases have taken.

A bar on a terminal, a line for each phase elsewhere. Knows nothing of what is being done.
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
    """Seconds of a start-up by phase, in the order of the phases.

    A phase is all that has passed since the one before it ended: phases add up to the whole, and no
    time is without a name.

    began: when the first phase began, by `time.monotonic`, which is the machine's, the same for
        every process; None for now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._last = time.monotonic() if began is None else began
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """End a phase. One that has been there before gets longer."""
        now = time.monotonic()
        self._add(phase, now - self._last)
        self._last = now

    def include(self, seconds: Mapping[str, float]) -> None:
        """Take phases that another process has gone through since the last one here ended."""
        for phase, length in seconds.items():
            self._add(phase, length)
            self._last += length

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class StartupProgress:
    """Call it with a phase, how much of it is done, and of how much."""

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
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

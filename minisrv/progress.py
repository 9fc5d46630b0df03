"""How far a start-up is, for whoever waits for it.

A bar on a terminal, a line for each phase elsewhere. Knows nothing of what is being done.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


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

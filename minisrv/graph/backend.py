"""What a graph backend has to do, and no more.

A capture is one or several *segments*: whatever runs between `begin` and `end` is recorded. The
segments of one capture see each other's intermediates; so does their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Replay = Callable[[], None]


class GraphBackend(Protocol):
    """Records segments and gives back functions that replay them at the same addresses."""

    def begin(self) -> None:
        """Start to record a segment; the first one since `finish` starts a capture."""

    def end(self) -> Replay:
        """Stop recording. The function may be called once `finish` has been."""

    def finish(self) -> None:
        """The capture is complete: lay out its memory, which later captures may share."""

    def abandon(self) -> None:
        """An error ended the capture: stop recording and forget it."""

    def memory_used(self) -> int:
        """Bytes in use where graphs take theirs; the growth behind a capture is its own."""

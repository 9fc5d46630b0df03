"""The interface of a graph backend.

A capture consists of one or several *segments*: everything that runs between `begin` and `end` is
recorded. The segments of one capture see each other's intermediate tensors, and share memory for
them. A segment may end, and the next one begin, within an operation, which is then in neither.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

Replay = Callable[[], None]


class GraphBackend(Protocol):
    """Records segments and returns functions that replay them at the same addresses."""

    def begin(self) -> None:
        """Start to record a segment; the first one after `finish` starts a capture."""

    def end(self) -> Replay:
        """Stop recording and return a function that replays the segment. It may be called once
        `finish` has been called."""

    def finish(self) -> None:
        """Complete the capture: lay out its memory, which later captures may share."""

    def abandon(self) -> None:
        """Stop recording and forget the capture, which an error has ended."""

    def interrupted(self, between: Callable[[], None]) -> AbstractContextManager[None]:
        """Return a context in which `between` is called between the operations of each capture and
        each replay, if the host runs these one by one. It may replay graphs of other backends."""

    def memory_used(self) -> int:
        """Return the number of bytes in use where graphs allocate their memory. Its growth during a
        capture is what the new graph takes."""

    def intermediates(self) -> Tensor | None:
        """Return the memory that all graphs share for their intermediates, which must be set aside
        where a replay is interrupted between two segments and another graph is replayed; None if
        it cannot be had, and a replay may not be interrupted so."""

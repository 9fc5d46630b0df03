"""An event loop whose time is computed: it stands still while anything is to be done, and jumps to
the next timer when nothing is.

Client and server run on one such loop and talk through real sockets, so that delays are exactly
what a script says, however busy the machine is.
"""

import asyncio
import selectors
from typing import Any

_ON_ITS_WAY_S = 0.005
"""Seconds, of real time, for which the loop waits for bytes that one of its sockets may have sent
to another. Over the loopback interface they arrive within the call that sends them."""
_READING_S = 1e-6
"""Seconds by which each reading of the clock moves it, so that a wait that reads it again and again
ends."""


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now_s = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now_s

    def clock(self) -> float:
        """The function to use in place of `records.clock`."""
        self.now_s += _READING_S
        return self.now_s


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        ready = super().select(None if timeout is None else _ON_ITS_WAY_S)
        if not ready and timeout is not None:
            self._loop.now_s += timeout
        return ready

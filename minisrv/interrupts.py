"""Makes Ctrl-C wait for the end of a step, or of the trial of a graph.

A KeyboardInterrupt in the middle of a step breaks the engine. In compiled code it is not even seen
as one: torch makes a RuntimeError of whatever is raised below it, which looks like a fault of that
code.

Knows: SIGINT. Knows nothing of steps or graphs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Within the block raise the KeyboardInterrupt of a Ctrl-C only where the function that is
    yielded is called, or at its end; that of a second one at once. Nothing is changed in a thread
    that gets no signals, nor where the program handles SIGINT in a way of its own."""
    is_pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal is_pressed
        if is_pressed:
            raise KeyboardInterrupt
        is_pressed = True

    def check() -> None:
        if is_pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()

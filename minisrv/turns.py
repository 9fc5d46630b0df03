"""Runs a function in turns with its caller, so that a long computation makes way for shorter ones.

The function runs in a thread of its own and says where it may be interrupted. One of the two
threads always waits for the other, so nothing runs at the same time and nothing needs a lock; the
thread is only a second stack. It has the context variables of its caller, as many threads for an
operation and, on a GPU, its stream.

Knows: threads. Knows nothing of what is computed, nor of when it is time to make way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextvars import copy_context
from threading import Semaphore, Thread
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

MakeWay = Callable[[], None]
"""Function that a computation calls to let its caller run; it returns when it is the computation's
turn again."""


class _ClosedError(BaseException):
    """The caller has no further turn for the function, which is left as if by an interruption."""


def in_turns(function: Callable[[MakeWay], T]) -> Generator[None, None, T]:
    """Run a function, yield each time that it makes way, and return its result or raise its error.
    When the generator is closed, the function is left by an exception that is no `Exception`.

    function: the function; it is given what it calls to make way, from its own thread only.
    """
    turns: _Turns[T] = _Turns(function)
    try:
        while not turns.take():
            yield
    finally:
        turns.close()
    return turns.result()


class _Turns(Generic[T]):
    """The two threads, seen from the caller's."""

    def __init__(self, function: Callable[[MakeWay], T]) -> None:
        self._function = function
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._num_threads = torch.get_num_threads()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._closed = False
        self._own, self._callers = Semaphore(0), Semaphore(0)
        # Should the process end while it waits, nothing waits for it.
        self._thread = Thread(
            target=copy_context().run, args=(self._run,), name="minisrv-turns", daemon=True
        )
        self._thread.start()

    def take(self) -> bool:
        """Let the function run until it makes way or ends, and return whether it has ended."""
        self._own.release()
        self._callers.acquire()
        return self._ended

    def close(self) -> None:
        """End the function if it has not ended. When the process ends there is nothing to do: no
        other thread gets a turn any more, and to wait for one would be for ever."""
        if sys.is_finalizing():
            return
        self._closed = True
        while not self._ended:
            self.take()
        self._thread.join()

    def result(self) -> T:
        """Return the result of the function, which has ended, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]

    @property
    def _ended(self) -> bool:
        return bool(self._results) or self._error is not None

    def _run(self) -> None:
        self._own.acquire()
        # OpenMP's number is one of each thread. It would be that of the cores until torch runs a
        # large operation of its own, also for oneDNN, compiled code and the kernels in C.
        torch.set_num_threads(self._num_threads)
        try:
            with torch.cuda.stream(self._stream):
                self._results.append(self._function(self._make_way))
        except BaseException as error:
            self._error = error
        self._callers.release()

    def _make_way(self) -> None:
        self._callers.release()
        self._own.acquire()
        if self._closed:
            raise _ClosedError

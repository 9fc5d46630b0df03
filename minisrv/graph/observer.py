"""Observers: code that counts launches, takes times or simulates a cost is told how a step goes.

Nothing in the step is replaced for them: the step loop and the runner call whoever is in the
runner's list of observers. In service it holds the trace of steps, or nobody, and costs hardly
anything.

Knows: the parts of a step, and what an observer is told. Knows nothing of who observes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from minisrv.core.step import SchedulerOutput
from minisrv.modes import GraphKey


class StepPart(enum.StrEnum):
    """The parts of a step on the host."""

    SCHEDULE = "schedule"
    """The requests of the next step are chosen."""
    DISPATCH = "dispatch"
    """The graphs that run it are chosen."""
    FILL = "fill"
    """The inputs are written to their buffers."""
    LAUNCH = "launch"
    """A stage is launched: the model, or the epilogue with sampling."""
    RESULT = "result"
    """The copy of the tokens to the host is started."""
    WAIT = "wait"
    """The host waits for the tokens."""
    UPDATE = "update"
    """The tokens are given to their requests."""
    REST = "rest"
    """Everything between these parts."""


class StepObserver:
    """An observer of steps. Each method does nothing unless it is overridden.

    is_told_of_trials: whether it is also told of the stages that run on no request's behalf while
        requests are served, so that a graph is certified.
    """

    is_told_of_trials = False

    def lap(self, part: StepPart) -> None:
        """Called at the end of each part of a step; the part began at the call before this one."""

    def stage(self, key: GraphKey, output: SchedulerOutput) -> AbstractContextManager[None] | None:
        """Return a context in which a stage of a step is launched, or None if none is needed.

        key: the mode in which the stage runs, and its padded shape.
        output: the step.
        """
        return None

    def replay(self, num_launches: int) -> AbstractContextManager[None] | None:
        """Return a context in which a graph is replayed, or None if none is needed.

        num_launches: the number of launches from the host that the replay consists of.
        """
        return None

    def piece(self) -> None:
        """Called between two pieces of a model: behind each attention op that is not part of a FULL
        graph, and where a capture in pieces breaks."""

    def swapped(self) -> None:
        """Called when other code has taken over the model, with graphs of its own."""


def entered(contexts: Iterable[AbstractContextManager[None]]) -> ExitStack:
    """Enter all contexts, and return a context that leaves them in reverse order. If one cannot be
    entered, those before it are left."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()


@contextmanager
def observing(observers: list[StepObserver], observer: StepObserver) -> Iterator[None]:
    """Add an observer to `observers` for the block. Its contexts enclose those of the others, so
    that a timer also sees the time that another observer makes a stage take."""
    observers.insert(0, observer)
    try:
        yield
    finally:
        observers.remove(observer)

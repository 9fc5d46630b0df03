"""Observers: the contexts in which a stage runs, and what is left of them when one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from minisrv.graph.observer import StepObserver, entered, observing


@contextmanager
def noted(name: str, events: list[str]) -> Iterator[None]:
    events.append(f"enter {name}")
    try:
        yield
    finally:
        events.append(f"leave {name}")


@contextmanager
def failing() -> Iterator[None]:
    raise ValueError("this observer fails")
    yield


def test_contexts_are_left_in_reverse_order():
    events: list[str] = []
    with entered([noted("a", events), noted("b", events)]):
        events.append("run")
    assert events == ["enter a", "enter b", "run", "leave b", "leave a"]


def test_an_observer_that_fails_leaves_no_other_entered():
    """A counter's context replaces what torch dispatches to. It once stayed entered, as long as the
    error was kept, when the context of a second observer could not be entered."""
    events: list[str] = []
    with pytest.raises(ValueError, match="this observer fails") as kept:
        entered([noted("a", events), failing()])
    assert events == ["enter a", "leave a"]
    assert kept.value


def test_an_observer_of_a_block_encloses_those_of_the_engine():
    """A timer that is added for a block has to see the time for which another observer waits."""
    lasting, added = StepObserver(), StepObserver()
    observers = [lasting]
    with observing(observers, added):
        assert observers == [added, lasting]
    assert observers == [lasting]

"""Work between the steps of requests: in turns of some milliseconds, one work at a time.

Whatever makes a server faster while it serves (the rest of its ladder, compiled code) does so here.
A turn is offered after each step, or at once in an idle engine, and the work makes way for the next
step when the turn is over, at the next point where it can. A work that is in the middle of
something keeps the turns until it has finished that, because there is one set of buffers, request
indices and blocks for trials.

Knows: when a turn begins and ends, and whose it is. Knows nothing of what is done in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

from minisrv.turns import MakeWay, in_turns

T = TypeVar("T")

TURN = 0.005
"""Number of seconds after which a turn of the work makes way for the steps of requests, at the next
point where it can: between two layers of the model, between two operations of a tape, or behind a
graph of a GPU, which nothing interrupts."""

LEAST_GAP = 0.02
"""Minimum number of seconds between two turns while requests run."""

REST = 4.0
"""How many times as long as a turn the steps of requests run behind it, at least."""

LONGEST = 3
"""Number of the longest turns that are told."""

UNNAMED = "unnamed work"
"""The part of a turn in which a work has not said what it does."""

Work = Generator[bool, None, None]
"""Work that yields at the end of each turn, and says whether another work may have the next one."""


class LongTurn(NamedTuple):
    """A turn that has made requests wait: for how long, and the part of it that took longest."""

    seconds: float
    part: str


class Turn:
    """The turn of a work; see `certification.generation.Turn`.

    ends: the time at which it is over.
    waits: whether the last one ended because there was nothing to do.
    spare_blocks: see `certification.generation.Turn`.
    longest_part: what took longest of it, when it has ended.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ends = math.inf
        self.waits = False
        self.spare_blocks = 0
        self.longest_part = self._part = UNNAMED
        self._part_began = self._longest = 0.0
        self._clock = clock
        self._make_way: MakeWay | None = None

    def begin(self, ends: float) -> None:
        """Begin a turn, which goes on with the part that the last one was left in.

        ends: the time at which it is over.
        """
        self.ends, self._part_began = ends, self._clock()
        self.longest_part, self._longest = self._part, 0.0

    def begin_part(self, part: str) -> None:
        """See `certification.generation.Turn`."""
        now = self._clock()
        took = now - self._part_began
        if took > self._longest:
            self.longest_part, self._longest = self._part, took
        self._part, self._part_began = part, now

    def end(self) -> None:
        """End the turn."""
        self.begin_part(self._part)

    @property
    def is_over(self) -> bool:
        """See `certification.generation.Turn`."""
        return self._clock() >= self.ends

    def make_way(self) -> None:
        """See `certification.generation.Turn`."""
        assert self._make_way is not None, "only a function that runs in turns makes way"
        self._make_way()

    def wait(self) -> None:
        """See `certification.generation.Turn`."""
        self.waits = True
        self.make_way()

    def offer(self) -> None:
        """Make way if the turn is over."""
        if self.is_over:
            self.make_way()

    def take(self, function: Callable[[], T]) -> Generator[bool, None, T]:
        """Run a function that makes way by this object, and yield each time that it does. No other
        work may have a turn before it returns."""

        def run(make_way: MakeWay) -> T:
            self._make_way = make_way
            return function()

        turns = in_turns(run)
        try:
            while True:
                try:
                    next(turns)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                yield False
        finally:
            turns.close()
            self._make_way = None


class Background:
    """The works of one engine. All methods must be called from the thread that runs steps.

    turn: the turn that the works share.
    busy: whether requests run, or wait for a verification, whose steps wait for the turn that began
        last.
    longest_turns: the longest of the turns that have made requests wait, each with another part,
        beginning with the longest.
    idle_turn: the duration of the last turn if none ran; 0 if requests ran, or it is counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.turn = Turn(clock)
        self.busy = False
        self.longest_turns: list[LongTurn] = []
        self.idle_turn = 0.0
        self._clock = clock
        self._works: list[Work] = []
        self._unfinished: Work | None = None
        self._next_turn = 0.0

    def add(self, work: Work, *, first: bool = False) -> None:
        """Add a work. It has a turn where those that were added before it wait.

        first: whether it goes before these.
        """
        self._works.insert(0 if first else len(self._works), work)

    @property
    def has_work(self) -> bool:
        """Whether an idle engine should call `advance` at once, and not only now and then."""
        return bool(self._works) and not self.turn.waits

    @property
    def is_in_the_middle(self) -> bool:
        """Whether a work keeps the turns until it has finished something."""
        return self._unfinished is not None

    def advance(self, *, busy: bool, running: int = 0) -> None:
        """Give a work a turn, if there is one and it is time for it. To be called between steps.

        busy: whether requests run, whose steps must not wait often.
        running: the number of requests that hold blocks, each of which may need one more.
        """
        began = self._clock()
        self.idle_turn = 0.0
        if not self._works or (busy and began < self._next_turn):
            return
        self.busy = busy or running > 0
        self.turn.spare_blocks = running
        self.go_on(began + TURN)
        ended = self._clock()
        took = ended - began
        self._next_turn = ended + max(LEAST_GAP, REST * took)
        self.idle_turn = took
        if busy:
            self.count_turn()

    def count_turn(self) -> None:
        """Count the last turn as one that has made requests wait."""
        turn = LongTurn(self.idle_turn, self.turn.longest_part)
        found: dict[str, LongTurn] = {}
        for one in sorted([*self.longest_turns, turn], reverse=True):
            found.setdefault(one.part, one)
        self.longest_turns = list(found.values())[:LONGEST]
        self.idle_turn = 0.0

    @property
    def longest_turn(self) -> float:
        """The longest time in seconds for which a turn has made requests wait."""
        return self.longest_turns[0].seconds if self.longest_turns else 0.0

    def describe_longest(self) -> str:
        """Return in words what the longest turns did; an empty text if requests waited for none."""
        turns = (f"{1000 * turn.seconds:.0f} ms ({turn.part})" for turn in self.longest_turns)
        return ", ".join(turns)

    def go_on(self, ends: float) -> None:
        """Go on with a work until it makes way, which it does after the time `ends`. If it waits
        for something or ends, the next one has the turn."""
        self.turn.begin(ends)
        for work in sorted(self._works, key=lambda work: work is not self._unfinished):
            if work is not self._unfinished:
                self.turn.begin_part(UNNAMED)
            self.turn.waits = False
            self._unfinished = None
            try:
                if not next(work):
                    self._unfinished = work
            except StopIteration:
                self._works.remove(work)
                continue  # or nobody would know whether the others wait
            if self._unfinished or not self.turn.waits:
                break
        self.turn.end()

    def close(self) -> None:
        """End all works where they are."""
        while self._works:
            self._works.pop().close()
        self._unfinished = None

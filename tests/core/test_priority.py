"""A less important request comes to its end, however many more important requests keep coming."""

from __future__ import annotations

import math
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.core.budget import PrefillBudget
from minisrv.core.kv_cache import BlockPool
from minisrv.core.scheduler import MAX_OVERTAKES, Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.request import EngineRequest, SamplingParams

BLOCK = 4


class Flow:
    """A scheduler for which every sampled token is 2, with a record of how often each request was
    passed over or preempted.

    order: names of the requests in the order of their first admission.
    passed: for each request, how many that came later were first admitted before it.
    older: for each request, how many requests were there when it came.
    """

    def __init__(
        self,
        blocks: int,
        *,
        seqs: int,
        budget: int = 16,
        steps_ahead: int = 0,
        caching: bool = True,
    ) -> None:
        self.scheduler = Scheduler(
            BlockPool(blocks, BLOCK),
            PrefillBudget(budget),
            max_num_seqs=seqs,
            max_model_len=160,
            max_waiting=1000,
            enable_prefix_caching=caching,
        )
        self.steps_ahead = steps_ahead
        self.order: list[str] = []
        self.passed: Counter[str] = Counter()
        self.older: dict[str, int] = {}
        self.preempted: Counter[str] = Counter()
        self.ended: set[str] = set()
        self._in_flight: deque[SchedulerOutput] = deque()
        self._names = 0

    def add(self, priority: int, length: int = 3, most: int = 4) -> str:
        self._names += 1
        name = str(self._names)
        self.older[name] = len(self.older) - len(self.ended)
        params = SamplingParams(max_tokens=most)
        prompt = [self._names] * length  # No prompt is a prefix of another request's prompt.
        request = EngineRequest(
            request_id=name, prompt_token_ids=prompt, params=params, priority=priority
        )
        self.scheduler.add(request, seed=0)
        return name

    def step(self) -> None:
        running = {request.request_id for request in self.scheduler.running}
        while (
            len(self._in_flight) <= self.steps_ahead
            and (step := self.scheduler.schedule()) is not None
        ):
            self._in_flight.append(step)
            for row in step.rows:
                if row.request_id not in self.order:
                    self.order.append(row.request_id)
                    unserved = self.older.keys() - set(self.order)
                    self.passed.update(n for n in unserved if int(n) < int(row.request_id))
        waiting = {request.request_id for request in self.scheduler.waiting}
        self.preempted.update(running & waiting)
        step = self._in_flight.popleft()
        for output in self.scheduler.update(step.step_id, [[2]] * len(step.rows)):
            if output.finish_reason is not None:
                self.ended.add(output.request_id)
        self.scheduler.check_integrity()


@settings(max_examples=60)
@given(
    starved=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=4),
    seqs=st.integers(1, 4),
    blocks=st.integers(14, 30),
    steps_ahead=st.integers(0, 1),
    length=st.integers(1, 20),
    draw=st.randoms(use_true_random=False),
)
def test_nobody_is_passed_over_for_ever(starved, seqs, blocks, steps_ahead, length, draw):
    """Less important requests end although each new request is more important than all before it
    and some always wait; the number of times that each is passed over is bounded."""
    flow = Flow(blocks, seqs=seqs, steps_ahead=steps_ahead)
    arrivals = deque(sorted(starved))
    names: list[str] = []
    for clock in range(1500):
        while arrivals and arrivals[0][0] <= clock:
            names.append(flow.add(arrivals.popleft()[1], length, most=20))
        while len(flow.scheduler.waiting) < 3:
            flow.add(-clock - 1, draw.randint(1, 12), draw.randint(1, 12))
        flow.step()
        if not arrivals and flow.ended >= set(names):
            break
    assert flow.ended >= set(names)
    for name, times in flow.passed.items():
        assert times <= MAX_OVERTAKES * (flow.older[name] + 1)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_nobody_is_preempted_for_ever(steps_ahead):
    """A request ends although, whenever it runs, a more important one takes what is free of the
    cache and so preempts it. The more important ones never wait, so none of them is admitted before
    it: only the count of preemptions can help it."""
    flow = Flow(blocks=40, seqs=2, budget=200, steps_ahead=steps_ahead)
    name = flow.add(0, length=4, most=120)
    flow.step()
    for _ in range(1000):
        pool, scheduler = flow.scheduler.block_pool, flow.scheduler
        if len(scheduler.running) < 2 and not scheduler.waiting and pool.num_free > 2:
            flow.add(-1, length=(pool.num_free - 2) * BLOCK, most=12)
        flow.step()
        if name in flow.ended:
            break
    assert name in flow.ended
    assert flow.preempted[name] == MAX_OVERTAKES
    assert not flow.passed[name]


def test_most_requests_go_by_priority():
    """One admission in eight goes to the oldest request, whatever its priority; the others go to
    the most important."""
    flow = Flow(blocks=40, seqs=1)
    for _ in range(40):
        flow.add(5, most=1)
    for _ in range(40):
        flow.add(-5, most=1)
    while len(flow.order) < 40:
        flow.step()
    order = [int(name) for name in flow.order]
    assert [name for name in order if name <= 40] == [1, 2, 3, 4]
    assert [name for name in order if name > 40] == list(range(41, 77))


@settings(max_examples=40)
@given(
    seqs=st.integers(1, 4),
    blocks=st.integers(10, 20),
    steps_ahead=st.integers(0, 1),
    sizes=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 16)), min_size=1, max_size=20),
)
def test_among_equals_nobody_has_a_turn(seqs, blocks, steps_ahead, sizes):
    """Requests of equal priority are served first come, first served, however often the cache is
    full."""
    flow = Flow(blocks, seqs=seqs, steps_ahead=steps_ahead)
    names = [flow.add(0, length, most) for length, most in sizes]
    while flow.scheduler.has_work:
        flow.step()
        live = [*flow.scheduler.running, *flow.scheduler.waiting]
        assert all(request.priority == 0 for request in live)
        assert [int(request.request_id) for request in live] == sorted(
            int(request.request_id) for request in live
        )
    assert flow.order == names


def test_one_whose_turn_has_come_is_before_all_that_have_had_none():
    """A request that was passed over so often that its turn came keeps its place while it runs:
    more important requests are preempted before it."""
    flow = Flow(blocks=13, seqs=3, budget=64)
    for _ in range(MAX_OVERTAKES):
        flow.add(-1, most=1)
    name = flow.add(0, length=12, most=20)
    while name not in flow.order:
        flow.add(-1, length=12, most=20)
        flow.step()
    [promoted] = [each for each in flow.scheduler.running if each.request_id == name]
    assert promoted.priority == -math.inf
    while name not in flow.ended:
        flow.add(-1, length=12, most=20)
        flow.step()
    assert flow.scheduler.num_preemptions >= 1
    assert not flow.preempted[name]

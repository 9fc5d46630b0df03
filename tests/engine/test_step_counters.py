"""The engine says when a request came and when it had its first step, once for each request."""

from __future__ import annotations

from bisect import bisect_left

from minisrv.core.attention_work import NO_WORK
from minisrv.core.batch_counts import BatchCounter, rounded_size
from minisrv.core.budget import PrefillBudget
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.dispatcher import Dispatch
from minisrv.core.kv_cache import BlockPool
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import ScheduledRow, SchedulerOutput
from minisrv.engine.messages import SizeCount
from minisrv.engine.step_counters import TOKEN_BOUNDS, StepCounters
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Reason
from minisrv.request import EngineOutput, EngineRequest, SamplingParams
from minisrv.runner.results import DeviceTime


class Counted:
    """A scheduler whose steps and outputs are counted as the engine counts them."""

    def __init__(self, max_num_seqs: int, num_blocks: int = 60) -> None:
        self.scheduler = Scheduler(
            BlockPool(num_blocks, 4),
            PrefillBudget(8),
            max_num_seqs=max_num_seqs,
            max_model_len=100,
            max_waiting=10,
        )
        self.counters = StepCounters(BatchCounter(), CostModel(), self.scheduler.budget)

    def add(self, name: str, num_prompt: int, max_tokens: int, *, asks: bool = False) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        prompt = [1] * num_prompt
        request = EngineRequest(
            request_id=name, prompt_token_ids=prompt, params=params, include_graph_stats=asks
        )
        self.scheduler.add(request, 0)
        self.counters.open(request)

    def step(self) -> list[EngineOutput]:
        step = self.scheduler.schedule()
        assert step is not None
        self.counters.count(step, dispatch_of(step), generation=0)
        outputs = self.scheduler.update(step.step_id, [[2]] * step.num_rows)
        self.counters.count_outputs(outputs)
        return outputs

    def run(self) -> dict[str, list[EngineOutput]]:
        """Run to the end, and return the outputs by request."""
        found: dict[str, list[EngineOutput]] = {}
        while self.scheduler.has_work:
            for output in self.step():
                found.setdefault(output.request_id, []).append(output)
        return found


def dispatch_of(step: SchedulerOutput) -> Dispatch:
    """As a ladder with the sizes 4 and 16 would."""
    size = 4 if step.num_tokens <= 4 else 16
    descriptor = BatchDescriptor(size, query_len=step.query_len)
    return Dispatch(CUDAGraphMode.PIECEWISE, descriptor, Reason.HAS_PREFILL)


def test_the_first_output_has_the_times_and_no_other() -> None:
    """The second request waits until the first has ended; its prompt takes several steps, and the
    time is that of the first of them."""
    counted = Counted(max_num_seqs=1)
    counted.add("a", 3, 4)
    counted.add("b", 30, 3)
    a, b = counted.run().values()
    assert all(output.scheduled_at == output.queued_at == 0 for output in (*a[1:], *b[1:]))
    assert a[0].queued_at < b[0].queued_at < a[0].scheduled_at < b[0].scheduled_at
    assert [len(a), len(b)] == [4, 3]


def test_a_preempted_request_keeps_its_first_times() -> None:
    counted = Counted(max_num_seqs=2, num_blocks=9)
    counted.add("a", 8, 20)
    counted.add("b", 8, 20)
    found = counted.run()
    assert counted.scheduler.num_preemptions
    assert [sum(bool(output.scheduled_at) for output in each) for each in found.values()] == [1, 1]


def test_a_request_that_never_ran_leaves_nothing() -> None:
    counted = Counted(max_num_seqs=1)
    counted.add("a", 3, 4)
    counted.step()
    counted.add("b", 3, 4)
    output = counted.scheduler.abort("b")
    assert output is not None
    counted.counters.count_outputs([output])
    assert output.scheduled_at == 0
    assert output.graph_steps == {}
    counted.run()
    assert not counted.counters._open
    assert not counted.counters._begun


def test_a_request_that_asks_is_told_of_the_same_times() -> None:
    counted = Counted(max_num_seqs=1)
    counted.add("a", 3, 4)
    counted.add("b", 3, 3, asks=True)
    a, b = counted.run().values()
    assert a[-1].graph_stats is None
    stats = b[-1].graph_stats
    assert stats is not None
    assert stats.queue_ms == round(1000 * (b[0].scheduled_at - b[0].queued_at), 3)
    assert counted.counters._num_courses == 0


def test_steps_are_counted_by_size_and_by_their_tokens() -> None:
    counted = Counted(max_num_seqs=1)
    counted.add("a", 11, 3)  # prompt steps of 8 and 3 tokens, then two that decode
    counted.run()
    stats = counted.counters.stats()
    assert sorted(stats.sizes, key=lambda count: (count.kind, count.size)) == [
        SizeCount("decode", 4, 2, 6),
        SizeCount("mixed", 4, 1, 1),
        SizeCount("mixed", 16, 1, 8),
    ]
    tokens = stats.tokens_of_steps
    counts = dict(zip((*tokens.bounds, None), tokens.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {1: 2, 8: 2}
    assert tokens.total == 13
    assert stats.generated_tokens == 3


def test_no_size_is_rounded_over_the_bound_of_a_bucket() -> None:
    """The numbers of tokens of steps are told by the sizes of their batches, which are rounded."""
    for size in range(1, 2 * TOKEN_BOUNDS[-1]):
        bucket = bisect_left(TOKEN_BOUNDS, size)
        assert bisect_left(TOKEN_BOUNDS, rounded_size(size)) == bucket


def test_a_step_that_a_clock_is_too_coarse_for_is_counted_and_teaches_nothing() -> None:
    """The error of its predicted time was once a division by zero, which ended the engine."""
    budget = PrefillBudget(8, itl_target_ms=100.0)
    key = CUDAGraphMode.PIECEWISE, BatchDescriptor(4)
    counters = StepCounters(BatchCounter(), CostModel([StepSample(key, NO_WORK, 3.0)]), budget)
    for index, (busy_ms, compared) in enumerate([(0.0, 0), (6.0, 1)]):
        row = ScheduledRow("a", 1, index, 1, [5], False, True, None)
        step = SchedulerOutput(index, index, [row], [], [], num_decodes=0, num_tokens=1)
        dispatch = Dispatch(*key, Reason.HAS_PREFILL)
        counters.count(step, dispatch, generation=0)
        taken = DeviceTime(busy_ms, None)
        counters.retire(step, dispatch, None, taken, had_work_throughout=False)
        assert sum(counters.stats().step_time_errors.counts) == compared
    assert sum(count.steps for count in counters.stats().steps) == 2

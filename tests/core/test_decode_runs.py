"""A scheduler that continues decode runs gives the same steps, outputs, request indices and blocks
as one that schedules every step anew."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import msgspec
import pytest

from minisrv.core.attention_work import AttentionWork
from minisrv.core.batch_counts import BatchCounter
from minisrv.core.budget import PrefillBudget
from minisrv.core.cost_model import CostModel
from minisrv.core.dispatcher import Dispatch
from minisrv.core.kv_cache import BlockPool
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.engine.step_counters import StepCounters
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Reason
from minisrv.request import EngineOutput, EngineRequest, SamplingParams

EOS = 7


class Anew(Scheduler):
    """A scheduler that never continues a run of decode steps: it schedules every step anew."""

    def _continue_run(self) -> SchedulerOutput | None:
        return None


def state_of(scheduler: Scheduler) -> Any:
    """Return all that the next step depends on, with the counters of the current run added to the
    requests that they stand for."""
    run = scheduler._run
    steps, in_flight = (run.step_index, run.step_index - run.num_retired_steps) if run else (0, 0)
    requests = []
    for request in [*scheduler.running, *scheduler.waiting, *scheduler._retiring]:
        in_run = run is not None and request in run.requests
        requests.append(
            (
                request.request_id,
                request.req_index,
                list(request.blocks),
                list(request.output_token_ids),
                request.num_computed_tokens + in_run * steps,
                request.last_step_id + in_run * steps,
                request.num_cached_blocks,
                # Nobody reads this counter of a request that has ended.
                None if request.is_finished else request.num_in_flight + in_run * in_flight,
            )
        )
    pool = scheduler.block_pool
    free = list(scheduler.req_indices._free), list(pool._free), pool._block_of
    return requests, free, scheduler.num_preemptions, scheduler.prefix_cache_hits


def step_of(step: SchedulerOutput | None) -> Any:
    if step is None:
        return None
    numbers = step.step_id, step.num_decodes, step.num_tokens, step.needs_logits
    return step.rows, step.new_reqs, step.new_blocks, numbers


class Both:
    """A scheduler that continues runs beside one that does not, both given the same requests; it
    also counts each request's steps one by one, to check `StepCounters`."""

    def __init__(self, draw: random.Random) -> None:
        seqs, size = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 4))
        blocks = draw.randint(24, 60) // size + 2
        budget = PrefillBudget(
            seqs + draw.choice((0, 1, 7, 40)),
            sizes=(4, 8, 16),
            predict_ms=lambda num_tokens, work: num_tokens + 0.1 * work.prefill_pairs,
            itl_target_ms=draw.choice((1, 8, 100)),
        )
        caching = draw.random() < 0.7
        self.with_runs, self.anew = (
            kind(
                BlockPool(blocks, size),
                budget,
                max_num_seqs=seqs,
                max_model_len=30,
                max_waiting=1000,
                eos_token_ids=[EOS],
                enable_prefix_caching=caching,
            )
            for kind in (Scheduler, Anew)
        )
        self.draw = draw
        self.limit = min(24, self.with_runs.block_pool.capacity)
        self.in_flight: deque[tuple[SchedulerOutput, list[list[int]]]] = deque()
        self.counted = StepCounters(BatchCounter(), CostModel(), budget)
        self.ran: dict[str, Counter[str]] = {}
        self.continued = 0

    def add(self, name: str) -> None:
        draw = self.draw
        prompt = [draw.choice((1, 1, 2))] * draw.randint(1, self.limit // 2)
        params = SamplingParams(
            max_tokens=draw.choice((1, 2, 3, self.limit // 2, self.limit - len(prompt))),
            ignore_eos=draw.random() < 0.7,
            logprobs=draw.choice((None, None, None, 0, 2)),
        )
        priority = draw.choice((0, 0, 0, -1, 1))
        request = EngineRequest(
            request_id=name, prompt_token_ids=prompt, params=params, priority=priority
        )
        for scheduler in (self.with_runs, self.anew):
            scheduler.add(request, 0)
        self.counted.open(request)
        self.ran[name] = Counter()

    def abort(self, name: str) -> None:
        event = self.with_runs.abort(name)
        assert event == self.anew.abort(name)
        if event is not None:
            self.close(name)
        self.compare()

    def schedule(self) -> bool:
        step, expected = self.with_runs.schedule(), self.anew.schedule()
        assert step_of(step) == step_of(expected)
        if step is None:
            return False
        sent = msgspec.msgpack.encode(step)
        assert msgspec.msgpack.decode(sent, type=SchedulerOutput) == step, "a step is plain data"
        self.continued += step.position_offset > 0
        assert step.work == AttentionWork.of(step.rows)
        reason = self.draw.choice((Reason.PURE_DECODE, Reason.CHEAPER))
        dispatch = Dispatch(CUDAGraphMode.FULL, BatchDescriptor(step.num_tokens), reason)
        self.counted.count(step, dispatch, generation=0)
        key = f"FULL/{reason.value}"
        for row in step.rows:
            if row.request_id in self.ran:
                self.ran[row.request_id][key] += 1
        tokens = [[self.draw.choice((1, 1, 1, 1, 2, 2, EOS))] for _ in step.rows]
        self.in_flight.append((step, tokens))
        self.compare()
        return True

    def retire(self) -> None:
        step, tokens = self.in_flight.popleft()
        outputs = self.with_runs.update(step.step_id, tokens)
        assert outputs == self.anew.update(step.step_id, tokens)
        for output in outputs:
            if output.finish_reason is not None:
                self.close(output.request_id)
        self.compare()

    def close(self, name: str) -> None:
        last = EngineOutput(name)
        self.counted.close(last)
        assert last.graph_steps == self.ran.pop(name)

    def compare(self) -> None:
        self.with_runs.check_integrity()
        assert state_of(self.with_runs) == state_of(self.anew)
        assert self.with_runs.has_room == self.anew.has_room


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_run_is_what_thinking_anew_gives(steps_ahead: int) -> None:
    """Both schedulers agree through arrivals, aborts at every moment, stops, preemption and prefix
    cache hits, also with blocks of one token."""
    continued = preemptions = hits = 0
    for seed in range(150):
        draw = random.Random(seed)
        both = Both(draw)
        number, rate, aborts = 0, draw.choice((0.05, 0.2, 0.6)), draw.choice((0, 0.02, 0.2))
        while number < 16 or both.with_runs.has_work or both.in_flight:
            while number < 16 and draw.random() < rate:
                both.add(str(number))
                number += 1
            # The aborted request may be waiting, running, ended or newly added.
            if number and draw.random() < aborts:
                both.abort(str(draw.randrange(number)))
            while len(both.in_flight) <= steps_ahead and both.schedule():
                if draw.random() < aborts:
                    both.abort(str(draw.randrange(number)))
            if both.in_flight:
                both.retire()
        assert both.with_runs.block_pool.num_used == both.with_runs.req_indices.num_used == 0
        continued += both.continued
        preemptions += both.with_runs.num_preemptions
        hits += both.with_runs.prefix_cache_hits
    assert continued > 1000
    assert preemptions > 20
    assert hits > 100

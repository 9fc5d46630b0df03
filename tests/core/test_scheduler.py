"""The scheduler against a simulated device that remembers which request wrote which cache entry,
with and without a step launched ahead."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.core.budget import PrefillBudget
from minisrv.core.kv_cache import BlockPool
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import ScheduledRow, SchedulerOutput
from minisrv.errors import QueueFullError
from minisrv.request import EngineRequest, FinishReason, SamplingParams

BLOCK = 4
EOS = 7
LIMIT = 50


@cache
def sampled(seed: int, tokens: tuple[int, ...]) -> int:
    """Return the token that the simulated model gives behind `tokens`. It depends on all of them,
    so one wrong cache entry changes what follows. There are few different tokens, so that blocks
    repeat."""
    return random.Random(f"{seed}/{tokens}").choice((1, 1, 1, 2, 2, 2, EOS))


def continued(prompt: Sequence[int], seed: int) -> tuple[int, ...]:
    """Return a prompt and what the simulated model continues it with, up to the end of the context
    and two tokens beyond."""
    tokens = tuple(prompt)
    while len(tokens) < LIMIT + 2:
        tokens += (sampled(seed, tokens),)
    return tokens


@dataclass(frozen=True)
class Told:
    """All that the device knows of a request: its tokens, and the seed and the cache salt that say
    with which requests it may share cache entries."""

    tokens: tuple[int, ...]
    seed: int
    salt: str | None


@dataclass
class Device:
    """A simulated device that runs steps in order. An entry of its cache is made of the token and
    the entry before it, as a real model's is; each row must find the entries of its own tokens both
    before and after its step."""

    told: dict[str, Told] = field(default_factory=dict)
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    cache: dict[tuple[int, int], tuple[str | None, tuple[int, ...]]] = field(default_factory=dict)
    last_token: dict[int, int] = field(default_factory=dict)

    def run(self, step: SchedulerOutput) -> list[list[int]]:
        for start in step.new_reqs:
            self.tables[start.req_index] = {}
        for req_index, index, block in step.new_blocks:
            self.tables[req_index][index] = block
        assert len({row.req_index for row in step.rows}) == len(step.rows)
        assert [row.is_decode for row in step.rows] == sorted(
            (row.is_decode for row in step.rows), reverse=True
        ), "decode rows come first"
        for row in step.rows:
            self.check(row, row.num_computed_tokens)
        for row in step.rows:
            self.write(row)
        tokens = []
        for row in step.rows:
            end = row.num_computed_tokens + row.num_tokens
            self.check(row, end)
            told = self.told[row.request_id]
            self.last_token[row.req_index] = sampled(told.seed, told.tokens[:end])
            tokens.append([self.last_token[row.req_index] if row.samples_token else -1])
        return tokens

    def write(self, row: ScheduledRow) -> None:
        ids = row.token_ids or [self.last_token[row.req_index]]
        assert len(ids) == row.num_tokens
        for position, token in enumerate(ids, row.num_computed_tokens):
            before = self.cache[self.place(row, position - 1)][1] if position else ()
            salt = self.told[row.request_id].salt
            self.cache[self.place(row, position)] = (salt, (*before, token))

    def check(self, row: ScheduledRow, end: int) -> None:
        told = self.told[row.request_id]
        for position in range(end):
            entry = self.cache.get(self.place(row, position))
            assert entry == (told.salt, told.tokens[: position + 1]), "not its own prefix"

    def place(self, row: ScheduledRow, position: int) -> tuple[int, int]:
        return self.tables[row.req_index][position // BLOCK], position % BLOCK

    def named(self, step: SchedulerOutput) -> set[int]:
        return {block for row in step.rows for block in self.tables[row.req_index].values()}


def taken(step: SchedulerOutput) -> set[int]:
    """Return the new blocks of a step that it writes; its other new blocks were found in the prefix
    cache."""
    start = {row.req_index: row.num_computed_tokens for row in step.rows}
    return {
        block for req_index, index, block in step.new_blocks if index * BLOCK >= start[req_index]
    }


def expected(
    prompt: int, told: Told, params: SamplingParams, limit: int
) -> tuple[list[int], FinishReason]:
    """Return the tokens and the finish reason that a request must give, whatever else runs."""
    output: list[int] = []
    for token in told.tokens[prompt:]:
        output.append(token)
        if token == EOS and not params.ignore_eos:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens or prompt + len(output) == limit:
            break
    return output, FinishReason.LENGTH


@st.composite
def requests(draw: st.DrawFn, index: int) -> tuple[EngineRequest, Told, int]:
    """Draw a request, what the device knows of it, and when it arrives. Its prompt is the beginning
    of one of a few texts, continued either as the text goes on or in its own way; so prompts are
    prefixes of each other and of each other's answers."""
    text = draw(st.integers(0, 2))
    prompt = continued([text], seed=text)[: draw(st.integers(1, 30))]
    told_seed = draw(st.sampled_from([text, 100 + index]))
    salt = draw(st.sampled_from([None, None, "a", "b"]))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 20)), ignore_eos=draw(st.booleans()), seed=told_seed
    )
    request = EngineRequest(
        request_id=str(index),
        prompt_token_ids=list(prompt),
        params=params,
        cache_salt=salt,
        priority=draw(st.sampled_from([0, 0, 0, -1, 2])),
    )
    told = Told(continued(prompt, told_seed), told_seed, salt)
    return request, told, draw(st.integers(0, 30))


many_requests = st.integers(1, 12).flatmap(lambda n: st.tuples(*map(requests, range(n))))


@settings(max_examples=400)
@given(
    drawn=many_requests,
    steps_ahead=st.integers(0, 1),
    blocks=st.integers(14, 40),
    seqs=st.integers(1, 6),
    budget=st.integers(0, 20),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 40), max_size=4),
    caching=st.sampled_from([True, True, True, False]),
)
def test_every_request_gives_its_own_tokens(
    drawn, steps_ahead, blocks, seqs, budget, aborts, caching
):
    """Each request gives its own tokens through shared prefixes, chunked prefill, preemption by a
    small cache, aborts and late arrivals."""
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK),
        PrefillBudget(seqs + budget),
        max_num_seqs=seqs,
        max_model_len=LIMIT,
        max_waiting=100,
        eos_token_ids=[EOS],
        enable_prefix_caching=caching,
    )
    device = Device({request.request_id: told for request, told, _ in drawn})
    in_flight: deque[tuple[SchedulerOutput, list[int], set[int]]] = deque()
    got: dict[str, list[int]] = {}
    ended: dict[str, FinishReason] = {}
    cached = 0
    arrivals = deque(sorted(drawn, key=lambda entry: entry[2]))
    for clock in range(4000):
        while arrivals and arrivals[0][2] <= clock:
            request, told, _ = arrivals.popleft()
            got[request.request_id] = []
            scheduler.add(request, seed=told.seed)
        for index, when in aborts.items():
            if when == clock and (output := scheduler.abort(str(index))):
                assert output.finish_reason is FinishReason.ABORT
                ended[str(index)] = FinishReason.ABORT
        while len(in_flight) <= steps_ahead and (step := scheduler.schedule()) is not None:
            busy = set().union(*(blocks_named for _, _, blocks_named in in_flight))
            assert not busy & taken(step), "reused too early"
            assert step.num_tokens <= seqs + budget
            in_flight.append((step, device.run(step), device.named(step)))
        scheduler.check_integrity()
        if in_flight:
            step, tokens, _ = in_flight.popleft()
            for output in scheduler.update(step.step_id, tokens):
                assert output.request_id not in ended, "nothing follows the end"
                assert output.num_cached_tokens == 0 or not got[output.request_id]
                cached += output.num_cached_tokens
                got[output.request_id] += output.token_ids
                if output.finish_reason:
                    ended[output.request_id] = output.finish_reason
            scheduler.check_integrity()
        elif not arrivals and not scheduler.has_work:
            break
    assert scheduler.block_pool.num_used == 0
    assert scheduler.req_indices.num_used == 0
    assert cached <= scheduler.prefix_cache_hits <= scheduler.prefix_cache_queries
    assert caching or not scheduler.prefix_cache_queries
    for request, told, _ in drawn:
        length, name = len(request.prompt_token_ids), request.request_id
        limit = min(LIMIT, scheduler.block_pool.capacity)
        tokens, reason = expected(length, told, request.params, limit)
        if ended[name] is FinishReason.ABORT:
            assert got[name] == tokens[: len(got[name])]
        else:
            assert (got[name], ended[name]) == (tokens, reason)


def make(blocks: int = 40, *, seqs: int = 4, budget: int = 16, **others: Any) -> Scheduler:
    settings = {"max_model_len": 64, "max_waiting": 100, **others}
    return Scheduler(BlockPool(blocks, BLOCK), PrefillBudget(budget), max_num_seqs=seqs, **settings)


def add(
    scheduler: Scheduler, name: str, length: int, most: int | None = 5, priority: int = 0
) -> None:
    params = SamplingParams(max_tokens=most)
    prompt = [ord(name[0])] * length  # No prompt is a prefix of another request's prompt.
    request = EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=params, priority=priority
    )
    scheduler.add(request, seed=0)


def shape(step: SchedulerOutput | None) -> list[tuple[str, int, bool]]:
    assert step is not None
    return [(row.request_id, row.num_tokens, row.is_decode) for row in step.rows]


def test_tokens_behind_the_one_that_ends_a_request_are_dropped():
    """A row may return several tokens; the request keeps those up to its end."""
    scheduler = make(eos_token_ids=[EOS])
    for name, most in (("a", 5), ("b", 2), ("c", 5)):
        add(scheduler, name, 3, most)
    scheduler.schedule()
    outputs = scheduler.update(0, [[1, EOS, 2], [1, 2, 3], [1]])
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [
        ([1, EOS], FinishReason.STOP),
        ([1, 2], FinishReason.LENGTH),
        ([1], None),
    ]
    assert [request.request_id for request in scheduler.running] == ["c"]


def test_prefill_is_chunked_and_mixed_with_decode():
    scheduler = make(budget=16)
    add(scheduler, "a", 3)
    first = scheduler.schedule()
    assert shape(first) == [("a", 3, False)]
    scheduler.update(0, [[1]])
    add(scheduler, "b", 20)
    second = scheduler.schedule()
    assert shape(second) == [("a", 1, True), ("b", 15, False)]
    assert [row.samples_token for row in second.rows] == [True, False]
    assert second.query_len is None
    scheduler.update(1, [[1], [1]])
    third = scheduler.schedule()
    assert shape(third) == [("a", 1, True), ("b", 5, False)]
    scheduler.update(2, [[1], [1]])
    assert scheduler.schedule().query_len == 1


def test_priority_decides_who_is_admitted_and_arrival_among_equals():
    scheduler = make(seqs=1)
    for name, priority in (("a", 0), ("b", 0), ("c", -5), ("d", 7), ("e", 0), ("f", -5)):
        add(scheduler, name, 3, most=1, priority=priority)
    order = []
    for step_id in range(6):
        [(name, _, _)] = shape(scheduler.schedule())
        order.append(name)
        scheduler.update(step_id, [[1]])
    assert order == list("cfabed")


def test_the_least_important_is_preempted_though_others_are_newer():
    scheduler = make(blocks=6, budget=64, max_model_len=16)
    add(scheduler, "low", 3, most=9, priority=1)
    scheduler.update(scheduler.schedule().step_id, [[1]])
    add(scheduler, "high", 7, most=9, priority=-1)
    while not scheduler.num_preemptions:
        step = scheduler.schedule()
        scheduler.update(step.step_id, [[1]] * len(step.rows))
    assert [request.request_id for request in scheduler.running] == ["high"]
    assert [request.request_id for request in scheduler.waiting] == ["low"]


def test_one_token_prompt_is_prefill():
    scheduler = make()
    add(scheduler, "a", 1)
    step = scheduler.schedule()
    assert shape(step) == [("a", 1, False)]
    assert step.query_len is None


@pytest.mark.parametrize(("caching", "start"), [(False, 0), (True, BLOCK)])
def test_the_newest_is_preempted_and_comes_back(caching, start):
    """When the preempted request comes back, it computes its tokens again, the sampled ones too, or
    finds them in the prefix cache while they are cached."""
    scheduler = make(blocks=6, budget=64, max_model_len=16, enable_prefix_caching=caching)
    add(scheduler, "old", 7, 8)
    add(scheduler, "new", 3, 8)
    steps = run_steps(scheduler, 100)
    assert scheduler.num_preemptions == 1
    _, again = [r for s in steps for r in s.rows if r.request_id == "new" and not r.is_decode]
    assert again.num_computed_tokens == start
    assert again.num_computed_tokens + again.num_tokens > 3, (
        "what had been sampled is part of the new prefill"
    )
    assert scheduler.prefix_cache_hits == 0, "its own blocks are no news to whoever asks"


def test_stop_by_length_is_foreseen_under_lag():
    """A step launched ahead does not contain a request whose last token by length is already in
    flight, so no token is computed in vain."""
    scheduler = make()
    add(scheduler, "a", 3, 2)
    scheduler.schedule()
    assert shape(scheduler.schedule()) == [("a", 1, True)]
    assert scheduler.schedule() is None
    scheduler.update(0, [[1]])
    assert scheduler.schedule() is None
    [output] = scheduler.update(1, [[1]])
    assert output.finish_reason is FinishReason.LENGTH


def test_blocks_and_slot_wait_for_the_step_in_flight():
    """The blocks and the request index of an aborted request are not free before the last step that
    writes to them has retired."""
    scheduler = make()
    add(scheduler, "a", 3, 5)
    scheduler.schedule()
    scheduler.schedule()
    assert scheduler.abort("a").finish_reason is FinishReason.ABORT
    assert scheduler.block_pool.num_used == 1
    assert scheduler.update(0, [[1]]) == []
    assert scheduler.block_pool.num_used == 1, "step 1 still writes there"
    assert scheduler.update(1, [[1]]) == []
    assert scheduler.block_pool.num_used == 0
    assert scheduler.req_indices.num_used == 0


@pytest.mark.parametrize(("length", "most"), [(10, 7), (16, None), (17, 0), (0, 1)])
def test_only_requests_that_fit_may_be_added(length, most):
    """Requests are validated before they reach the scheduler, whose cache here holds 16 tokens."""
    scheduler = make(blocks=5, max_model_len=64)
    with pytest.raises(AssertionError, match="a request"):
        add(scheduler, "a", length, most)
    add(scheduler, "a", 10, 6)
    assert not scheduler.abort("missing")


def test_queue_is_bounded_behind_the_free_slots():
    """A request is refused if the free request indices and `max_waiting` places are all taken."""
    scheduler = make(seqs=2, max_waiting=1)
    for name in "abc":
        add(scheduler, name, 3)
    with pytest.raises(QueueFullError):
        add(scheduler, "d", 3)
    scheduler.schedule()
    assert len(scheduler.waiting) == 1
    with pytest.raises(QueueFullError):
        add(scheduler, "d", 3)
    # The index of the aborted request is not free before the step in flight has retired, but its
    # place in the queue's limit is.
    scheduler.abort("a")
    add(scheduler, "d", 3)
    with pytest.raises(QueueFullError):
        add(scheduler, "e", 3)


def run_steps(scheduler: Scheduler, steps: int, steps_ahead: int = 0) -> list[SchedulerOutput]:
    """Run at most `steps` steps, where every sampled token is 2, and return them."""
    ran: list[SchedulerOutput] = []
    in_flight: deque[SchedulerOutput] = deque()
    while scheduler.has_work and len(ran) < steps:
        while len(in_flight) <= steps_ahead and (step := scheduler.schedule()) is not None:
            in_flight.append(step)
            ran.append(step)
        step = in_flight.popleft()
        scheduler.update(step.step_id, [[2]] * len(step.rows))
    return ran


def test_a_preempted_request_is_admitted_before_those_behind_it():
    """First come, first served holds through a preemption."""
    scheduler = make(blocks=6, budget=64, max_model_len=20)
    add(scheduler, "old", 7, 10)
    add(scheduler, "new", 3, 8)
    add(scheduler, "last", 9, 2)
    steps = run_steps(scheduler, 100)
    assert scheduler.num_preemptions == 1
    prefills = [r.request_id for s in steps for r in s.rows if not r.is_decode]
    assert prefills == ["old", "new", "new", "last"]


def test_a_newcomer_leaves_the_running_a_block_each():
    """A new request is admitted only if each running one can still take a block: else the newcomer
    would be preempted as soon as they grow, and would compute its prompt twice."""
    scheduler = make(blocks=6, budget=64, max_model_len=20)
    add(scheduler, "old", 7, 8)
    scheduler.update(0, [[2]] * len(scheduler.schedule().rows))
    add(scheduler, "new", 11, 2)  # It needs three blocks, and three are free.
    assert shape(scheduler.schedule()) == [("old", 1, True)]
    scheduler.update(1, [[2]])
    run_steps_from(scheduler, 2)
    assert scheduler.num_preemptions == 0


def run_steps_from(scheduler: Scheduler, first: int) -> None:
    while scheduler.has_work:
        scheduler.update(first, [[2]] * len(scheduler.schedule().rows))
        first += 1


@pytest.mark.parametrize(
    ("blocks", "prompt"), [(6, 9), (5, 2)], ids=["newest in its prefill", "newest decoding"]
)
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_oldest_waits_one_step_at_most(steps_ahead, blocks, prompt):
    """When the oldest request needs the newest one's blocks while a step in flight still uses them,
    the oldest is left out of one step and the newest is preempted in the next."""
    scheduler = make(blocks=blocks, budget=2, seqs=2, max_model_len=16)
    add(scheduler, "old", 2, 12)
    add(scheduler, "new", prompt, 6)
    steps = run_steps(scheduler, 300, steps_ahead)
    assert not scheduler.has_work
    assert scheduler.num_preemptions >= 1
    ran = [step.step_id for step in steps for row in step.rows if row.request_id == "old"]
    assert max(after - before for before, after in pairwise(ran)) <= 1 + steps_ahead


@pytest.mark.parametrize(("wanted", "needs"), [(None, False), (0, True), (3, True)])
def test_logprobs_need_logits_even_without_alternatives(wanted, needs):
    """A request with logprobs=0 asks for the chosen token's log-probability, so its steps need
    logits too."""
    scheduler = make()
    params = SamplingParams(logprobs=wanted)
    request = EngineRequest(request_id="a", prompt_token_ids=[1], params=params)
    scheduler.add(request, seed=0)
    assert scheduler.schedule().needs_logits is needs


# ---- steady decode -------------------------------------------------------------------------------


def counted(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that grows by one entry with every step that is scheduled anew instead of
    continuing a run."""
    anew: list[None] = []
    schedule_anew = scheduler._schedule_new_batch
    monkeypatch.setattr(
        scheduler, "_schedule_new_batch", lambda: (anew.append(None), schedule_anew())[1]
    )
    return anew


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_run_goes_on_by_itself_whoever_waits(monkeypatch, steps_ahead):
    """The steps of a run of decodes continue without new scheduling, even while requests wait: each
    has the same rows, one token further, and blocks as they are needed."""
    scheduler = make(blocks=64)
    for name in "abcd":
        add(scheduler, name, length=3 + ord(name) - ord("a"), most=30)
    for index in range(90):
        add(scheduler, f"waiting {index}", length=5)
    anew = counted(scheduler, monkeypatch)
    _, _, *steps = run_steps(scheduler, 23, steps_ahead)
    assert len(anew) == 3, "two that hold prefill, and the run's first"
    for before, after in pairwise(steps):
        assert [(row.request_id, row.num_computed_tokens + 1) for row in before.rows] == [
            (row.request_id, row.num_computed_tokens) for row in after.rows
        ]
        assert after.batch_id == before.batch_id
    for step in steps:
        new = {req_index: index for req_index, index, _ in step.new_blocks}
        assert new == {
            row.req_index: row.num_computed_tokens // BLOCK
            for row in step.rows
            if row.num_computed_tokens % BLOCK == 0
        }
    scheduler.check_integrity()


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_run_goes_on_while_the_next_request_does_not_fit(steps_ahead):
    """A server whose cache is full decodes in runs although a request index is free, and admits the
    request that waits in the first step for which there are blocks."""
    scheduler = make(blocks=16, seqs=3)
    for name in "ab":
        add(scheduler, name, length=3, most=20)
    add(scheduler, "long", length=48, most=5)
    steps = run_steps(scheduler, 100, steps_ahead)
    assert [step.num_rows for step in steps] == [2] * 20 + [1] * 7
    assert [step.position_offset for step in steps[:20]] == [0, *range(19)]
    assert [shape(step) for step in steps[20:23]] == [[("long", 16, False)]] * 3


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_run_ends_with_its_first_request(steps_ahead):
    """A run of decode steps ends when the first of its requests does, and the others go on."""
    scheduler = make(blocks=64)
    for name, most in (("a", 9), ("b", 20)):
        add(scheduler, name, length=4, most=most)
    steps = run_steps(scheduler, 40, steps_ahead)
    assert [len(step.rows) for step in steps] == [2] * 9 + [1] * 11
    assert not scheduler.has_work
    assert scheduler.block_pool.num_used == 0

"""The prefill budget: properties of the choice, and what it makes of steps of the scheduler."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.core.budget import MARGIN, MOST_SLOWDOWN, Chunk, PrefillBudget
from minisrv.core.kv_cache import BlockPool
from minisrv.core.scheduler import MAX_OVERTAKES, Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.modes import BudgetReason
from minisrv.request import EngineRequest, SamplingParams

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TOP = SIZES[-1]


def padded(num_tokens: int) -> int:
    return SIZES[bisect_left(SIZES, num_tokens)]


def predict_ms(num_tokens: int, work: AttentionWork) -> float:
    """The times of an imagined device that computes 1,000 tokens a millisecond beside a fixed cost
    of 1 ms, and is slow with long contexts."""
    pairs = max(work.prefill_pairs, 40 * work.longest_prefill)
    return 1 + padded(num_tokens) / 1000 + work.decode_context / 25e3 + pairs / 1e6


def choose(
    num_decodes: int, context: int, *chunks: tuple[int, int], target: float = 1e9, top: int = TOP
) -> tuple[int, BudgetReason]:
    budget = PrefillBudget(top, sizes=SIZES, predict_ms=predict_ms, itl_target_ms=target)
    chosen = budget.choose(num_decodes, context, [Chunk(*chunk) for chunk in chunks])
    assert chosen.ms == pytest.approx(step_ms(num_decodes, context, [*chunks], chosen.tokens))
    return chosen.tokens, chosen.reason


def step_ms(num_decodes: int, context: int, chunks: list[tuple[int, int]], tokens: int) -> float:
    """The time of the step with the first `tokens` prompt tokens."""
    work, left = AttentionWork(context), tokens
    for start, count in chunks:
        taken = min(left, count)
        left -= taken
        if taken:
            work = work.beside(AttentionWork.of_chunk(start, taken))
    return predict_ms(num_decodes + tokens, work)


def shared_ms(num_decodes: int, chunks: list[tuple[int, int]], tokens: int) -> float:
    """The time of the step without the work of its attention."""
    return predict_ms(num_decodes + tokens, NO_WORK)


chunk_lists = st.lists(
    st.tuples(st.integers(0, 8000), st.integers(1, 3000)), min_size=1, max_size=5
)


@settings(max_examples=150)
@given(
    num_decodes=st.integers(0, 127),
    context=st.integers(0, 200_000),
    chunks=chunk_lists,
    target=st.floats(0.5, 50),
    top=st.sampled_from((128, 200, 512, 1000, TOP)),
)
def test_properties_of_the_choice(num_decodes, context, chunks, target, top):
    tokens, reason = choose(num_decodes, context, *chunks, target=target, top=top)
    waiting = sum(count for _, count in chunks)
    most = min(waiting, top - num_decodes)
    assert 1 <= tokens <= most, "prompts advance, and a step has no more than it may"
    if tokens < most:
        assert num_decodes + tokens in SIZES, "no padding while prompt tokens wait"
    if not num_decodes and len(chunks) == 1:
        assert tokens == most, "nobody waits for the step"
        return
    ms = step_ms(num_decodes, context, chunks, tokens)
    least = next((size for size in SIZES if size > num_decodes), TOP) - num_decodes
    shortest_ms = step_ms(num_decodes, context, chunks, min(least, most))
    if shortest_ms <= target:
        assert ms <= target
        assert reason is not BudgetReason.OVER_ITL_TARGET
    else:
        assert ms <= MOST_SLOWDOWN * shortest_ms
    if reason is BudgetReason.ITL_TARGET:
        # The next larger size would have been over the target.
        larger = min(SIZES[SIZES.index(num_decodes + tokens) + 1] - num_decodes, most)
        assert step_ms(num_decodes, context, chunks, larger) > target
    if reason is BudgetReason.FAST_ENOUGH:
        # Of all steps within the target, none computes its tokens much faster.
        rates = [
            (num_decodes + count) / shared_ms(num_decodes, chunks, count)
            for count in {*(size - num_decodes for size in SIZES), most}
            if 0 < count <= most and step_ms(num_decodes, context, chunks, count) <= target
        ]
        rate = (num_decodes + tokens) / shared_ms(num_decodes, chunks, tokens)
        assert rate >= (1 - MARGIN) * max(rates, default=0.0) - 1e-9
    assert (reason is BudgetReason.ALL_WAITING) == (tokens == waiting)
    assert (reason is BudgetReason.STEP_LIMIT) == (tokens == most < waiting)


SMALL = (1, 2, 4, 6)
"""The sizes of the small steps, of which all are tried."""


@pytest.mark.parametrize(
    "base_ms", [(4, 4, 4, 4), (1, 2, 4, 6), (1, 1.1, 1.2, 9), (1, 3, 3.2, 3.4), (2, 2.5, 3.5, 4.5)]
)
@pytest.mark.parametrize("attention", [0.0, 0.3])
def test_every_small_choice_is_what_the_rules_say(base_ms, attention):
    """All numbers of decode rows, all short prompts and all targets that decide something, the
    predicted times themselves among them, by a direct reading of the rules."""
    base = dict(zip(SMALL, base_ms, strict=True))

    def small_ms(num_tokens: int, work: AttentionWork) -> float:
        per_work = work.prefill_pairs / 3 + work.decode_context / 20
        return base[SMALL[bisect_left(SMALL, num_tokens)]] + attention * per_work

    histories = [Chunk(start, count) for start in (0, 3) for count in range(1, 8)]
    prompts = [[chunk] for chunk in histories]
    prompts += [[*two] for two in product(histories, repeat=2) if max(two[0][1], two[1][1]) < 5]
    for decodes, chunks in product(range(6), prompts):
        waiting = sum(chunk.num_tokens for chunk in chunks)
        most = min(waiting, SMALL[-1] - decodes)
        counts = sorted({size - decodes for size in SMALL if 0 < size - decodes < most} | {most})
        if not decodes and len(chunks) == 1:
            counts = [most]
        ms, shared = {}, {}
        for count in counts:
            work, left = AttentionWork(2 * decodes), count
            for start, length in chunks:
                if taken := min(left, length):
                    work = work.beside(AttentionWork.of_chunk(start, taken))
                left -= taken
            ms[count] = small_ms(decodes + count, work)
            shared[count] = small_ms(decodes + count, NO_WORK)
        for target in {0.01, *ms.values(), *(1.01 * one for one in ms.values())}:
            budget = PrefillBudget(
                SMALL[-1], sizes=SMALL, predict_ms=small_ms, itl_target_ms=target
            )
            tokens, reason, predicted = budget.choose(decodes, 2 * decodes, chunks)
            assert predicted == ms[tokens]
            limit = target if ms[counts[0]] <= target else MOST_SLOWDOWN * ms[counts[0]]
            allowed = [count for count in counts if ms[count] <= limit]
            rates = {count: (decodes + count) / shared[count] for count in allowed}
            enough = (1 - MARGIN) * max(rates.values())
            expected = next(count for count in allowed if rates[count] >= enough)
            if waiting in allowed:
                rest = small_ms(decodes + waiting - expected, NO_WORK) if waiting > expected else 0
                if shared[waiting] < (1 - MARGIN) * (shared[expected] + rest):
                    expected = waiting
            assert tokens == expected
            larger = BudgetReason.ITL_TARGET if limit == target else BudgetReason.OVER_ITL_TARGET
            if tokens == most:
                larger = BudgetReason.ALL_WAITING if most == waiting else BudgetReason.STEP_LIMIT
            assert reason is (larger if tokens == allowed[-1] else BudgetReason.FAST_ENOUGH)


@settings(max_examples=80)
@given(
    num_decodes=st.integers(1, 128),
    context=st.integers(0, 200_000),
    chunks=chunk_lists,
    targets=st.tuples(st.floats(0.5, 50), st.floats(0.5, 50)),
)
def test_a_larger_target_never_makes_a_smaller_step(num_decodes, context, chunks, targets):
    """As long as a step can stay within the smaller target at all."""
    small, large = sorted(targets)
    least = next(size for size in SIZES if size > num_decodes) - num_decodes
    waiting = sum(count for _, count in chunks)
    if step_ms(num_decodes, context, chunks, min(least, waiting)) > small:
        return
    before, after = (
        choose(num_decodes, context, *chunks, target=target)[0] for target in (small, large)
    )
    # A larger step that is allowed only by the larger target may raise the rate to compare with.
    assert after >= before


def test_few_rows_of_little_context_leave_room_for_a_large_budget():
    """The same target allows more prompt tokens beside few decode rows with short contexts."""
    long_prompt = (0, 100_000)
    small = choose(64, 64 * 3000, long_prompt, target=10)
    large = choose(4, 4 * 200, long_prompt, target=10)
    assert small == (768 - 64, BudgetReason.ITL_TARGET)
    assert large == (2048 - 4, BudgetReason.STEP_LIMIT)


def test_a_size_at_which_the_device_is_faster_is_preferred():
    """A step of 1,024 tokens takes more than twice as long as one of 512 here, so larger steps
    compute less in the same time."""
    slow = PrefillBudget(
        1024, sizes=(256, 512, 1024), predict_ms=lambda n, work: 1 + n / 1000 + 3 * (n > 512)
    )
    assert slow.choose(8, 800, [Chunk(0, 5000)])[:2] == (512 - 8, BudgetReason.FAST_ENOUGH)


@pytest.mark.parametrize(("gain", "tokens"), [(0.9 * MARGIN, 512), (1.1 * MARGIN, 1024)])
def test_a_smaller_step_is_preferred_if_it_is_nearly_as_fast(gain: float, tokens: int):
    """Requests decode sooner, and those that come meanwhile wait less. So it is if several prompts
    wait and none decodes; one prompt alone has nobody who waits for it."""
    even = PrefillBudget(
        1024, sizes=(512, 1024), predict_ms=lambda n, work: n * (1 - gain * (n > 512))
    )
    assert even.choose(8, 800, [Chunk(0, 5000)]).tokens == tokens - 8
    assert even.choose(0, 0, [Chunk(0, 400), Chunk(0, 5000)]).tokens == tokens
    assert even.choose(0, 0, [Chunk(0, 5000)]).tokens == 1024


def test_no_step_is_left_for_a_few_tokens():
    """A step of 512 tokens is nearly as fast as any, but the 20 tokens that it would leave cost a
    step of their own."""
    budget = PrefillBudget(
        1024, sizes=(16, 32, 512, 1024), predict_ms=lambda n, work: 0.3 + max(n, 300) / 100
    )
    assert budget.choose(8, 800, [Chunk(0, 524)]).tokens == 524
    assert budget.choose(8, 800, [Chunk(0, 5000)]).tokens == 504


def test_the_attention_of_prompts_bounds_a_step_but_does_not_count_as_slow():
    """Tokens far back in a long prompt cost more in whichever step they are computed. So they are
    no reason for a smaller step, unless the target is."""
    behind = (60_000, 4000)
    assert choose(8, 800, behind) == (2048 - 8, BudgetReason.STEP_LIMIT)
    assert choose(8, 800, behind, target=40) == (512 - 8, BudgetReason.ITL_TARGET)


def test_a_history_that_any_chunk_pays_for_makes_a_large_one_better():
    """A step of more than 512 tokens is slow here; but behind a long history, where fewer than
    1,000 tokens leave the device empty, most of a step's time is the same whatever its size."""

    def ms(num_tokens: int, work: AttentionWork) -> float:
        pairs = max(work.prefill_pairs, 1000 * work.longest_prefill)
        return 1 + num_tokens / 1000 + 3 * (num_tokens > 512) + pairs / 1e6

    budget = PrefillBudget(1024, sizes=(256, 512, 1024), predict_ms=ms)
    assert budget.choose(8, 800, [Chunk(0, 5000)])[:2] == (512 - 8, BudgetReason.FAST_ENOUGH)
    assert budget.choose(8, 800, [Chunk(20_000, 5000)])[:2] == (1024 - 8, BudgetReason.STEP_LIMIT)


def test_without_a_prediction_a_step_takes_all_that_it_may():
    assert PrefillBudget(512).choose(8, 800, [Chunk(0, 5000)]).tokens == 504
    assert PrefillBudget(512).choose(8, 800, [Chunk(0, 300)]).tokens == 300


# ---- through the scheduler -----------------------------------------------------------------------


def scheduler(target: float = 1e9, *, blocks: int = 4000, seqs: int = 64) -> Scheduler:
    budget = PrefillBudget(TOP, sizes=SIZES, predict_ms=predict_ms, itl_target_ms=target)
    return Scheduler(
        BlockPool(blocks, 16), budget, max_num_seqs=seqs, max_model_len=32_000, max_waiting=100
    )


def add(
    scheduler: Scheduler,
    name: str,
    length: int,
    *,
    most: int = 200,
    first: int | None = None,
    priority: int = 0,
) -> None:
    """Add a request. Its prompt begins like that of others with the same `first`."""
    prompt = [ord(name[0]) if first is None else first] * length
    params = SamplingParams(max_tokens=most)
    scheduler.add(
        EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, priority=priority),
        seed=0,
    )


def run(scheduler: Scheduler) -> SchedulerOutput:
    step = scheduler.schedule()
    assert step is not None
    scheduler.update(step.step_id, [[1]] * step.num_rows)
    return step


def rows(step: SchedulerOutput) -> list[tuple[str, int]]:
    return [(row.request_id, row.num_tokens) for row in step.rows]


CUT = (BudgetReason.ITL_TARGET, BudgetReason.FAST_ENOUGH, BudgetReason.OVER_ITL_TARGET)
"""Reasons of a step that leaves prompt tokens for the next one although it could hold more."""


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 6),  # steps since the arrival before
            st.integers(1, 3000),  # prompt tokens
            st.integers(1, 12),  # generated tokens
            st.integers(0, 1),  # priority
        ),
        min_size=1,
        max_size=14,
    ),
    target=st.floats(0.5, 20),
    blocks=st.sampled_from((220, 400, 4000)),
    seqs=st.sampled_from((2, 5, 64)),
    steps_ahead=st.integers(0, 1),
)
def test_properties_of_served_requests(arrivals, target, blocks, seqs, steps_ahead):
    """Whatever arrives: prompts advance in every step while some can, a step that leaves tokens for
    the next one is not padded, equals are served in the order in which they came, a later prompt
    has tokens in a step only if those before it have all of theirs, and every request ends."""
    queue = scheduler(target, blocks=blocks, seqs=seqs)
    pending = [(f"{number}", *arrival) for number, arrival in enumerate(arrivals)]
    lengths = {name: length for name, _, length, _, _ in pending}
    priorities = {name: priority for name, *_, priority in pending}
    begun: list[str] = []
    computed: Counter[str] = Counter()
    in_flight: list[SchedulerOutput] = []
    num_steps, wait = 0, pending[0][1]
    while pending or queue.has_work or in_flight:
        while pending and not wait:
            name, _, length, most, priority = pending.pop(0)
            add(queue, name, length, most=most, first=1000 + int(name), priority=priority)
            wait = pending[0][1] if pending else 0
        wait -= bool(wait)
        while len(in_flight) <= steps_ahead and (step := queue.schedule()) is not None:
            in_flight.append(step)
            num_steps += 1
            prefills = [row for row in step.rows if not row.is_decode]
            if step.budget_reason in CUT:
                assert step.num_tokens in SIZES
            assert step.num_tokens <= TOP
            assert prefills or not any(
                request.req_index and not request.is_decoding for request in queue.running
            )
            for row in prefills[:-1]:
                assert row.samples_token, "all tokens before those of the next prompt"
            for row in prefills:
                if row.request_id not in begun:
                    begun.append(row.request_id)
                computed[row.request_id] += row.num_tokens
        if in_flight:
            step = in_flight.pop(0)
            queue.update(step.step_id, [[1]] * step.num_rows)
        queue.check_integrity()
    assert sorted(begun, key=int) == list(lengths)
    assert all(computed[name] >= length for name, length in lengths.items())
    for priority in (0, 1):
        equals = [int(name) for name in begun if priorities[name] == priority]
        assert equals == sorted(equals)
    assert num_steps <= sum(length + most for _, length, most, _ in arrivals)


def test_prompts_that_wait_for_each_other_share_no_larger_step_than_helps():
    """A step of 512 tokens is as fast as any. Nothing decodes, but a prompt that is finished in the
    first step decodes in the second. A prompt that is alone takes all that a step may have."""
    budget = PrefillBudget(
        TOP, sizes=(512, 1024, TOP), predict_ms=lambda n, work: n / 100, itl_target_ms=1e9
    )
    queue = Scheduler(
        BlockPool(4000, 16), budget, max_num_seqs=64, max_model_len=32_000, max_waiting=100
    )
    add(queue, "alone", 3000)
    assert rows(run(queue)) == [("alone", TOP)]
    for name in ("a", "b", "c"):
        add(queue, name, 300)
    step = run(queue)
    assert rows(step) == [("alone", 512)]
    assert step.budget_reason is BudgetReason.FAST_ENOUGH


def test_short_prompts_share_a_step_with_the_tail_of_a_long_one():
    queue = scheduler()
    add(queue, "long", 2 * TOP + 500)
    for name in ("a", "b", "c"):
        add(queue, name, 100)
    assert [rows(run(queue)) for _ in range(2)] == [[("long", TOP)]] * 2
    step = run(queue)
    assert rows(step) == [("long", 500), ("a", 100), ("b", 100), ("c", 100)]
    assert step.budget_reason is BudgetReason.ALL_WAITING


def test_decoding_requests_keep_their_target_while_prompts_wait():
    """Every step with decode rows is predicted to stay within the target, and fills its size, until
    the last prompt token has been computed; then nothing is decided any more."""
    queue = scheduler(target=3.0)
    for name in ("a", "b", "c"):
        add(queue, name, 100)
    run(queue)
    for name in ("l", "m", "n"):
        add(queue, name, 3000)
    reasons: Counter[BudgetReason | None] = Counter()
    while queue.waiting or any(not request.is_decoding for request in queue.running):
        step = run(queue)
        reasons[step.budget_reason] += 1
        assert predict_ms(step.num_tokens, step.work) <= 3.0
        last = step.budget_reason is BudgetReason.ALL_WAITING
        assert last or step.num_tokens in SIZES
    assert reasons[BudgetReason.ALL_WAITING] == 1
    assert reasons[BudgetReason.ITL_TARGET] >= 8
    assert run(queue).budget_reason is None


def test_prompts_advance_where_no_step_meets_the_target():
    queue = scheduler(target=0.1)
    add(queue, "a", 10)
    run(queue)
    add(queue, "long", 4000)
    step = run(queue)
    assert step.budget_reason is BudgetReason.OVER_ITL_TARGET
    shortest = predict_ms(2, AttentionWork())
    assert shortest < predict_ms(step.num_tokens, step.work) <= 1.3 * shortest
    assert rows(step)[1][1] > 100, "not a token at a time"


@pytest.mark.parametrize("hit", [False, True])
def test_a_prompt_that_the_prefix_cache_has_costs_its_history(hit: bool):
    """Behind 16,000 tokens found in the cache, the attention of a prompt token costs more than at
    its beginning; a step within the same target has fewer of them."""
    queue = scheduler(target=4.0)
    add(queue, "first", 16_000, first=9)
    while not queue.running or not queue.running[0].is_decoding:
        run(queue)
    add(queue, "second", 20_000, first=9 if hit else 8)
    step = run(queue)
    assert predict_ms(step.num_tokens, step.work) <= 4.0
    assert rows(step)[1:] == [("second", 127 if hit else 1023)]
    assert step.rows[1].num_computed_tokens == (16_000 if hit else 0)


def test_prompts_for_which_no_block_is_free_do_not_count():
    """A request that cannot be admitted leaves the size of the step to those that can."""
    queue = scheduler(blocks=1 + 24)
    add(queue, "a", 100, most=50)
    run(queue)
    add(queue, "b", 50, most=50)
    add(queue, "large", 300, most=50)
    step = run(queue)
    assert rows(step) == [("a", 1), ("b", 50)]
    assert step.budget_reason is BudgetReason.ALL_WAITING
    assert run(queue).budget_reason is None


def test_without_a_target_a_step_is_filled_whatever_was_expected_to_fit():
    """Both requests begin like one that has ended. The blocks of that prompt are free before the
    first of them is admitted and in use behind it, so the second one needs but one block more."""
    budget = PrefillBudget(TOP)
    queue = Scheduler(
        BlockPool(1 + 13, 16), budget, max_num_seqs=4, max_model_len=999, max_waiting=9
    )
    add(queue, "ended", 160, most=1, first=9)
    run(queue)
    for name in ("a", "b"):
        add(queue, name, 165, most=20, first=9)
    step = run(queue)
    assert rows(step) == [("a", 5), ("b", 5)]
    assert step.budget_reason is BudgetReason.ALL_WAITING


def test_the_turn_of_an_overtaken_request_comes_while_an_important_one_does_not_fit():
    """A target leaves it as it is when a request has its turn: after enough others have overtaken
    it, and even where the first of those that wait has to wait for blocks."""
    queue = scheduler(blocks=1 + 24, seqs=2)
    add(queue, "decoding", 100)
    run(queue)
    add(queue, "overtaken", 20, priority=1)
    for number in range(MAX_OVERTAKES):
        add(queue, str(number), 20, most=1)
    add(queue, "large", 300, most=50)
    admitted = [rows(run(queue))[1][0] for _ in range(MAX_OVERTAKES + 1)]
    assert admitted == [*map(str, range(MAX_OVERTAKES)), "overtaken"]

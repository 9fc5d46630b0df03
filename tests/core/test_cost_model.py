"""The cost model: what it predicts after a fit, that it is monotone, and what serving teaches."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.core.attention_work import AttentionWork
from minisrv.core.cost_model import GAIN, WINDOW, CostModel, StepSample
from minisrv.core.ladder import decode_descriptor
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, StageOutput

FULL, NONE = CUDAGraphMode.FULL, CUDAGraphMode.NONE
NOTHING = AttentionWork()


def mixed(tokens: int) -> GraphKey:
    return FULL, BatchDescriptor(tokens, 8)


def decode(rows: int) -> GraphKey:
    return FULL, decode_descriptor(rows, StageOutput.TOKENS)


def true_ms(size: int, work: AttentionWork) -> float:
    """The times of an imagined device, which the model can represent at every size."""
    return 0.4 + 0.003 * size + 4e-5 * work.decode_context + 9e-7 * work.prefill_pairs


def sample(key: GraphKey, work: AttentionWork, slower: float = 1.0) -> StepSample:
    return StepSample(key, work, slower * true_ms(key[1].num_tokens, work))


LONG = [
    AttentionWork(30_000),
    AttentionWork(2_000, 2e6, 2_000),
    AttentionWork(30_000, 6e7, 30_000),
]
MEASURED = [sample(mixed(size), NOTHING) for size in (1, 8, 64, 512, 2048)] + [
    sample(mixed(512), work) for work in LONG
]


def test_a_fitted_model_predicts_other_sizes_lengths_and_histories():
    model = CostModel(MEASURED)
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randint(1, 2048)
        work = AttentionWork(draw.randrange(100_000), draw.uniform(0, 1e8), draw.randrange(100_000))
        assert model.predict(mixed(size), work) == pytest.approx(true_ms(size, work), rel=1e-6)
    # Beyond the sizes that were measured a step is as fast for each token as the largest of them.
    assert model.predict(mixed(4096), NOTHING) == pytest.approx(2 * true_ms(2048, NOTHING))


def eager(tokens: int) -> GraphKey:
    return NONE, BatchDescriptor(tokens)


def test_steps_that_run_alike_have_costs_of_their_own():
    """But attention costs the same in every mode, so long contexts need not be timed in each."""
    model = CostModel(
        [
            *MEASURED,
            *(sample(decode(4), work, 0.5) for work in (NOTHING, LONG[0])),
            *(StepSample(eager(size), NOTHING, 2 + 0.01 * size) for size in (2049, 8192)),
        ]
    )
    assert model.predict(decode(4), LONG[0]) == pytest.approx(0.5 * true_ms(4, LONG[0]))
    assert model.predict(mixed(64), LONG[0]) == pytest.approx(true_ms(64, LONG[0]))
    attention_ms = true_ms(0, LONG[2]) - true_ms(0, NOTHING)
    assert model.predict(eager(3584), LONG[2]) == pytest.approx(2 + 35.84 + attention_ms)


def test_steps_that_run_like_none_that_was_timed_begin_with_the_costs_of_others():
    """A graph may be taken out of service, and its steps then run eagerly, of which none was timed
    if graphs held all steps. They were once predicted to take no time, whatever they took."""
    model = CostModel(MEASURED)
    assert model.predict(eager(300), LONG[1]) == pytest.approx(true_ms(300, LONG[1]))
    for _ in range(60 * WINDOW):
        model.observe(sample(eager(512), NOTHING, 3.0))
        for size in (8, 512):
            model.observe(sample(mixed(size), NOTHING))
    assert model.predict(eager(512), NOTHING) == pytest.approx(3 * true_ms(512, NOTHING), rel=0.02)
    assert model.predict(mixed(512), NOTHING) == pytest.approx(true_ms(512, NOTHING), rel=0.02)
    assert CostModel().predict(eager(512), NOTHING) == 0.0, "nothing is known of any step"


def chunk_ms(tokens: int, history: int) -> float:
    """The time of a chunk on an imagined device that the queries of 1,000 tokens fill."""
    work = AttentionWork.of_chunk(history, tokens)
    return 0.4 + 0.003 * tokens + 3e-7 * max(work.prefill_pairs, 1000 * work.longest_prefill)


def test_a_chunk_that_leaves_the_device_empty_costs_as_much_as_one_that_fills_it():
    """256 tokens behind a long history take nearly as long as 1,000, for as many keys are read one
    after the other. A fit to chunks of two sizes finds that out, and predicts the sizes between."""
    timed = [(256, 0), (256, 16_128), (2048, 0), (2048, 14_336)]
    model = CostModel(
        StepSample(mixed(size), AttentionWork.of_chunk(history, size), chunk_ms(size, history))
        for size, history in timed
    )
    for size, history in [(256, 60_000), (384, 8000), (1024, 30_000), (1536, 100), (2048, 30_000)]:
        predicted = model.predict(mixed(size), AttentionWork.of_chunk(history, size))
        assert predicted == pytest.approx(chunk_ms(size, history), rel=0.05)


def test_no_width_is_assumed_where_none_explains_the_times():
    """Chunks of one size do not tell whether a larger one would cost more for each pair."""
    model = CostModel(MEASURED)
    long = AttentionWork.of_chunk(30_000, 8)
    assert model.predict(mixed(8), long) == pytest.approx(true_ms(8, long))


def test_other_code_has_other_bases_and_the_same_attention():
    model = CostModel([*MEASURED, sample(decode(4), NOTHING)])
    for _ in range(WINDOW):
        model.observe(sample(mixed(512), NOTHING, 2.0))  # the machine is slow
    faster = {size: 2 * (0.1 + 0.001 * size) for size in (1, 64, 2048)}
    model.rebase(StepSample(mixed(size), NOTHING, ms) for size, ms in faster.items())
    attention_ms = true_ms(0, LONG[2]) - true_ms(0, NOTHING)
    for size in (1, 64, 700, 2048):
        expected = 2 * (0.1 + 0.001 * size + attention_ms)
        assert model.predict(mixed(size), LONG[2]) == pytest.approx(expected)
    assert model.predict(decode(4), NOTHING) == pytest.approx(2 * true_ms(4, NOTHING)), "as before"


def test_a_size_that_is_timed_later_joins_the_others():
    """Its base lies between those of its neighbours, whatever was measured, at the present pace;
    no other prediction changes, and a size that is known stays as it is."""
    times = {1: 1.0, 8: 2.0, 64: 9.0}
    model = CostModel([StepSample(mixed(size), NOTHING, ms) for size, ms in times.items()])
    for _ in range(WINDOW):
        model.observe(StepSample(mixed(8), NOTHING, 4.0))  # the machine is slow
    pace = model.predict(mixed(1), NOTHING) / 1.0
    before = {size: model.predict(mixed(size), NOTHING) for size in times}
    new = {2: 1.2 * pace, 4: 9.0 * pace, 16: 0.1 * pace, 8: 7.0 * pace}
    model.add(StepSample(mixed(size), NOTHING, ms) for size, ms in new.items())
    assert {size: model.predict(mixed(size), NOTHING) for size in times} == before
    assert model.predict(mixed(2), NOTHING) == pytest.approx(1.2 * pace)
    assert model.predict(mixed(4), NOTHING) == before[8], "no more than the next larger size"
    assert model.predict(mixed(16), NOTHING) == before[8], "no less than the next smaller size"
    model.add([StepSample(decode(4), NOTHING, 1.0), StepSample(mixed(3), NOTHING, 0.0)])
    assert model.predict(decode(4), NOTHING) == 0.0, "no such step was timed at the start"


def test_a_smaller_size_that_took_longer_shares_its_time_with_the_larger_one():
    """Noise is averaged: neither of the two measurements is taken to be the right one."""
    times = {1: 1.0, 2: 3.0, 4: 2.0, 8: 4.0}
    model = CostModel([StepSample(mixed(size), NOTHING, ms) for size, ms in times.items()])
    assert [model.predict(mixed(size), NOTHING) for size in times] == [1.0, 2.5, 2.5, 4.0]


works = st.builds(
    AttentionWork, st.integers(0, 100_000), st.floats(0, 1e9), st.integers(0, 100_000)
)
sizes = st.integers(1, 4096)
samples = st.lists(
    st.builds(StepSample, st.builds(mixed, sizes), works, st.floats(0.01, 1000)), max_size=12
)


@settings(max_examples=60)
@given(fitted=samples, served=samples, repeats=st.integers(1, 12), draw=st.randoms())
def test_a_step_that_holds_more_never_takes_less_time(fitted, served, repeats, draw):
    """However little the samples have to do with each other, predictions are neither negative nor
    smaller for more tokens, longer contexts or more prefill."""
    model = CostModel(fitted)
    for one in served:
        for _ in range(repeats):
            model.observe(one)
    for _ in range(20):
        few, many = sorted(draw.sample(range(1, 5000), 2))
        work = AttentionWork(draw.randrange(10_000), draw.uniform(0, 1e6), draw.randrange(10_000))
        more = work.beside(AttentionWork(*(draw.randrange(20_000) for _ in range(3))))
        least = model.predict(mixed(few), work)
        assert 0 <= least <= model.predict(mixed(few), more) * (1 + 1e-9)
        assert least <= model.predict(mixed(many), work) * (1 + 1e-9)


def test_a_few_disturbed_steps_teach_nothing():
    model = CostModel(MEASURED)
    expected = model.predict(mixed(512), LONG[2])
    for slower in [50.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1000.0, 1.0, 1.0] * 5:
        model.observe(sample(mixed(512), LONG[2], slower))
    assert model.predict(mixed(512), LONG[2]) == pytest.approx(expected)


def test_a_clock_that_shows_no_time_teaches_nothing():
    model = CostModel(MEASURED)
    model.rebase([StepSample(mixed(512), NOTHING, ms) for ms in (0.0, -2.0)])
    for _ in range(20):
        model.observe(StepSample(mixed(512), NOTHING, 0.0))
    expected = CostModel(MEASURED).predict(mixed(512), NOTHING)
    assert model.predict(mixed(512), NOTHING) == pytest.approx(expected)


@pytest.mark.parametrize("slower", [0.7, 1.4, 5.0])
def test_a_machine_that_becomes_slower_or_faster_is_soon_followed(slower: float):
    """For all steps, also those that have not been served since, and when it is over as soon."""
    model = CostModel([*MEASURED, sample(decode(4), NOTHING)])
    for pace in (slower, 1.0):
        for turn in range(WINDOW):
            model.observe(sample((mixed(512), mixed(64))[turn % 2], LONG[turn % 3], pace))
        for key in (mixed(8), mixed(2048), decode(4)):
            work = NOTHING if key[1].uniform_decode else LONG[2]
            expected = pace * true_ms(key[1].num_tokens, work)
            assert model.predict(key, work) == pytest.approx(expected)


@pytest.mark.parametrize("slower", [0.7, 1.4, 3.0])
def test_what_takes_longer_than_other_steps_is_learnt(slower: float):
    """Steps of one kind take longer among others that do not: the model comes near to the times of
    both."""
    model = CostModel([*MEASURED, sample(decode(4), NOTHING)])
    for _ in range(60 * WINDOW):
        model.observe(sample(mixed(512), NOTHING, slower))
        model.observe(sample(decode(4), NOTHING))
        model.observe(sample(decode(4), NOTHING))
    assert model.predict(decode(4), NOTHING) == pytest.approx(true_ms(4, NOTHING), rel=0.02)
    expected = slower * true_ms(512, NOTHING)
    assert model.predict(mixed(512), NOTHING) == pytest.approx(expected, rel=0.02)


def test_a_correction_goes_to_the_part_that_takes_the_time():
    """Where nearly all of a step is the attention of prefill, that part is corrected, and a step
    without it is predicted as before."""
    model, work = CostModel(MEASURED), AttentionWork(0, 1e9)
    without = model.predict(mixed(512), NOTHING)
    for _ in range(WINDOW):
        model.observe(sample(mixed(8), NOTHING))
        model.observe(sample(mixed(8), NOTHING))
        model.observe(sample(mixed(512), work, 1.2))
    assert model.predict(mixed(512), NOTHING) == pytest.approx(without, rel=0.001)
    assert model.predict(mixed(512), work) == pytest.approx(
        (1 + 0.2 * GAIN) * true_ms(512, work), rel=0.01
    )

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
    return 0.4 + 0.003 * size + 4e-5 * work.cached_tokens + 9e-7 * work.prefill_pairs


def sample(key: GraphKey, work: AttentionWork, slower: float = 1.0) -> StepSample:
    return StepSample(key, work, slower * true_ms(key[1].num_tokens, work))


LONG = [AttentionWork(30_000), AttentionWork(2_000, 2e6), AttentionWork(30_000, 6e7)]
MEASURED = [sample(mixed(size), NOTHING) for size in (1, 8, 64, 512, 2048)] + [
    sample(mixed(512), work) for work in LONG
]


def test_a_fitted_model_predicts_other_sizes_lengths_and_histories():
    model = CostModel(MEASURED)
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randint(1, 2048)
        work = AttentionWork(draw.randrange(100_000), draw.uniform(0, 1e8))
        assert model.predict(mixed(size), work) == pytest.approx(true_ms(size, work), rel=1e-6)
    # Beyond the sizes that were measured a step is as fast for each token as the largest of them.
    assert model.predict(mixed(4096), NOTHING) == pytest.approx(2 * true_ms(2048, NOTHING))


def test_steps_that_run_alike_have_costs_of_their_own():
    model = CostModel([*MEASURED, sample(decode(4), NOTHING, 0.5), sample(decode(4), LONG[0], 0.5)])
    assert model.predict(decode(4), LONG[0]) == pytest.approx(0.5 * true_ms(4, LONG[0]))
    assert model.predict(mixed(64), LONG[0]) == pytest.approx(true_ms(64, LONG[0]))
    assert model.predict((NONE, BatchDescriptor(64)), LONG[0]) == 0, "nothing is known of these"


def test_a_smaller_size_that_took_longer_shares_its_time_with_the_larger_one():
    """Noise is averaged: neither of the two measurements is taken to be the right one."""
    times = {1: 1.0, 2: 3.0, 4: 2.0, 8: 4.0}
    model = CostModel([StepSample(mixed(size), NOTHING, ms) for size, ms in times.items()])
    assert [model.predict(mixed(size), NOTHING) for size in times] == [1.0, 2.5, 2.5, 4.0]


works = st.builds(AttentionWork, st.integers(0, 100_000), st.floats(0, 1e9))
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
        work = AttentionWork(draw.randrange(10_000), draw.uniform(0, 1e6))
        more = AttentionWork(work.cached_tokens + draw.randrange(1000), work.prefill_pairs * 1.5)
        least = model.predict(mixed(few), work)
        assert 0 <= least <= model.predict(mixed(few), more) * (1 + 1e-9)
        assert least <= model.predict(mixed(many), work) * (1 + 1e-9)


def test_a_few_disturbed_steps_teach_nothing():
    model = CostModel(MEASURED)
    expected = model.predict(mixed(512), LONG[2])
    for slower in [50.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1000.0, 1.0, 1.0] * 5:
        model.observe(sample(mixed(512), LONG[2], slower))
    assert model.predict(mixed(512), LONG[2]) == pytest.approx(expected)


@pytest.mark.parametrize("slower", [0.7, 1.4, 5.0])
def test_steps_that_all_take_longer_or_shorter_are_learnt(slower: float):
    """The model comes near to the new times within some hundred steps, at the sizes and lengths
    that are served, and keeps what it knows of others."""
    model = CostModel(MEASURED)
    small = model.predict(mixed(8), NOTHING)
    for _ in range(30 * WINDOW):
        model.observe(sample(mixed(512), LONG[2], slower))
    assert model.predict(mixed(512), LONG[2]) == pytest.approx(
        slower * true_ms(512, LONG[2]), rel=0.02
    )
    assert model.predict(mixed(8), NOTHING) == pytest.approx(small)


def test_a_correction_goes_to_the_part_that_takes_the_time():
    """Where nearly all of a step is the attention of prefill, that part is corrected, and a step
    without it is predicted as before."""
    model, work = CostModel(MEASURED), AttentionWork(0, 1e9)
    without = model.predict(mixed(512), NOTHING)
    for _ in range(WINDOW):
        model.observe(sample(mixed(512), work, 1.2))
    assert model.predict(mixed(512), NOTHING) == pytest.approx(without, rel=0.001)
    assert model.predict(mixed(512), work) == pytest.approx(
        (1 + 0.2 * GAIN) * true_ms(512, work), rel=0.01
    )

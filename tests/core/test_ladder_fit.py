"""The fit of a ladder: it is the best one, by trying all others, and keeps the rules of a ladder
that covers everything."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minisrv.core.batch_counts import BatchCounter, BatchCounts, rounded_size
from minisrv.core.ladder import Ladders, build_ladders, pad_to_capture_size
from minisrv.core.ladder_fit import (
    Fit,
    Price,
    Weigh,
    computed_tokens,
    cost_of,
    fit_sizes,
    graphs_of,
    use_of,
    with_sizes,
)
from minisrv.modes import CUDAGraphMode

WITH_GRAPHS = [mode for mode in CUDAGraphMode if mode is not CUDAGraphMode.NONE]
LIMITS = st.tuples(st.integers(1, 5), st.integers(0, 6)).map(lambda n: (n[0], n[0] + n[1]))
STEPS = st.dictionaries(st.integers(1, 12), st.integers(1, 9), max_size=5)
STEP_MS = st.lists(st.integers(0, 4), min_size=24, max_size=24)


def keeps_the_rules(sizes: tuple[int, ...], ladders: Ladders) -> bool:
    """Whether no batch is padded to more than four times its size, and both largest sizes are those
    of the ladders."""
    found = with_sizes(ladders, sizes)
    if (found.decode[-1:], found.mixed[-1:]) != (ladders.decode[-1:], ladders.mixed[-1:]):
        return False
    if max(sizes) not in (*ladders.decode[-1:], *ladders.mixed[-1:]):
        return False
    if ladders.mode is CUDAGraphMode.PIECEWISE and ladders.max_num_seqs not in sizes:
        return False
    return all((pad_to_capture_size(sizes, n) or 0) <= 4 * n for n in range(1, max(sizes) + 1))


def best_by_trying_all(
    ladders: Ladders, batches: BatchCounts, price: Price, weigh: Weigh, budget: int
) -> dict[int, float]:
    """Return the least cost of all lists up to each weight at which it becomes less."""
    top = max((*ladders.decode, *ladders.mixed))
    least: dict[int, float] = {}
    for count in range(1, top + 1):
        for sizes in combinations(range(1, top + 1), count):
            weight = sum(map(weigh, sizes))
            if weight <= budget and keeps_the_rules(sizes, ladders):
                cost = cost_of(use_of(with_sizes(ladders, sizes), batches, price))
                least[weight] = min(cost, least.get(weight, cost))
    front: dict[int, float] = {}
    for weight, cost in sorted(least.items()):
        if cost < min(front.values(), default=float("inf")):
            front[weight] = cost
    return front


@pytest.mark.parametrize("unit", ["sizes", "graphs"])
@given(
    mode=st.sampled_from(WITH_GRAPHS),
    limits=LIMITS,
    decode=STEPS,
    mixed=STEPS,
    more_ms=STEP_MS,
    budget=st.integers(1, 40),
)
@example(CUDAGraphMode.FULL, (4, 9), {3: 5}, {5: 1}, [1] * 24, 40)
def test_no_other_list_of_sizes_costs_less(
    unit: str,
    mode: CUDAGraphMode,
    limits: tuple[int, int],
    decode: dict[int, int],
    mixed: dict[int, int],
    more_ms: list[int],
    budget: int,
) -> None:
    """For every budget, by trying all lists; costs are any that do not fall with the size."""
    ladders = build_ladders(mode, *limits)
    decode = {size: steps for size, steps in decode.items() if size <= limits[0]}
    mixed = {size: steps for size, steps in mixed.items() if size <= limits[1]}
    batches = BatchCounts(decode, mixed)

    def price(is_decode: bool, size: int) -> float:
        return sum(more_ms[: size + 1]) if is_decode else 2 * sum(more_ms[12 : 13 + size])

    weigh = graphs_of(ladders) if unit == "graphs" else lambda size: 1
    fits = fit_sizes(ladders, batches, price, weigh, budget)
    assert {fit.weight: fit.cost for fit in fits} == best_by_trying_all(
        ladders, batches, price, weigh, budget
    )
    for fit in fits:
        assert keeps_the_rules(fit.sizes, ladders)
        fitted = with_sizes(ladders, fit.sizes)
        fitted.check_coverage()
        assert cost_of(use_of(fitted, batches, price)) == fit.cost
        if unit == "graphs":
            assert len(fitted.keys()) == fit.weight


def best(ladders: Ladders, batches: BatchCounts, budget: int) -> Fit:
    return fit_sizes(ladders, batches, computed_tokens, graphs_of(ladders), budget)[-1]


def test_a_server_with_33_streams_gets_a_graph_for_33() -> None:
    ladders = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 64, 512)
    batches = BatchCounts({33: 1000, 32: 20, 5: 1}, {97: 40, 300: 2})
    fit = best(ladders, batches, len(ladders.keys()))
    assert {33, 64, 97, 512} <= set(fit.sizes)
    assert fit.weight <= len(ladders.keys())
    before, after = (
        use_of(each, batches, computed_tokens) for each in (ladders, with_sizes(ladders, fit.sizes))
    )
    assert sum(use.tokens for use in before) == sum(use.tokens for use in after)
    assert sum(use.padding for use in after) < 0.01 * sum(use.padding for use in before)


def test_more_graphs_never_cost_more_and_too_few_are_refused() -> None:
    ladders = build_ladders(CUDAGraphMode.FULL, 256, 8192, max_default_mixed=8192)
    batches = BatchCounts({n: n for n in range(1, 257)}, dict.fromkeys(range(1, 8193, 7), 1))
    fits = fit_sizes(ladders, batches, computed_tokens, graphs_of(ladders), 120)
    assert [fit.weight for fit in fits] == sorted({fit.weight for fit in fits})
    assert [fit.cost for fit in fits] == sorted({fit.cost for fit in fits}, reverse=True)
    least = fits[0].weight
    assert not fit_sizes(ladders, batches, computed_tokens, graphs_of(ladders), least - 1)
    assert fits[0].cost >= fits[-1].cost


def test_without_graphs_there_is_nothing_to_fit() -> None:
    ladders = build_ladders(CUDAGraphMode.NONE, 8, 16)
    assert not fit_sizes(ladders, BatchCounts({3: 1}), computed_tokens, lambda size: 1, 9)
    (use,) = use_of(ladders, BatchCounts({3: 2}), computed_tokens)
    assert (use.size, use.steps, use.tokens, use.padding, use.cost) == (None, 2, 6, 0, 0)


@given(st.integers(1, 1 << 20))
def test_rounded_sizes_are_few_close_and_keep_themselves(size: int) -> None:
    rounded = rounded_size(size)
    assert size <= rounded <= max(256, 1.04 * size)
    assert rounded_size(rounded) == rounded
    assert rounded_size(size + 1) >= rounded


def test_there_are_few_rounded_sizes() -> None:
    assert len({rounded_size(size) for size in range(1, 8193)}) == 256 + 5 * 32


def test_batches_are_counted_by_requests_and_by_tokens() -> None:
    counter = BatchCounter()
    for size in (3, 3, 300):
        counter.count(size, size, decode=True)
    counter.count(100, 4, decode=False)
    counts = counter.counts()
    assert counts == BatchCounts({3: 2, 304: 1}, {100: 1})
    assert counts.num_steps == counter.num_steps == 4
    counter.count(3, 3, decode=True)
    assert counts.decode[3] == 2, "what was told does not change"
    assert counter.counts().plus(counts, -1.0) == BatchCounts({3: 1}, {})


def test_a_size_that_was_rounded_above_the_largest_is_held_by_it() -> None:
    """300 requests count as 304, where no more than 300 may run."""
    ladders = build_ladders(CUDAGraphMode.FULL_DECODE_ONLY, 300, 512)
    fit = best(ladders, BatchCounts({304: 10}), 100)
    assert fit.cost == 3000
    assert fit.sizes[-1] == 300

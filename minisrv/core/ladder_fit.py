"""The capture sizes that fit batches best, for a given number of graphs.

A list of sizes, as `--cudagraph-capture-sizes` takes it, stands for the ladders of decode batches,
of epilogues and of mixed batches at once: each gets the sizes that its batches can have. So one
list is fitted to all batches. It keeps the rules of a covering ladder: the largest sizes are those
that the ladders have now, the number of requests exact, and no batch is padded to more than
`COVERING_RATIO` times its size, however seldom it came. Among the lists that do, the fit finds the
one with the least cost for each number of graphs, exactly, by dynamic programming: the cost of all
batches between two neighbouring sizes depends on these two alone.

Few sizes need to be tried. Take a best list, from the largest size down: a size can be lowered to
the largest batch that it runs, or as far as the rule for the size behind it allows, and the cost
does not grow. So a size is the size of a batch, a largest size, or the least size that another one
of these allows before it, and so on.

Knows: numbers of steps by size, and what a step costs by the size at which it runs. Knows nothing
of how costs are measured, nor of graphs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from minisrv.core.batch_counts import BatchCounts, rounded_size
from minisrv.core.capture_sizes import COVERING_RATIO
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.ladder import Ladders, build_ladders
from minisrv.modes import CUDAGraphMode

Price = Callable[[bool, int], float]
"""Returns the cost of a step by the graph of a size, whether it is one for pure decode. A larger
size never costs less."""

Weigh = Callable[[int], int]
"""Returns what a size takes of the budget: a number of graphs, or of pieces of memory."""


def computed_tokens(decode: bool, size: int) -> float:
    """Return the number of tokens that a step computes, padding included: the `Price` of those who
    have measured no times."""
    return float(size)


def with_sizes(ladders: Ladders, sizes: tuple[int, ...]) -> Ladders:
    """Return the ladders with other capture sizes, as the settings make them of a list of sizes."""
    most, tokens = ladders.max_num_seqs, ladders.max_num_batched_tokens
    return build_ladders(ladders.mode, most, tokens, sizes)


def graphs_of(ladders: Ladders) -> Weigh:
    """Return the function that says how many graphs a capture size stands for: in a FULL
    ladder for decode two of decode and two of epilogues."""
    mixed = int(ladders.mode.mixed_mode is not CUDAGraphMode.NONE)
    decode = 4 if ladders.mode.decode_mode is CUDAGraphMode.FULL else 0
    return lambda size: mixed + (decode if size <= ladders.max_num_seqs else 0)


@dataclass(frozen=True, slots=True)
class RungUse:
    """The steps that a capture size has run, or would have run.

    decode: whether the graph is one for pure decode.
    size: the size; None for steps that run eagerly, without padding.
    tokens: the number of real tokens in the steps.
    padding: the number of padding tokens in them.
    cost: the sum of the steps' costs; 0 where they run eagerly.
    """

    decode: bool
    size: int | None
    steps: float
    tokens: float
    padding: float
    cost: float


def use_of(ladders: Ladders, batches: BatchCounts, price: Price) -> list[RungUse]:
    """Return how batches use ladders of which every graph serves, the smallest size first."""
    dispatcher = Dispatcher(ladders)
    found: dict[tuple[bool, int | None], list[float]] = {}
    for is_decode, counts in ((True, batches.decode), (False, batches.mixed)):
        for size, steps in sorted(counts.items()):
            query_len = ladders.query_len if is_decode else None
            dispatch = dispatcher.dispatch(size, size if is_decode else 1, query_len=query_len)
            padded = dispatch.descriptor.num_tokens
            eager = dispatch.mode is CUDAGraphMode.NONE
            decode_graph = is_decode if eager else dispatch.descriptor.uniform_decode
            use = found.setdefault((decode_graph, None if eager else padded), [0.0] * 4)
            cost = 0.0 if eager else price(decode_graph, padded)
            for index, each in enumerate((1, size, padded - size, cost)):
                use[index] += steps * each
    ordered = sorted(found.items(), key=lambda item: (not item[0][0], item[0][1] or 1 << 62))
    return [RungUse(*key, *use) for key, use in ordered]


def cost_of(uses: Iterable[RungUse]) -> float:
    """Return the cost of all steps that run by a graph."""
    return sum(use.cost for use in uses)


def padded_share(uses: Iterable[RungUse]) -> float:
    """Return the share of padding in the tokens of all steps that run by a graph."""
    by_graph = [use for use in uses if use.size is not None]
    computed = sum(use.tokens + use.padding for use in by_graph)
    return sum(use.padding for use in by_graph) / computed if computed else 0.0


@dataclass(frozen=True, slots=True)
class Fit:
    """A list of capture sizes that costs less than any other with the same weight or less.

    sizes: ascending.
    weight: the sum of what the sizes take of the budget.
    cost: the cost of the batches that run by graphs, whose sizes were rounded (`rounded_size`).
    """

    sizes: tuple[int, ...]
    weight: int
    cost: float


def fit_sizes(
    ladders: Ladders,
    batches: BatchCounts,
    price: Price,
    weigh: Weigh,
    budget: int,
    between: Callable[[], None] = lambda: None,
) -> list[Fit]:
    """Return the best capture sizes for every weight up to the budget at which a better list begins
    to exist, ascending by weight. There is none if the budget is too small for a covering ladder,
    or if the ladders are empty.

    ladders: their mode, limits and largest sizes are kept.
    weigh: gives no size of one kind of ladder more than a larger one.
    between: is called now and then.
    """
    ends = _ends(ladders)
    if not ends:
        return []
    decode, mixed = _steps_up_to(ladders, batches, ends[-1])
    sizes = [0, *_candidates({*decode.sizes, *mixed.sizes}, ends)]
    # The best way to each size, by the weight of all sizes up to it: the cost, and the place of the
    # size before it with the weight up to there.
    ways: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, 0)}]
    for place, size in enumerate(sizes[1:], 1):
        between()
        own, ms = weigh(size), (price(True, size), price(False, size))
        found: dict[int, tuple[float, int, int]] = {}
        for before in range(place - 1, -1, -1):
            smaller = sizes[before]
            if size > COVERING_RATIO * (smaller + 1):
                break
            cost = ms[0] * decode.between(smaller, size) + ms[1] * mixed.between(smaller, size)
            for weight, (spent, _, _) in ways[before].items():
                if weight + own <= budget:
                    known = found.get(weight + own)
                    if known is None or spent + cost < known[0]:
                        found[weight + own] = (spent + cost, before, weight)
            if smaller in ends:
                break  # no list leaves it out
        ways.append(_undominated(found))
    return [
        Fit(_list(sizes, ways, weight), weight, way[0]) for weight, way in sorted(ways[-1].items())
    ]


class _Steps:
    """Numbers of steps by size, of which the sum between any two sizes is known."""

    def __init__(self, counts: Mapping[int, float]) -> None:
        self.sizes = sorted(counts)
        self._sums = [0.0, *accumulate(counts[size] for size in self.sizes)]

    def between(self, smaller: int, size: int) -> float:
        """Return the number of steps larger than `smaller` and at most `size`."""
        first, last = bisect_right(self.sizes, smaller), bisect_right(self.sizes, size)
        return self._sums[last] - self._sums[first]


def _ends(ladders: Ladders) -> list[int]:
    """Return the sizes that every list has, ascending: the number of requests and the number of
    tokens up to which graphs run."""
    ends = set()
    if ladders.mode.decode_mode is not CUDAGraphMode.NONE:
        ends.add(ladders.max_num_seqs)
    if ladders.mixed:
        ends.add(min(ladders.mixed[-1], ladders.max_num_batched_tokens))
    return sorted(ends)


def _steps_up_to(ladders: Ladders, batches: BatchCounts, top: int) -> tuple[_Steps, _Steps]:
    """Return the numbers of the steps that run by graphs for decode, and by others. A size that was
    counted as more than the largest one because it was rounded is taken as that."""
    decode_mode, mixed_mode = ladders.mode.decode_mode, ladders.mode.mixed_mode
    kinds: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for counts, kind, most, serves in (
        (batches.decode, decode_mode is not CUDAGraphMode.FULL, ladders.max_num_seqs, decode_mode),
        (batches.mixed, True, top, mixed_mode),
    ):
        if serves is CUDAGraphMode.NONE:
            continue
        for size, steps in counts.items():
            counted = min(rounded_size(size), most)
            if rounded_size(size) <= rounded_size(most):
                kinds[kind][counted] = kinds[kind].get(counted, 0.0) + steps
    return _Steps(kinds[False]), _Steps(kinds[True])


def _candidates(batches: Iterable[int], ends: list[int]) -> list[int]:
    """Return the sizes that a best list may have, ascending (see the module)."""
    found: set[int] = set()
    left = [*batches, *ends]
    while left:
        size = left.pop()
        if size > 0 and size not in found:
            found.add(size)
            left.append(-(-size // COVERING_RATIO) - 1)
    return sorted(found)


def _undominated(ways: dict[int, tuple[float, int, int]]) -> dict[int, tuple[float, int, int]]:
    """Return the ways that cost less than all that weigh less."""
    kept: dict[int, tuple[float, int, int]] = {}
    least = float("inf")
    for weight in sorted(ways):
        if ways[weight][0] < least:
            kept[weight] = ways[weight]
            least = ways[weight][0]
    return kept


def _list(
    sizes: list[int], ways: list[dict[int, tuple[float, int, int]]], weight: int
) -> tuple[int, ...]:
    """Return the sizes on the best way to the last one."""
    place, found = len(sizes) - 1, []
    while place:
        found.append(sizes[place])
        _, place, weight = ways[place][weight]
    return tuple(reversed(found))

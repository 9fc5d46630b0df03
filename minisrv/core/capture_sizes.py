"""The sizes for which graphs are captured: the default ones, and few of them that hold all batches.

Knows: numbers of requests and of tokens. Knows nothing of what has such a size (see `ladder`).
"""

from __future__ import annotations

import math
from itertools import pairwise

COVERING_RATIO = 4
"""Maximum ratio of the size at which a covering ladder runs a batch to the size of the batch, where
the ladder has sizes close enough to each other."""


def default_decode(top: int) -> tuple[int, ...]:
    """Return 1, 2, 4, then steps of 8 up to 64, of 16 up to 256 and of 32 above, up to `top`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, top, 32)]
    return (*(size for size in sizes if size < top), top)


def default_epilogues(top: int) -> tuple[int, ...]:
    """Return the powers of two below `top`, then `top`. Larger gaps are good enough here: the step
    before the epilogue and the weights of lm_head, which are read once for any number of rows, cost
    much more than a row of padding."""
    sizes = [1 << bits for bits in range(top.bit_length())]
    return (*(size for size in sizes if size < top), top)


def default_mixed(top: int) -> tuple[int, ...]:
    """Return the powers of two up to `top`, from 32 on with the sizes halfway between them, and
    from 2,048 on with three sizes between them: there each token of padding costs its full time."""
    sizes = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    sizes += [quarters << bits for bits in range(9, top.bit_length()) for quarters in range(4, 8)]
    return (*(size for size in sizes if size < top), top)


def covering(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return some of the sizes, the smallest and the largest among them. Behind each comes the
    largest that is at most `COVERING_RATIO` times the smallest batch that needs it; if there is
    none, the next size."""
    chosen = list(sizes[:1])
    for size, larger in pairwise((*sizes[1:], math.inf)):
        if larger > COVERING_RATIO * (chosen[-1] + 1):
            chosen.append(int(size))
    return tuple(chosen)


def reachable(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Return the sizes ascending and without repeats, up to the first one that holds `most`."""
    ascending = sorted(set(sizes))
    below = [size for size in ascending if size < most]
    return (*below, *ascending[len(below) : len(below) + 1])

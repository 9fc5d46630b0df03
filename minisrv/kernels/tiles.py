"""How the programs of a GPU share the product of a few rows and a weight.

`tile` is the one place that chooses, by shapes alone: a share that was chosen by timing at each
start would add up in another order from start to start, and a server should round tomorrow as it
does today. The rules are what did best, or within a few percent of it, on the projections of three
models, and MEASURED has the shapes that no rule fits; both are for an H100, whose programs have 132
SMs to fill. `benchmarks/tiles.py` measures a model's on any card, and prints lines for MEASURED.
Knows neither Triton nor torch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

SMS = 132


class GemvTile(NamedTuple):
    """One row or two, without tensor cores. outputs: of a program. depth: how much of each row of
    the weight it reads at once."""

    outputs: int
    depth: int
    warps: int


class SlicedTile(NamedTuple):
    """Up to 16 rows. outputs: of a program. depth: columns of the weight that a warp takes at
    once."""

    outputs: int
    depth: int
    warps: int


class TallTile(NamedTuple):
    """Up to 32 rows. outputs: of a program. depth: columns of the weight in a stage. splits:
    programs that share an output."""

    outputs: int
    depth: int
    warps: int
    stages: int
    splits: int


Tile = GemvTile | SlicedTile | TallTile

RUNGS = (1, 2, 16, 32)
"""Rows from one to the next have the same tiles; behind the last one are other kernels."""

MAX_SUMS = 128
"""Of a thread that multiplies without tensor cores, in registers."""

SMALL = 1 << 23
"""Elements of a weight: two rows of a larger one are faster on tensor cores."""

MEASURED: dict[tuple[int, int, int], Tile] = {
    (1, 1024, 3072): GemvTile(8, 2048, 8),
    (2, 1024, 3072): GemvTile(8, 2048, 8),
    (1, 4096, 4096): GemvTile(4, 2048, 4),
    (1, 4096, 14336): GemvTile(4, 4096, 4),
    (16, 1024, 2048): TallTile(64, 128, 4, 2, 8),
    (16, 1024, 3072): TallTile(64, 256, 4, 3, 4),
}
"""For up to so many rows, of a weight [out, in] of 16 bits whose product is added."""


@cache
def tile(rows: int, n: int, k: int, itemsize: int, *, gated: bool, add: bool) -> Tile:
    """For `rows` times a weight [n, k], gated or added to what is there: see `kernels.linear`."""
    rung = next(rung for rung in RUNGS if rows <= rung)
    if add and itemsize == 2 and (rung, n, k) in MEASURED:
        return MEASURED[rung, n, k]
    if rung == 1 or (rung == 2 and n * k <= SMALL):
        return _gemv(rung, k, gated, add)
    outputs = n // 2 if gated else n
    if rung <= 16 and k <= 1024 and itemsize == 2:
        sliced = SlicedTile(16 if gated else 32, 256, 4)
        if outputs <= 2 * SMS * sliced.outputs:
            return sliced
    return _tall(outputs, k, itemsize, gated)


def describe(found: Tile) -> str:
    """For `minisrv plan`."""
    text = f"{type(found).__name__.removesuffix('Tile').lower()} {found.outputs}x{found.depth}"
    text += f", {found.warps} warp{'s' * (found.warps > 1)}"
    if isinstance(found, TallTile) and found.splits > 1:
        text += f", {found.splits} splits"
    return text


def _gemv(rows: int, k: int, gated: bool, add: bool) -> GemvTile:
    """A thread has as many sums as MAX_SUMS at most."""
    width = _power_of_2(2 * k - 1)  # that holds k
    if add:
        depth = min(4096, width)
        return GemvTile(4, depth, min(8, max(1, depth // 256)))
    depth = max(64, min(1024, width // 2))
    if gated:
        return GemvTile(4, depth, max(1, depth // 256) if k <= 2048 or rows > 1 else 2)
    return GemvTile(8, depth, 2 if rows * depth <= 1024 else 4)


def _tall(outputs: int, k: int, itemsize: int, gated: bool) -> TallTile:
    """As many splits as there is room for beside each other, of a tile at least."""
    wide, narrow = (256, 128) if itemsize == 2 else (64, 32)
    parts = -(-outputs // 64)
    if parts > SMS:  # more than one behind the other
        return TallTile(128, narrow, 8, 3, 1) if gated else TallTile(32, narrow, 4, 3, 1)
    splits = min(8, _power_of_2(max(1, 128 // parts)), _power_of_2(max(1, k // wide)))
    return TallTile(64, wide, 4, 2 if gated else 3, splits)


def _power_of_2(number: int) -> int:
    """The largest one that is not larger."""
    return 1 << (number.bit_length() - 1)

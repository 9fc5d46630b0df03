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
    """One row, without tensor cores. outputs: of a program. depth: how much of each row of the
    weight it reads at once."""

    outputs: int
    depth: int
    warps: int


class SlicedTile(NamedTuple):
    """Rows of 16 bits. outputs: of a program, whose warps share the columns, SLICE of them each at
    a time. ahead: how many such parts of the weight are on their way."""

    outputs: int
    warps: int
    ahead: int


class TallTile(NamedTuple):
    """Up to 32 rows. outputs: of a program. depth: columns of the weight in a stage. splits:
    programs that share an output."""

    outputs: int
    depth: int
    warps: int
    stages: int
    splits: int


Tile = GemvTile | SlicedTile | TallTile

RUNGS = (1, 8, 16, 32, 64)
"""Rows from one to the next have the same tiles; behind the last one are cuBLAS's."""

MAX_SUMS = 128
"""Of a thread that multiplies without tensor cores, in registers."""

SLICE = 64
"""Columns of 16 bits that a warp multiplies at once: a line of the cache."""

SLICED_ROWS = 32
"""Of a program of `SlicedTile`: two that read the weight for so many rows each are faster than one
for twice as many, whose sums leave no registers for the weight."""

IN_FLIGHT = 256
"""Registers of a thread for what is on its way. That is all it has; what comes first is used while
the rest comes."""

LARGEST_SLICED = {16: 1 << 23, 32: 1 << 23, 64: 1 << 22}
"""Elements of a weight, by rung. Each program reads all of x, and the more rows, the more of that
there is; of a large weight others read less."""

MEASURED: dict[tuple[int, int, int, bool, bool], Tile | None] = {
    (1, 1024, 3072, False, True): GemvTile(8, 2048, 8),
    (1, 4096, 4096, False, True): GemvTile(4, 2048, 4),
    (1, 4096, 14336, False, True): GemvTile(4, 4096, 4),
    (16, 6144, 1024, True, False): SlicedTile(16, 4, 3),
    (32, 6144, 1024, True, False): SlicedTile(16, 4, 3),
}
"""For up to so many rows, of a weight [out, in] of 16 bits, gated, added."""


@cache
def tile(rows: int, n: int, k: int, itemsize: int, *, gated: bool, add: bool) -> Tile | None:
    """For `rows` times a weight [n, k], gated or added to what is there: see `kernels.linear`.
    None: cuBLAS does it."""
    if not 0 < rows <= RUNGS[-1]:
        return None
    rung = next(rung for rung in RUNGS if rows <= rung)
    if itemsize == 2 and (rung, n, k, gated, add) in MEASURED:
        return MEASURED[rung, n, k, gated, add]
    if rung == 1:
        return _gemv(k, gated, add)
    outputs = n // 2 if gated else n
    if itemsize == 2 and n * k <= LARGEST_SLICED.get(rung, n * k):
        return _sliced(rung, outputs, k, gated)
    return _tall(outputs, k, itemsize, gated) if rung <= 32 else None


def part_registers(outputs: int, rows: int, gated: bool) -> int:
    """Registers of a thread for a part of what `SlicedTile` multiplies: of the weight, of x, whose
    rows are padded, and of the norm."""
    padded = min(SLICED_ROWS, max(8, _power_of_2(2 * rows - 1)))
    return (1 + gated) * outputs + padded + 8


def describe(found: Tile | None) -> str:
    """For `minisrv plan`."""
    if found is None:
        return "cuBLAS"
    depth = SLICE * found.warps if isinstance(found, SlicedTile) else found.depth
    text = f"{type(found).__name__.removesuffix('Tile').lower()} {found.outputs}x{depth}"
    text += f", {found.warps} warp{'s' * (found.warps > 1)}"
    if isinstance(found, SlicedTile):
        text += f", {found.ahead} ahead"
    if isinstance(found, TallTile) and found.splits > 1:
        text += f", {found.splits} splits"
    return text


def _gemv(k: int, gated: bool, add: bool) -> GemvTile:
    """A thread has as many sums as MAX_SUMS at most."""
    width = _power_of_2(2 * k - 1)  # that holds k
    if add:
        depth = min(4096, width)
        return GemvTile(4, depth, min(8, max(1, depth // 256)))
    depth = max(64, min(1024, width // 2))
    if gated:
        return GemvTile(4, depth, max(1, depth // 256) if k <= 2048 else 2)
    return GemvTile(8, depth, 2)


def _sliced(rows: int, outputs: int, k: int, gated: bool) -> SlicedTile:
    """Outputs of a program so many that x is not read more often than need be, and so few that
    about half of the SMs have one. All parts ahead if there is room for them."""
    warps = min(8, _power_of_2(max(1, 2 * k // SLICE - 1)))
    width = 64 if k <= (512 if gated else 1024) else 16 if gated and k > 2048 else 32
    while width > 16 and outputs < 64 * width:
        width //= 2
    parts, room = -(-k // (SLICE * warps)), IN_FLIGHT // part_registers(width, rows, gated)
    return SlicedTile(width, warps, parts if parts <= room else min(4, room))


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

"""Chooses how the programs of a GPU share the product of a few rows and a weight.

`tile` is the one place that chooses, by shapes alone: a choice that was timed at each start-up
would make sums add up in another order from one start to the next, and a server should round in the
same way every day. The rules are what was fastest, or within a few percent of it, on the
projections of three models, and MEASURED has the shapes that no rule fits; both are for an H100 or
H200, which have 132 SMs to fill. `benchmarks/tiles.py` measures a model's shapes on any card, and
prints lines for MEASURED. Knows neither Triton nor torch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

SMS = 132


class GemvTile(NamedTuple):
    """A tile for one row, without tensor cores.

    outputs: the number of outputs of a program.
    depth: the number of elements of each row of the weight that it reads at once.
    warps: the number of warps of a program.
    """

    outputs: int
    depth: int
    warps: int


class SlicedTile(NamedTuple):
    """A tile for rows of 16-bit elements.

    outputs: the number of outputs of a program, whose warps share the columns, each taking SLICE of
        them at a time.
    warps: the number of warps of a program.
    prefetch: the number of such parts of the weight that are being loaded at a time.
    """

    outputs: int
    warps: int
    prefetch: int


class TallTile(NamedTuple):
    """A tile for up to 32 rows.

    outputs: the number of outputs of a program.
    depth: the number of columns of the weight in a stage.
    warps: the number of warps of a program.
    stages: the number of stages of the software pipeline.
    splits: the number of programs that share an output.
    """

    outputs: int
    depth: int
    warps: int
    stages: int
    splits: int


Tile = GemvTile | SlicedTile | TallTile

ROW_BUCKETS = (1, 8, 16, 32, 64)
"""Numbers of rows at which tiles change: products with more rows than one of these, and at most as
many as the next, have the same tile. Beyond the last one cuBLAS does them."""

MAX_SUMS = 128
"""Maximum number of sums that a thread keeps in registers when it multiplies without tensor
cores."""

FEW_OUTPUTS = 2048
"""Maximum number of outputs of a product of one row that are few for all SMs."""

SLICE = 64
"""Number of 16-bit columns that a warp multiplies at once: one line of the cache."""

SLICED_ROWS = 32
"""Maximum number of rows of a program of `SlicedTile`. Two programs that read the weight for this
many rows each are faster than one for twice as many, whose sums leave no registers for the
weight."""

IN_FLIGHT = 256
"""Number of registers of a thread for data that is being loaded. These are all that it has; data
that has arrived is used while the rest is still being loaded."""

LARGEST_SLICED = {16: 1 << 23, 32: 1 << 23, 64: 1 << 22}
"""Maximum number of elements of a weight for `SlicedTile`, by the entry of `ROW_BUCKETS`. Each
program reads all of x, which grows with the number of rows; for a large weight the other kernels
read less."""

MEASURED: dict[tuple[int, int, int, bool, bool], Tile | None] = {
    (1, 1024, 3072, False, True): GemvTile(8, 2048, 8),
    (1, 1152, 6912, False, False): GemvTile(2, 4096, 4),
    (1, 1536, 1152, False, False): GemvTile(4, 1024, 2),
    (1, 4096, 4096, False, True): GemvTile(4, 2048, 4),
    (1, 4096, 14336, False, True): GemvTile(4, 4096, 4),
    (1, 13824, 1152, True, False): GemvTile(2, 512, 1),
    (1, 16384, 2048, True, False): GemvTile(8, 256, 1),
    (1, 128256, 2048, False, False): GemvTile(2, 2048, 4),
    (1, 262144, 1152, False, False): GemvTile(8, 128, 1),
    (16, 6144, 1024, True, False): SlicedTile(16, 4, 3),
    (32, 6144, 1024, True, False): SlicedTile(16, 4, 3),
}
"""The tile for up to that many rows and a weight [out, in] of 16-bit elements, by (rows, out, in,
gated, added)."""


@cache
def tile(
    rows: int, n: int, k: int, itemsize: int, *, gated: bool, add: bool, normed: bool = True
) -> Tile | None:
    """Return the tile for the product of `rows` rows with a weight [n, k], gated or added to a
    tensor (see `kernels.linear`). None means that cuBLAS does it.

    normed: whether the rows of a gated product are normed; other tiles are for both.
    """
    if not 0 < rows <= ROW_BUCKETS[-1]:
        return None
    bucket = next(bucket for bucket in ROW_BUCKETS if rows <= bucket)
    if itemsize == 2 and (bucket, n, k, gated, add) in MEASURED:
        return MEASURED[bucket, n, k, gated, add]
    if bucket == 1:
        return _gemv(n, k, gated, add)
    outputs = n // 2 if gated else n
    if itemsize == 2 and n * k <= LARGEST_SLICED.get(bucket, n * k):
        return _sliced(bucket, outputs, k, gated)
    return _tall(outputs, k, itemsize, gated, normed) if bucket <= 32 else None


def part_registers(outputs: int, rows: int, gated: bool) -> int:
    """Return the number of registers of a thread for one part of what `SlicedTile` multiplies: for
    the weight, for x, whose rows are padded, and for the norm."""
    padded = min(SLICED_ROWS, max(8, _power_of_2(2 * rows - 1)))
    return (1 + gated) * outputs + padded + 8


def describe(found: Tile | None) -> str:
    """Return the tile as text for `minisrv plan`."""
    if found is None:
        return "cuBLAS"
    depth = SLICE * found.warps if isinstance(found, SlicedTile) else found.depth
    text = f"{type(found).__name__.removesuffix('Tile').lower()} {found.outputs}x{depth}"
    text += f", {found.warps} warp{'s' * (found.warps > 1)}"
    if isinstance(found, SlicedTile):
        text += f", {found.prefetch} ahead"
    if isinstance(found, TallTile) and found.splits > 1:
        text += f", {found.splits} splits"
    return text


def _gemv(n: int, k: int, gated: bool, add: bool) -> GemvTile:
    """Choose a tile in which a thread has at most MAX_SUMS sums. What is added to a residual has
    few outputs, as other products have where n is small: these are shared by more programs, which
    load more of a row at once."""
    width = _power_of_2(2 * k - 1)  # the smallest one that holds k
    if add or (n <= FEW_OUTPUTS and not gated):
        depth = min(4096, width)
        return GemvTile(4, depth, min(8, max(1, depth // 256)))
    depth = max(64, min(1024, width // 2))
    if gated:
        return GemvTile(4, depth, max(1, depth // 256) if k <= 2048 else 2)
    return GemvTile(8, depth, 2)


def _sliced(rows: int, outputs: int, k: int, gated: bool) -> SlicedTile:
    """Choose so many outputs of a program that x is not read more often than necessary, and so few
    that about half of the SMs have a program. All parts are loaded ahead if there is room for
    them."""
    warps = min(8, _power_of_2(max(1, 2 * k // SLICE - 1)))
    width = 64 if k <= (512 if gated else 1024) else 16 if gated and k > 2048 else 32
    while width > 16 and outputs < 64 * width:
        width //= 2
    parts, room = -(-k // (SLICE * warps)), IN_FLIGHT // part_registers(width, rows, gated)
    return SlicedTile(width, warps, parts if parts <= room else min(4, room))


def _tall(outputs: int, k: int, itemsize: int, gated: bool, normed: bool) -> TallTile:
    """Choose as many splits as can run beside each other, each of at least one tile."""
    wide, narrow = (256, 128) if itemsize == 2 else (64, 32)
    parts = -(-outputs // 64)
    stages = (3, 2) if gated else (3, 3)
    if gated and not normed:
        # Triton keeps a stage more in shared memory if x goes to the tensor cores as it is. There
        # is room for that beside two matrices if a stage is half as deep, and there are more.
        wide, narrow, stages = wide // 2, narrow // 2, (4, 4)
    if parts > SMS:  # more than one program has to run after another
        outputs, warps = (128, 8) if gated else (32, 4)
        return TallTile(outputs, narrow, warps, stages[0], 1)
    splits = min(8, _power_of_2(max(1, 128 // parts)), _power_of_2(max(1, k // wide)))
    return TallTile(64, wide, 4, stages[1], splits)


def _power_of_2(number: int) -> int:
    """Return the largest power of 2 that is not larger than `number`."""
    return 1 << (number.bit_length() - 1)

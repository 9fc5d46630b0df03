"""The tiles that are chosen for all shapes: their sizes are powers of two, no work is left out, and
an SM has room for them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from minisrv.kernels.tiles import (
    IN_FLIGHT,
    MAX_SUMS,
    MEASURED,
    ROW_BUCKETS,
    SLICE,
    GemvTile,
    SlicedTile,
    TallTile,
    part_registers,
    tile,
)
from minisrv.model_config import ModelConfig
from minisrv.tools.plan import projections

SHARED_BYTES = 227 * 1024
"""Shared memory in bytes that one program may use on an SM of an H100."""

WIDTHS = [1, 7, 16, 64, 150, 896, 1024, 2048, 3072, 4096, 8192, 14336, 32768]
OUTPUTS = [1, 16, 64, 1024, 2048, 3072, 4096, 6144, 12288, 28672, 151936]


def power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("gated", "add"), [(False, False), (True, False), (False, True)])
def test_every_shape_has_a_tile_that_fits(
    itemsize: int, gated: bool, add: bool, normed: bool
) -> None:
    for rows, outputs, k in product(range(1, ROW_BUCKETS[-1] + 2), OUTPUTS, WIDTHS):
        n = 2 * outputs if gated else outputs
        found = tile(rows, n, k, itemsize, gated=gated, add=add, normed=normed)
        if found is None:
            assert rows > 32
            continue
        assert power_of_2(found.outputs)
        assert power_of_2(found.warps)
        assert found.warps <= 8
        assert isinstance(found, GemvTile) == (rows == 1)
        matrices, padded = 1 + gated, max(8, 1 << (min(rows, 32) - 1).bit_length())
        if isinstance(found, GemvTile):
            assert power_of_2(found.depth)
            assert matrices * found.outputs * found.depth // (32 * found.warps) <= MAX_SUMS
        if isinstance(found, TallTile):
            assert rows <= 32
            assert power_of_2(found.depth)
            assert power_of_2(found.splits)
            assert found.splits * found.depth <= max(k, found.depth), "no split is empty"
            stage = (matrices * found.outputs + max(16, padded)) * found.depth * itemsize
            # Triton needs one stage more where x goes to the tensor cores unchanged.
            assert (found.stages + (not (gated and normed))) * stage <= SHARED_BYTES
        if isinstance(found, SlicedTile):
            assert itemsize == 2
            assert 1 <= found.prefetch <= -(-k // (found.warps * SLICE)), "what is ahead is there"
            assert found.prefetch * part_registers(found.outputs, rows, gated) <= IN_FLIGHT
            assert found.outputs * matrices * padded * 4 * found.warps <= SHARED_BYTES


@pytest.mark.parametrize("rows", [0, ROW_BUCKETS[-1] + 1])
def test_no_rows_and_many_are_the_library_s(rows: int) -> None:
    """No rows, and more rows than the largest size with a tile, are left to the library's
    product."""
    for itemsize, outputs, k in product((2, 4), OUTPUTS, WIDTHS):
        assert tile(rows, outputs, k, itemsize, gated=False, add=False) is None


def test_registers_are_those_of_the_padded_rows() -> None:
    found = [part_registers(32, rows, False) for rows in (1, 8, 9, 16, 17, 32, 64)]
    assert found == [48, 48, 56, 56, 72, 72, 72]
    assert part_registers(32, 8, True) == 80


def test_measured_shapes_come_before_the_rules() -> None:
    """A shape whose best tile was measured gets that one for elements of 2 bytes, and not for
    elements of 4 bytes."""
    for (rows, n, k, gated, add), measured in MEASURED.items():
        assert tile(rows, n, k, 2, gated=gated, add=add) == measured
        assert tile(rows, n, k, 4, gated=gated, add=add) != measured


def test_the_plan_shows_them() -> None:
    """The table of `plan` shows the tile of each product and range of rows."""
    path = Path(__file__).parents[2] / "benchmarks/configs/qwen3-0.6b/config.json"
    table = projections(ModelConfig.from_hf(json.loads(path.read_text())), 2)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[3:10] == [
        ("o", "1024x2048", "1", "gemv 4x2048, 8 warps"),
        ("", "", "2-64", "sliced 16x512, 8 warps, 4 ahead"),
        ("", "", "65 and more", "cuBLAS"),
        ("gate_up", "6144x1024", "1", "gemv 4x512, 2 warps"),
        ("", "", "2-8", "sliced 32x512, 8 warps, 2 ahead"),
        ("", "", "9-32", "sliced 16x256, 4 warps, 3 ahead"),
        ("", "", "33 and more", "cuBLAS"),
    ]
    assert rows[-2:] == [
        ("", "", "9-32", "tall 32x128, 4 warps"),
        ("", "", "33 and more", "cuBLAS"),
    ]
    assert Console(width=200).measure(table).maximum <= 80

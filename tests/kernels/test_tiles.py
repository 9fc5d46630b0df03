"""The tiles of all shapes: powers of two, no work left out, and what an SM has room for."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from minisrv.config import ModelConfig
from minisrv.kernels.tiles import (
    MAX_SUMS,
    MEASURED,
    SMALL,
    SMS,
    GemvTile,
    SlicedTile,
    TallTile,
    tile,
)
from minisrv.plan import projections

SHARED_BYTES = 227 * 1024
"""Of an H100's SM, for one program."""

WIDTHS = [1, 7, 16, 64, 150, 896, 1024, 2048, 3072, 4096, 8192, 14336, 32768]
OUTPUTS = [1, 16, 64, 1024, 2048, 3072, 4096, 6144, 12288, 28672, 151936]


def power_of_2(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("gated", "add"), [(False, False), (True, False), (False, True)])
def test_every_shape_has_a_tile_that_fits(itemsize: int, gated: bool, add: bool) -> None:
    for rows, outputs, k in product(range(1, 33), OUTPUTS, WIDTHS):
        n = 2 * outputs if gated else outputs
        found = tile(rows, n, k, itemsize, gated=gated, add=add)
        assert power_of_2(found.outputs)
        assert power_of_2(found.depth)
        assert power_of_2(found.warps)
        assert found.warps <= 8
        assert isinstance(found, GemvTile) == (rows == 1 or (rows == 2 and n * k <= SMALL))
        matrices, padded = 1 + gated, 16 if rows <= 16 else 32
        if isinstance(found, GemvTile):
            sums = rows * matrices * found.outputs * found.depth // (32 * found.warps)
            assert sums <= MAX_SUMS
        if isinstance(found, TallTile):
            assert power_of_2(found.splits)
            assert found.splits * found.depth <= max(k, found.depth), "no split is empty"
            stage = (matrices * found.outputs + padded) * found.depth * itemsize
            # Triton takes one more where x goes to tensor cores as it is.
            assert (found.stages + (not gated)) * stage <= SHARED_BYTES
        if isinstance(found, SlicedTile):
            assert rows <= 16
            assert found.warps * found.depth >= k, "a warp has one slice"
            assert outputs <= 2 * SMS * found.outputs
            assert padded * found.warps * found.depth * itemsize <= SHARED_BYTES


def test_measured_shapes_come_before_the_rules() -> None:
    for (rows, n, k), measured in MEASURED.items():
        assert tile(rows, n, k, 2, gated=False, add=True) == measured
        assert tile(rows, n, k, 4, gated=False, add=True) != measured


def test_the_plan_shows_them() -> None:
    path = Path(__file__).parents[2] / "benchmarks/configs/qwen3-0.6b/config.json"
    table = projections(ModelConfig.from_hf(json.loads(path.read_text())), 2)
    text = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns][2:] == [
        *("1 row", "2 rows", "3-16 rows", "17-32 rows", "33 rows and more"),
    ]
    assert text[1] == ["4096x1024", "1024x2048", "6144x1024", "1024x3072", "151936x1024"]
    assert text[2][3] == "gemv 8x2048, 8 warps"
    assert text[4][1] == "tall 64x128, 4 warps, 8 splits"
    assert text[4][2] == "sliced 16x256, 4 warps"

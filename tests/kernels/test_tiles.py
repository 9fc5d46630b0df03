"""The tiles of all shapes: powers of two, no work left out, and what an SM has room for."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from minisrv.kernels.tiles import (
    IN_FLIGHT,
    MAX_SUMS,
    MEASURED,
    RUNGS,
    SLICE,
    GemvTile,
    SlicedTile,
    TallTile,
    part_registers,
    tile,
)
from minisrv.model_config import ModelConfig
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
    for rows, outputs, k in product(range(1, RUNGS[-1] + 2), OUTPUTS, WIDTHS):
        n = 2 * outputs if gated else outputs
        found = tile(rows, n, k, itemsize, gated=gated, add=add)
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
            # Triton takes one more where x goes to tensor cores as it is.
            assert (found.stages + (not gated)) * stage <= SHARED_BYTES
        if isinstance(found, SlicedTile):
            assert itemsize == 2
            assert 1 <= found.ahead <= -(-k // (found.warps * SLICE)), "what is ahead is there"
            assert found.ahead * part_registers(found.outputs, rows, gated) <= IN_FLIGHT
            assert found.outputs * matrices * padded * 4 * found.warps <= SHARED_BYTES


@pytest.mark.parametrize("rows", [0, RUNGS[-1] + 1])
def test_no_rows_and_many_are_the_library_s(rows: int) -> None:
    for itemsize, outputs, k in product((2, 4), OUTPUTS, WIDTHS):
        assert tile(rows, outputs, k, itemsize, gated=False, add=False) is None


def test_registers_are_those_of_the_padded_rows() -> None:
    found = [part_registers(32, rows, False) for rows in (1, 8, 9, 16, 17, 32, 64)]
    assert found == [48, 48, 56, 56, 72, 72, 72]
    assert part_registers(32, 8, True) == 80


def test_measured_shapes_come_before_the_rules() -> None:
    for (rows, n, k, gated, add), measured in MEASURED.items():
        assert tile(rows, n, k, 2, gated=gated, add=add) == measured
        assert tile(rows, n, k, 4, gated=gated, add=add) != measured


def test_the_plan_shows_them() -> None:
    path = Path(__file__).parents[2] / "benchmarks/configs/qwen3-0.6b/config.json"
    table = projections(ModelConfig.from_hf(json.loads(path.read_text())), 2)
    text = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns][2:] == [
        *("1 row", "2-8 rows", "9-16 rows", "17-32 rows", "33-64 rows", "65 rows and more"),
    ]
    assert text[1] == ["4096x1024", "1024x2048", "6144x1024", "1024x3072", "151936x1024"]
    assert text[2][3] == "gemv 8x2048, 8 warps"
    assert text[3][2] == "sliced 32x512, 8 warps, 2 ahead"
    assert text[5][4] == "tall 32x128, 4 warps"
    assert text[6] == [text[4][0], text[5][1], "cuBLAS", text[5][3], "cuBLAS"]
    assert set(text[7]) == {"cuBLAS"}

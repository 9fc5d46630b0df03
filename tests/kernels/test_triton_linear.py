"""Products of a few rows, in Triton, against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

pytest.importorskip("triton")
from minisrv.kernels.elementwise import GATES
from minisrv.kernels.linear import LINEAR_METHODS, Norm
from minisrv.kernels.tiles import ROW_BUCKETS, SLICE, GemvTile, SlicedTile, TallTile, Tile
from minisrv.kernels.triton_launch import arrivals
from minisrv.kernels.triton_linear import multiply
from tests.kernels.compile_sliced import WARPS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative tolerances. The interpreter multiplies bfloat16 wrongly, so products by tensor cores
need a GPU for it."""
EPS = 1e-5


def draw(n: int, k: int, dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    """Return x [rows, k], weight [n, k], bias [n], norm [k], residual [rows, n]."""
    g = torch.Generator().manual_seed(n + k)
    shapes = ((rows, k), (n, k), (n,), (k,), (rows, n))
    drawn = [torch.randn(shape, generator=g) for shape in shapes]
    drawn[1] /= k**0.5
    return tuple(tensor.to(DEVICE, dtype) for tensor in drawn)


def expect(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, gate: str | None
) -> Tensor:
    """Return the expected product in float64."""
    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS) * norm.double()
    y = wide @ weight.double().t()
    if bias is not None:
        y += bias.double()
    if gate is not None:
        first, second = y.chunk(2, dim=1)
        y = (silu(first) if gate == "silu" else gelu(first, approximate="tanh")) * second
    return y


def check(tile: Tile, dtype: torch.dtype, n: int, k: int, rows: int, kind: str) -> None:
    """Check one product with the given tile.

    kind: words that say what belongs to the product besides: silu, gelu_tanh, add, norm and bias.
    """
    gate = next((gate for gate in GATES if gate in kind), None)
    x, weight, bias, norm, out = draw(n if gate is None else 2 * n, k, dtype, rows)
    out = out[:, :n].contiguous()
    operands = x, weight, bias if "bias" in kind else None, norm if "norm" in kind else None
    expected = expect(*operands, gate)
    if "add" in kind:
        expected += out.double()
    else:
        out.fill_(torch.nan)
    multiply(*operands, out, EPS, gate, "add" in kind, tile)
    torch.testing.assert_close(out.double(), expected, rtol=RELATIVE[dtype], atol=2e-2)
    assert int(arrivals(out.device).count_nonzero()) == 0


KINDS = [
    *("plain", "norm", "add bias", "norm bias"),
    *("silu", "norm silu", "norm silu bias", "gelu_tanh bias", "norm gelu_tanh"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 40), (5, 7), (64, 64), (33, 150)])
def test_gemv(n: int, k: int, dtype: torch.dtype, kind: str) -> None:
    """The weight's rows are one tile of depth, or several, of which the last is not full."""
    tile = GemvTile(outputs=2, depth=64, warps=4)
    check(tile, dtype, n, k, 1, kind)


SLICED = [(1, 96, 4), (5, 17, 3), (64, 96, 16), (33, 300, 2), (40, 1100, 9), (100, 1100, 40)]
"""(n, k, rows) for which slices are empty, full, or several for a warp, and for which two programs
share the rows."""


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "rows"), SLICED)
def test_sliced(n: int, k: int, rows: int, dtype: torch.dtype, kind: str, ahead: int) -> None:
    for outputs, warps in ((16, 4), (32, 2)):
        check(SlicedTile(outputs, warps, ahead), dtype, n, k, rows, kind)


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize(("k", "outputs", "ahead"), [(1024, 32, 2), (8192, 16, 4)])
def test_sliced_loads_what_tensor_cores_take(k: int, outputs: int, ahead: int, rows: int) -> None:
    """The compiled kernel loads 16 bytes at a time, loads what is `ahead` before it waits for the
    kernel in front, and uses no shared memory between a load and its product."""
    script, arguments = Path(__file__).with_name("compile_sliced.py"), (k, outputs, rows, ahead)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, *map(str, arguments)]
    code = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    before, after = code.split("griddepcontrol.wait")
    part = outputs // 8 * 2  # Number of loads of a thread, of 8 elements each.
    assert before.count("ld.global.v4.b32") == before.count("ld.global") == ahead * part
    parts = k // (WARPS * SLICE)
    expected = (parts - ahead) * part + parts * rows // 8 * 2
    assert after.count("ld.global.v4.b32") == after.count("ld.global") == expected
    assert "shared" not in after[: after.rindex("mma.sync")]
    assert "ldmatrix" not in code


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])], ids=str
)
@pytest.mark.parametrize(("n", "k", "rows"), [(1, 17, 3), (5, 17, 3), (64, 96, 16), (33, 150, 17)])
def test_tall(n: int, k: int, rows: int, dtype: torch.dtype, kind: str, splits: int) -> None:
    """Some products have fewer columns than their splits cover, so that a split may be empty."""
    tile = TallTile(outputs=16, depth=32, warps=1, stages=2, splits=splits)
    check(tile, dtype, n, k, rows, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", sorted({*ROW_BUCKETS, *(bucket + 1 for bucket in ROW_BUCKETS)}))
@pytest.mark.parametrize(("n", "k"), [(6144, 1024), (1024, 3072), (2048, 8192), (15192, 1024)])
def test_the_linear_method_of_a_gpu(n: int, k: int, rows: int) -> None:
    """The method gives right products, whichever kernel and tile it chooses."""
    x, weight, bias, weights, _ = draw(n, k, torch.bfloat16, rows)
    method, norm = LINEAR_METHODS[None](weight, bias), Norm(weights, EPS)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=0.05)

    plain = expect(x, weight, bias, None, None)
    close(method.apply(x), plain)
    out = torch.full_like(plain, torch.nan, dtype=torch.bfloat16)
    method.apply_with_norm(x, norm, out)
    close(out, expect(x, weight, bias, weights, None))
    before = out.double()
    method.apply_with_residual(x, out)
    close(out, before + plain)
    half = torch.empty(rows, n // 2, device=x.device, dtype=x.dtype)
    for gate in GATES:
        method.apply_gated(x, norm, gate, half)
        close(half, expect(x, weight, bias, weights, gate))
        method.apply_gated(x, None, gate, half)
        close(half, expect(x, weight, bias, None, gate))

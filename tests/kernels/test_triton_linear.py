"""A few rows times a weight, in Triton: against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from minisrv.kernels.linear import lay_out
from minisrv.kernels.triton_linear import gemv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(n: int, k: int, dtype: torch.dtype, rows: int = 1) -> tuple[torch.Tensor, ...]:
    """x [rows, k], weight [n, k], bias [n], residual [rows, n]."""
    g = torch.Generator().manual_seed(n + k)
    shapes = ((rows, k), (n, k), (n,), (rows, n))
    return tuple(torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize(("n", "k", "rows"), [(5, 7, 1), (64, 64, 4), (33, 1500, 3), (8, 40, 2)])
def test_gemv(n: int, k: int, rows: int, dtype: torch.dtype, add: bool, biased: bool) -> None:
    x, weight, bias, out = draw(n, k, dtype, rows)
    expected = x.double() @ weight.double().t()
    if biased:
        expected += bias.double()
    if add:
        expected += out.double()
    gemv(x, weight, bias if biased else None, out, add=add)
    torch.testing.assert_close(out.double(), expected, rtol=RELATIVE[dtype], atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 33])
@pytest.mark.parametrize(("n", "k"), [(6144, 1024), (1024, 3072), (2048, 8192), (151936, 1024)])
def test_a_laid_out_weight(n: int, k: int, rows: int) -> None:
    """One row or several, whoever multiplies."""
    _, weight, bias, _ = draw(n, k, torch.bfloat16)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    linear = lay_out(weight, bias)
    expected = x.double() @ weight.double().t() + bias.double()
    out = torch.full_like(expected, torch.nan, dtype=torch.bfloat16)
    linear.write_to(out, x)
    for found in (linear(x), out):
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=0.3)
    linear.add_to(out, x)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=2**-6, atol=0.6)

"""RMSNorm, gated linear units and the gather of a table's rows, compiled and by torch, against
float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, silu

from minisrv.kernels import (
    add_rms_norm,
    add_rms_norm_op,
    elementwise,
    gelu_tanh_and_mul,
    gelu_tanh_and_mul_op,
    rms_norm,
    rms_norm_op,
    silu_and_mul,
    silu_and_mul_op,
    take_rows,
    take_rows_op,
)

pytest.importorskip("triton")
from minisrv.kernels.triton_elementwise import add_rms_norm as triton_add_rms_norm
from minisrv.kernels.triton_elementwise import take_rows as triton_take_rows

SHAPES = {"rows": st.integers(0, 9), "size": st.integers(1, 70), "seed": st.integers(0, 1000)}
FUNCTIONS = {silu_and_mul: silu, gelu_tanh_and_mul: partial(gelu, approximate="tanh")}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative tolerance: half a unit in the last place, and the error of the arithmetic in float32."""


def both_ways(op: Any, *args: Tensor, shape: tuple[int, int], **kwargs: Any) -> Iterator[Tensor]:
    """Yield what the op writes to `out`, which is filled with NaN before: once compiled, and once
    by torch."""
    for by_torch in (False, True):
        out = torch.full(shape, torch.nan, dtype=args[0].dtype)
        with pytest.MonkeyPatch.context() as patch:
            if by_torch:
                patch.setattr(elementwise, "_compiled", lambda *_: None)
            op(*args, out, **kwargs)
        yield out


@settings(max_examples=200)
@given(dtype=DTYPES, scale=st.sampled_from([1e-3, 1.0, 100.0]), **SHAPES)
def test_rms_norm(dtype: torch.dtype, scale: float, rows: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(rows, size, generator=generator)).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for out in both_ways(rms_norm, x, weight, shape=(rows, size), eps=1e-6):
        torch.testing.assert_close(out.double(), expected, rtol=RELATIVE[dtype], atol=1e-7)


@settings(max_examples=200)
@given(dtype=DTYPES, scale=st.sampled_from([1e-3, 1.0, 100.0]), **SHAPES)
def test_add_rms_norm(dtype: torch.dtype, scale: float, rows: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(rows, size, generator=generator)).to(dtype)
    before = torch.randn(rows, size, generator=generator).to(dtype)
    weight, after = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    residual, alone = torch.empty_like(before), torch.empty_like(before)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.double()
        return wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()

    def op(x: Tensor, out: Tensor) -> None:
        add_rms_norm(x, weight, residual.copy_(before), after, out, eps=1e-6)
        add_rms_norm(x, weight, alone.copy_(before), None, None, eps=1e-6)

    total = before.double() + norm(x, weight)
    for out in both_ways(op, x, shape=(rows, size)):
        torch.testing.assert_close(residual.double(), total, rtol=RELATIVE[dtype], atol=2e-6)
        # What is normed is the residual as it is stored, which the next layers read too.
        expected = norm(residual, after)
        torch.testing.assert_close(out.double(), expected, rtol=RELATIVE[dtype], atol=1e-7)
        assert torch.equal(alone, residual)


@settings(max_examples=200)
@given(dtype=DTYPES, scale=st.sampled_from([0.1, 1.0, 30.0]), **SHAPES)
def test_gates(dtype: torch.dtype, scale: float, rows: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(rows, 2 * size, generator=generator)).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    for op, function in FUNCTIONS.items():
        expected = function(gate) * up
        for out in both_ways(op, x, shape=(rows, size)):
            torch.testing.assert_close(out.double(), expected, rtol=RELATIVE[dtype], atol=1e-6)


def test_large_and_strange_numbers() -> None:
    """Gates far from 0 give 0 or the gate itself, and NaN and infinity come out as torch gives
    them."""
    gates = [-3e38, -1e4, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e4, torch.inf, torch.nan]
    gate = torch.tensor([gates])
    x = torch.cat((gate, torch.ones_like(gate)), dim=-1)
    for op, function in FUNCTIONS.items():
        for out in both_ways(op, x, shape=(1, len(gates))):
            expected = function(gate)
            torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-33, equal_nan=True)
    norms = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [0.0, 0.0]])
    for out in both_ways(rms_norm, norms, torch.ones(2), shape=(3, 2), eps=1e-6):
        assert out[0].isnan().all()
        assert out[1].tolist()[1] == 0.0
        assert out[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    """A row is the same bit for bit alone and among others, also where there is work for several
    threads."""
    x, weight = torch.randn(70, 1000).to(dtype), torch.randn(1000).to(dtype)
    normed, gated = torch.empty_like(x), torch.empty(70, 500, dtype=dtype)
    rms_norm(x, weight, normed, eps=1e-6)
    silu_and_mul(x, gated)
    before = torch.randn(70, 1000).to(dtype)
    totals, both = before.clone(), torch.empty_like(x)
    add_rms_norm(x, weight, totals, weight, both, eps=1e-6)
    row = torch.empty(1, 1000, dtype=dtype)
    for index in (0, 33, 69):
        rms_norm(x[index : index + 1], weight, row, eps=1e-6)
        assert torch.equal(row, normed[index : index + 1])
        silu_and_mul(x[index : index + 1], row[:, :500])
        assert torch.equal(row[:, :500], gated[index : index + 1])
        add_rms_norm(x[index : index + 1], weight, total := before[[index]], weight, row, eps=1e-6)
        assert torch.equal(row, both[index : index + 1])
        assert torch.equal(total, totals[index : index + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 1000), (256, 1024), (7, 3072), (2, 32768)])
def test_on_a_gpu(rows: int, size: int, dtype: torch.dtype) -> None:
    """Triton's kernels, called through the ops, agree with the CPU's."""
    x, weight = torch.randn(rows, 2 * size).to(dtype), torch.randn(size).to(dtype)
    for op, direct, args, kwargs in (
        (rms_norm_op, rms_norm, (x[:, :size].contiguous(), weight), {"eps": 1e-6}),
        (silu_and_mul_op, silu_and_mul, (x,), {}),
        (gelu_tanh_and_mul_op, gelu_tanh_and_mul, (x,), {}),
    ):
        expected, out = (
            torch.empty(rows, size, dtype=dtype),
            torch.empty(rows, size, dtype=dtype, device="cuda"),
        )
        direct(*args, expected, **kwargs)
        op(*(arg.cuda() for arg in args), out, **kwargs)
        torch.testing.assert_close(out.cpu(), expected, rtol=4 * RELATIVE[dtype], atol=1e-6)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 1000), (64, 1152), (7, 3072)])
def test_the_triton_kernel_that_adds_what_it_norms(
    rows: int, size: int, dtype: torch.dtype, second: bool
) -> None:
    """It runs on the GPU where there is one, and otherwise in Triton's interpreter; it agrees with
    the CPU's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, residual = (torch.randn(rows, size).to(dtype) for _ in range(2))
    weight, after = (torch.randn(size).to(dtype) for _ in range(2))
    out = torch.zeros(rows, size, dtype=dtype)
    there = [tensor.to(device, copy=True) for tensor in (x, weight, residual, after, out)]
    op = add_rms_norm_op if device == "cuda" else triton_add_rms_norm
    for function, tensors in ((add_rms_norm, [x, weight, residual, after, out]), (op, there)):
        function(*tensors[:3], *(tensors[3:] if second else (None, None)), eps=1e-6)
    for found, expected in ((there[2], residual), (there[4], out)):
        torch.testing.assert_close(found.cpu(), expected, rtol=4 * RELATIVE[dtype], atol=1e-5)


@pytest.mark.parametrize("size", [1, 64, 1000, 1024, 3072])
@pytest.mark.parametrize("by", [take_rows, triton_take_rows])
def test_rows_of_a_table(by: Callable[..., None], size: int) -> None:
    """Triton's kernel runs on the GPU where there is one, and otherwise in Triton's interpreter."""
    device = "cuda" if by is triton_take_rows and torch.cuda.is_available() else "cpu"
    table, index = torch.randn(40, size, device=device), torch.tensor([39, 0, 7, 39], device=device)
    out = torch.full((4, size), torch.nan, device=device)
    by(table, index, out)
    assert torch.equal(out, table[index])


@pytest.mark.gpu
def test_rows_of_a_table_as_the_op_reaches_them() -> None:
    table, index = torch.randn(40, 1000, device="cuda"), torch.tensor([39, 0], device="cuda")
    out = torch.full((2, 1000), torch.nan, device="cuda")
    take_rows_op(table, index, out)
    assert torch.equal(out, table[index])

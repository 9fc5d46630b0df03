"""Linear kernels against float64, with row counts around every change of kernel and strided
arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minisrv.kernels.linear import (
    INT8_ROWS,
    CUDALinear,
    Int8Linear,
    Linear,
    MatmulLinear,
    OneDNNLinear,
    lay_out,
)

ROWS = (1, 2, INT8_ROWS, INT8_ROWS + 1, 16, 33)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(dtype: torch.dtype, bias: bool, inputs: int = 48) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, inputs, generator=generator) * inputs**-0.5
    return weight.to(dtype), torch.randn(72, generator=generator).to(dtype) if bias else None


def check(linear: Linear, weight: Tensor, bias: Tensor | None, tolerance: float) -> None:
    """Check the call and `add_to` for every number of rows, with `x` a strided part of a larger
    buffer."""
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        buffer = torch.randn(rows + 2, 3 * weight.shape[1], generator=generator).to(weight.dtype)
        x = buffer[1:-1, weight.shape[1] : 2 * weight.shape[1]]
        expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        residual = torch.randn(rows, len(weight), generator=generator).to(weight.dtype)
        sums, address = expected + residual, residual.data_ptr()
        linear.add_to(residual, x)
        assert residual.data_ptr() == address
        found = {"call": (linear(x), expected), "add_to": (residual, sums)}
        for name, (value, wanted) in found.items():
            error = (value.double() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (name, rows, float(error))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", [MatmulLinear, OneDNNLinear, lay_out])
def test_kernels_multiply(kernel: type[Linear], dtype: torch.dtype, bias: bool) -> None:
    if kernel is OneDNNLinear and not isinstance(lay_out(*make(dtype, bias)), OneDNNLinear):
        pytest.skip(f"oneDNN has no {dtype} on this machine")
    weight, added = make(dtype, bias)
    check(kernel(weight, added), weight, added, TOLERANCE[dtype])  # type: ignore[call-arg]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [48, 41], ids=["kernel's width", "a width it cannot read"])
def test_int8_is_close_to_its_own_values(inputs: int, bias: bool) -> None:
    """The int8 product is as close to that of the rounded weights as bfloat16 is. A width of 41
    columns, which would crash torch's kernel, must work too."""
    weight, added = make(torch.bfloat16, bias, inputs)
    scale = (weight.abs().amax(dim=1).float() / 127).bfloat16().double()[:, None]
    rounded = (weight.double() / scale).round() * scale
    check(Int8Linear(weight, added), rounded.bfloat16(), added, TOLERANCE[torch.bfloat16])
    assert float((rounded - weight.double()).abs().max()) <= float(scale.max()) / 2 + 1e-6


def test_int8_keeps_rows_of_zeros() -> None:
    weight, _ = make(torch.bfloat16, False)
    weight[5] = 0
    y = lay_out(weight, None, int8=True)(torch.ones(1, 48, dtype=torch.bfloat16))
    assert y[0, 5] == 0
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_does_not_depend_on_the_others(int8: bool) -> None:
    """For a fixed number of rows, which padding keeps fixed, a row's result is the same bit for bit
    whatever the other rows hold."""
    weight, _ = make(torch.bfloat16, False)
    linear = lay_out(weight, None, int8=int8)
    for rows in ROWS[1:]:
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).bfloat16()
        before = linear(x)[0].clone()
        x[1:] = 1e4
        assert torch.equal(linear(x)[0], before), rows


@pytest.mark.parametrize(
    ("capability", "kind"), [((7, 5), MatmulLinear), ((8, 0), CUDALinear), ((9, 0), CUDALinear)]
)
def test_old_gpus_have_no_kernels_for_few_rows(
    capability: tuple[int, int], kind: type[Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU below compute capability 8.0 gets torch's matmul and none of the Triton kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        weight = torch.empty(4, 4, device="cuda", dtype=torch.float16)
        assert type(lay_out(weight, None)) is kind

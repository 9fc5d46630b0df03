"""Linear methods against float64, with row counts around every change of kernel and strided
arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minisrv.config import QUANTIZATIONS
from minisrv.kernels import linear, tiles
from minisrv.kernels.gpu import GPU
from minisrv.kernels.linear import (
    INT8_ROWS,
    LINEAR_METHODS,
    Int8LinearMethod,
    LinearMethod,
    Norm,
    OneDNNLinearMethod,
    TensorCoreLinearMethod,
    UnquantizedLinearMethod,
)

ROWS = (1, 2, INT8_ROWS, INT8_ROWS + 1, 16, 33)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(dtype: torch.dtype, bias: bool, inputs: int = 48) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(72, inputs, generator=generator) * inputs**-0.5
    return weight.to(dtype), torch.randn(72, generator=generator).to(dtype) if bias else None


def check(method: LinearMethod, weight: Tensor, bias: Tensor | None, tolerance: float) -> None:
    """Check the product, alone and added to a residual where the method does that, for every number
    of rows, with `x` a strided part of a larger buffer."""
    generator = torch.Generator().manual_seed(1)
    for rows in ROWS:
        buffer = torch.randn(rows + 2, 3 * weight.shape[1], generator=generator).to(weight.dtype)
        x = buffer[1:-1, weight.shape[1] : 2 * weight.shape[1]]
        expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        found = {"product": (method.apply(x), expected)}
        if method.fuses_residual(rows):
            residual = torch.randn(rows, len(weight), generator=generator).to(weight.dtype)
            sums, address = expected + residual, residual.data_ptr()
            method.apply_with_residual(x, residual)
            assert residual.data_ptr() == address
            found["sum"] = residual, sums
        for name, (value, wanted) in found.items():
            error = (value.double() - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (name, rows, float(error))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "make_method", [UnquantizedLinearMethod, OneDNNLinearMethod, LINEAR_METHODS[None]]
)
def test_methods_multiply(
    make_method: Callable[[Tensor, Tensor | None], LinearMethod], dtype: torch.dtype, bias: bool
) -> None:
    weight, added = make(dtype, bias)
    chosen = LINEAR_METHODS[None](weight, added)
    if make_method is OneDNNLinearMethod and not isinstance(chosen, OneDNNLinearMethod):
        pytest.skip(f"oneDNN has no {dtype} on this machine")
    check(make_method(weight, added), weight, added, TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make_method", [*LINEAR_METHODS.values(), UnquantizedLinearMethod])
def test_fused_forms_are_the_plain_ones(
    make_method: Callable[[Tensor, Tensor | None], LinearMethod], bias: bool
) -> None:
    """A method that does more than multiply gives what its product and the other ops give."""
    weight, added = make(torch.bfloat16, bias)
    method = make_method(weight, added)
    norm = Norm(torch.rand(48).bfloat16(), 1e-5)
    for rows in ROWS:
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).bfloat16()
        for fused, arguments, width in (
            ("apply_with_norm", (norm,), 72),
            ("apply_gated", (norm, "silu"), 36),
            ("apply_gated", (None, "gelu_tanh"), 36),
        ):
            found, expected = (x.new_empty(rows, width) for _ in range(2))
            getattr(method, fused)(x, *arguments, found)
            getattr(LinearMethod, fused)(method, x, *arguments, expected)
            assert torch.equal(found, expected), (fused, rows)


def test_every_quantization_of_the_settings_has_a_method() -> None:
    assert set(LINEAR_METHODS) == {None, *QUANTIZATIONS}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [48, 41], ids=["kernel's width", "a width it cannot read"])
def test_int8_is_close_to_its_own_values(inputs: int, bias: bool) -> None:
    """The int8 product is as close to that of the rounded weights as bfloat16 is. A width of 41
    columns, which would crash torch's kernel, must work too."""
    weight, added = make(torch.bfloat16, bias, inputs)
    scale = (weight.abs().amax(dim=1).float() / 127).bfloat16().double()[:, None]
    rounded = (weight.double() / scale).round() * scale
    check(Int8LinearMethod(weight, added), rounded.bfloat16(), added, TOLERANCE[torch.bfloat16])
    assert float((rounded - weight.double()).abs().max()) <= float(scale.max()) / 2 + 1e-6


def test_int8_keeps_rows_of_zeros() -> None:
    weight, _ = make(torch.bfloat16, False)
    weight[5] = 0
    y = Int8LinearMethod(weight, None).apply(torch.ones(1, 48, dtype=torch.bfloat16))
    assert y[0, 5] == 0
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("quantization", LINEAR_METHODS)
def test_a_row_does_not_depend_on_the_others(quantization: str | None) -> None:
    """For a fixed number of rows, which padding keeps fixed, a row's result is the same bit for bit
    whatever the other rows hold."""
    weight, _ = make(torch.bfloat16, False)
    method = LINEAR_METHODS[quantization](weight, None)
    for rows in ROWS[1:]:
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).bfloat16()
        before = method.apply(x)[0].clone()
        x[1:] = 1e4
        assert torch.equal(method.apply(x)[0], before), rows


@pytest.mark.parametrize(
    ("capability", "kind"),
    [
        ((7, 5), UnquantizedLinearMethod),
        ((8, 0), TensorCoreLinearMethod),
        ((9, 0), TensorCoreLinearMethod),
    ],
)
def test_old_gpus_have_no_kernels_for_few_rows(
    capability: tuple[int, int], kind: type[LinearMethod], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU below compute capability 8.0 gets torch's matmul and none of the Triton kernels."""
    monkeypatch.setattr(linear, "gpu_of", lambda device: GPU(capability, multiprocessors=100))
    with FakeTensorMode():
        weight = torch.empty(4, 4, device="cuda", dtype=torch.float16)
        assert type(LINEAR_METHODS[None](weight, None)) is kind


@pytest.mark.parametrize("bias", [False, True])
def test_kernels_for_few_rows_get_contiguous_rows(bias: bool, monkeypatch: pytest.MonkeyPatch):
    """They read one row directly behind the other. Columns of a wider tensor, as a merged product
    makes them, were once read as if they were that."""
    calls: list[int] = []

    def skinny_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object, **_: object):
        calls.append(len(x))
        out = rest[1]
        assert isinstance(out, Tensor)
        dense = x.as_strided(x.shape, (x.shape[1], 1))
        out.copy_(torch.nn.functional.linear(dense, weight, bias))

    monkeypatch.setattr(tiles, "tile", lambda *args, **kwargs: "a tile")
    monkeypatch.setattr(linear, "skinny_gemm_op", skinny_gemm)
    weight, added = make(torch.float32, bias)
    method = TensorCoreLinearMethod(weight, added)
    wide = torch.randn(4, 2 * weight.shape[1])
    x = wide[:, : weight.shape[1]]
    expected = torch.nn.functional.linear(x, weight, added)
    torch.testing.assert_close(method.apply(x), expected)
    assert not calls
    torch.testing.assert_close(method.apply(x.contiguous()), expected)
    assert calls == [4]

"""The layers: where product and residual meet, and that a compiler traces them as one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from minisrv.kernels.linear import INT8_ROWS, LINEAR_METHODS, LinearMethod, UnquantizedLinearMethod
from minisrv.nn.layers import GatedMLP, Projection, RMSNorm

HIDDEN, INTERMEDIATE = 48, 80
ROWS = (1, INT8_ROWS, INT8_ROWS + 1, 33)
SERVED = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")]
"""Dtype and quantisation of models that a CPU serves."""


class JustApply(LinearMethod):
    """A method with nothing but the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def apply(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def filled(layer: torch.nn.Module) -> None:
    """Fill a layer's parameters with random values."""
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * HIDDEN**-0.5)


def rows_of(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantization", [*LINEAR_METHODS, "just apply"])
@torch.inference_mode()
def test_a_projection_is_added_to_the_residual(
    quantization: str | None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is in the residual's place, for methods that add and for those that only multiply."""
    monkeypatch.setitem(LINEAR_METHODS, "just apply", JustApply)
    layer = Projection(HIDDEN, {"": HIDDEN}, bias=bias, dtype=torch.bfloat16)
    filled(layer)
    layer.prepare(quantization=quantization)
    for rows in ROWS:
        x, residual = rows_of(rows, torch.bfloat16), rows_of(rows + 1, torch.bfloat16)[1:]
        expected, address = residual.double() + layer(x).double(), residual.data_ptr()
        layer.add_to(residual, x)
        assert residual.data_ptr() == address
        torch.testing.assert_close(residual.double(), expected, rtol=2**-7, atol=2**-7)


def test_a_method_that_does_not_add_says_so() -> None:
    method = JustApply(torch.ones(HIDDEN, HIDDEN), None)
    assert not method.fuses_residual(1)
    with pytest.raises(NotImplementedError, match="JustApply"):
        method.apply_with_residual(torch.ones(1, HIDDEN), torch.ones(1, HIDDEN))


@pytest.mark.parametrize("method", ["chosen", UnquantizedLinearMethod])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "quantization"), SERVED, ids=str)
@torch.inference_mode()
def test_an_mlp_is_traced_as_one_graph(
    dtype: torch.dtype,
    quantization: str | None,
    bias: bool,
    method: str | type[LinearMethod],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The traced layer gives the same bits, with the machine's method and with the plain one."""
    if isinstance(method, type):
        monkeypatch.setitem(LINEAR_METHODS, quantization, method)
    mlp = GatedMLP(HIDDEN, INTERMEDIATE, bias=bias, dtype=dtype)
    norm = RMSNorm(HIDDEN, 1e-5, dtype=dtype)
    filled(mlp)
    filled(norm)
    for projection in (mlp.gate_up, mlp.down):
        projection.prepare(quantization=quantization)
    for rows in ROWS:
        torch.compiler.reset()
        backend = CompileCounter()
        traced = torch.compile(mlp.add_to, fullgraph=True, backend=backend)
        expected, found = rows_of(rows, dtype), rows_of(rows, dtype)
        mlp.add_to(expected, norm)
        traced(found, norm)
        assert backend.frame_count == 1
        assert torch.equal(found, expected)

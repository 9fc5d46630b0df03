"""The layers: where product and residual meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisrv.kernels.linear import INT8_ROWS, LINEAR_METHODS, LinearMethod
from minisrv.nn.layers import Projection

HIDDEN = 48
ROWS = (1, INT8_ROWS, INT8_ROWS + 1, 33)


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

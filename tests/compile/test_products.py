"""A product in a compiled program is the one that the model's own forward computes: the kernel is
chosen within the op, by the rows of the step."""

from __future__ import annotations

import pytest
import torch

from minisrv.kernels import tiles
from minisrv.kernels.linear import LINEAR_METHODS, LinearMethod, TracedLinearMethod


@pytest.mark.parametrize("rows", [1, 4, 5, 16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")],
    ids=str,
)
def test_the_op_multiplies_as_the_method_does(
    dtype: torch.dtype, quantization: str | None, bias: bool, rows: int
):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 32, generator=generator).to(dtype) for n in (48, rows))
    added = torch.randn(48, generator=generator).to(dtype) if bias else None
    method: LinearMethod = LINEAR_METHODS[quantization](weight, added)
    traced = TracedLinearMethod(method, 48)
    assert torch.equal(traced.apply(x), method.apply(x))
    again = type(method).of_tensors(method.tensors)
    assert torch.equal(again.apply(x), method.apply(x))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 32, 33, 64, 65, 512])
def test_the_op_takes_the_kernel_of_the_rows_on_a_gpu(rows: int):
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(n, 1024, generator=generator).to("cuda", torch.bfloat16) for n in (1024, rows)
    )
    method: LinearMethod = LINEAR_METHODS[None](weight, None)
    chosen = [
        tiles.tile(count, 1024, 1024, x.itemsize, gated=False, add=False) for count in (1, 512)
    ]
    assert [tile is None for tile in chosen] == [False, True], "there is a choice of kernels"
    assert torch.equal(TracedLinearMethod(method, 1024).apply(x), method.apply(x))

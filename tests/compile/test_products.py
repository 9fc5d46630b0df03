"""A product in a compiled program is the one that the model's own forward computes: the kernel is
chosen within the op, by the rows of the step."""

from __future__ import annotations

import pytest
import torch

from minisrv.kernels import tiles
from minisrv.kernels.linear import LINEAR_METHODS, LinearMethod, Norm
from minisrv.kernels.linear_op import TracedLinearMethod


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
    weight, x, residual = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((48, 32), (rows, 32), (rows, 48))
    )
    added = torch.randn(48, generator=generator).to(dtype) if bias else None
    norm = Norm(torch.randn(32, generator=generator).to(dtype), 1e-5)
    method: LinearMethod = LINEAR_METHODS[quantization](weight, added)
    again = type(method).of_tensors(method.tensors)

    def results(by: LinearMethod) -> list[torch.Tensor]:
        found = [by.apply(x), *(x.new_empty(rows, width) for width in (48, 48, 24, 24))]
        by.apply_to(x, found[1])
        by.apply_with_norm(x, norm, found[2])
        by.apply_gated(x, norm, "silu", found[3])
        by.apply_gated(x, None, "gelu_tanh", found[4])
        by.add_to(x, total := residual.clone())
        return [*found, total]

    expected = results(method)
    for other in (TracedLinearMethod(method, 48), again):
        for wanted, computed in zip(expected, results(other), strict=True):
            assert torch.equal(computed, wanted)


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

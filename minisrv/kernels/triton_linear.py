"""The product of one row and a weight on CUDA, in Triton: `kernels.linear` imports this for its
first row that comes alone.

One row is bound by reading the weight, and cuBLAS, made for tiles, reads it at half of the memory's
speed where it is small. Here a program reads whole rows of the weight and there are many programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 4
BLOCK_K = 1024
"""Outputs of a program, and how much of each it reads at once: 8 KiB of bfloat16 in flight, and for
a small weight, [1024, 1024], still two programs for each of an H100's 132 multiprocessors."""


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, add: bool) -> None:
    """As `kernels.linear.gemv_op`."""
    n, k = weight.shape
    _gemv[(triton.cdiv(n, BLOCK_N),)](
        x,
        weight,
        bias,
        out,
        n,
        K=k,
        ADD=add,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(BLOCK_K, triton.next_power_of_2(k)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["n"])
def _gemv(
    x,
    weight,
    bias,
    out,
    n,
    K: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < n
    source = weight + row.to(tl.int64)[:, None] * K
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        at = begin + tl.arange(0, BLOCK_K)
        mask = there[:, None] & (at < K)[None, :]
        w = tl.load(source + at[None, :], mask, other=0.0).to(tl.float32)
        total += w * tl.load(x + at, at < K, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(total, axis=1)
    if bias is not None:
        y += tl.load(bias + row, there, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(out + row, there, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), there)

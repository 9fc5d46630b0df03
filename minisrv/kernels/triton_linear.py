"""The product of a few rows and a weight on CUDA, in Triton: `kernels.linear` imports this for its
first small batch.

A few rows are bound by reading the weight, and cuBLAS, made for tiles, reads a small one at half of
the memory's speed. Here a program reads whole rows of the weight and there are many programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 2
BLOCK_K = 1024
"""Outputs of a program, and how much of each it reads at once. One row on an H100, us for 2 / 4 / 8
outputs and cuBLAS: 4096 x 1024 4.8 / 5.0 / 4.9 and 5.5, 1024 x 3072 4.3 / 4.7 / 4.9 and 7.9,
2048 x 8192 14.2 / 13.3 / 14.4 and 16.3."""


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, add: bool) -> None:
    """As `kernels.linear.gemv_op`."""
    (rows, k), n = x.shape, len(weight)
    _gemv[(triton.cdiv(n, BLOCK_N),)](
        x,
        weight,
        bias,
        out,
        rows,
        n,
        K=k,
        ADD=add,
        ROWS=triton.next_power_of_2(rows),
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(BLOCK_K, triton.next_power_of_2(k)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows", "n"])
def _gemv(
    x,
    weight,
    bias,
    out,
    rows,
    n,
    K: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N outputs of all rows: the weight is read once."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)[:, None]
    source = weight + output.to(tl.int64)[:, None] * K
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        at = begin + tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(source + at, (output < n)[:, None] & (at < K), other=0.0)
        part = tl.load(x + row * K + at, (row < rows) & (at < K), other=0.0)
        total += w.to(tl.float32)[None, :, :] * part.to(tl.float32)[:, None, :]
    y = tl.sum(total, axis=2)
    there = (row < rows) & (output < n)[None, :]
    place = out + row * n + output[None, :]
    if bias is not None:
        y += tl.load(bias + output, output < n, other=0.0).to(tl.float32)[None, :]
    if ADD:
        y += tl.load(place, there, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), there)

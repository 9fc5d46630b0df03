"""The product of a few rows and a weight on CUDA, in Triton.

The kernels also do the work that lies beside a product in a layer: norm, bias, gate and residual.
`kernels.linear` imports this for its first small batch.

Such a product is bound by reading the weight, in * out * itemsize bytes, and cuBLAS, which is made
for tiles, reads a small weight at half of the memory's speed. Here many programs read a few rows of
the weight each. A program that reads x also norms it: as y = (x * g) W^T / rms(x), the row's scale
is known when its products are. The output of a gate and its partner belong to one program.

There are three kernels, chosen by `kernels.tiles`. `_gemv` is for one row; products are float32,
and each program takes whole rows of the weight. In `gluon_linear.sliced` each warp multiplies its
slice of the columns on tensor cores. `_tall` is for up to 32 rows and a large weight, or for
float32; tensor cores multiply tile after tile of the columns, which several programs may share.

The first part of the weight, or all of it if its rows are short, is loaded while the kernels before
this one run (`triton_launch`). In a step of Qwen3-0.6B at batch 1 on an H100 a layer's four
products take 12.6 us, where a copy moves their 31.5 MB in 10.6, and the output projection's 311 MB
take 97.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels import tiles
from minisrv.kernels.gluon_linear import sliced
from minisrv.kernels.tiles import GemvTile, SlicedTile, Tile
from minisrv.kernels.triton_elementwise import gemm_epilogue
from minisrv.kernels.triton_launch import arrivals, launch_dependents, pdl, wait_for_previous_kernel


def skinny_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    out: Tensor,
    *,
    eps: float,
    gate: str | None,
    add: bool,
) -> None:
    """See `kernels.linear.skinny_gemm_op`."""
    n, k = weight.shape
    gated, normed = gate is not None, norm is not None
    tile = tiles.tile(len(x), n, k, x.itemsize, gated=gated, add=add, normed=normed)
    assert tile is not None, "a product that is not cuBLAS's"
    multiply(x, weight, bias, norm, out, eps, gate, add, tile)


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    out: Tensor,
    eps: float,
    gate: str | None,
    add: bool,
    tile: Tile,
) -> None:
    """Compute `skinny_gemm` with the kernel of `tile`."""
    (rows, k), n = x.shape, out.shape[1]
    operands, parts = (x, weight, bias, norm, out), triton.cdiv(n, tile.outputs)
    shape = {"K": k, "GATE": gate, "ADD": add, "BLOCK_N": tile.outputs, "num_warps": tile.warps}
    padded = triton.next_power_of_2(rows)
    if isinstance(tile, GemvTile):
        _gemv[(parts,)](*operands, n, eps, BLOCK_K=tile.depth, **shape, **pdl())
    elif isinstance(tile, SlicedTile):
        block = min(tiles.SLICED_ROWS, max(8, padded))
        sliced[(parts, triton.cdiv(rows, block))](
            *operands,
            rows,
            n,
            eps,
            ROWS=block,
            BLOCK_K=tiles.SLICE,
            SLICES=tile.warps,
            PREFETCH=tile.prefetch,
            **shape,
            **pdl(),
        )
    else:
        block, partial, counters = max(16, padded), None, None
        if tile.splits > 1:
            width = tile.outputs * (1 if gate is None else 2) + 1
            share = (parts, tile.splits, width, block)
            partial = torch.empty(share, dtype=torch.float32, device=x.device)
            counters = arrivals(x.device)
        _tall[(parts, tile.splits)](
            *operands,
            partial,
            counters,
            rows,
            n,
            eps,
            ROWS=block,
            BLOCK_K=tile.depth,
            SPLITS=tile.splits,
            STAGES=tile.stages,
            **shape,
            **pdl(),
        )


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    norm,
    out,
    n,
    eps,
    K: tl.constexpr,
    GATE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute BLOCK_N outputs of one row."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = output < n
    inside = there[:, None]
    source = weight + output.to(tl.int64)[:, None] * K
    partner = source + tl.cast(n, tl.int64) * K
    column = tl.arange(0, BLOCK_K)[None, :]
    w = tl.load(source + column, inside & (column < K), other=0.0)
    u = w
    if GATE is not None:
        u = tl.load(partner + column, inside & (column < K), other=0.0)
    gain = tl.zeros([1, BLOCK_K], tl.float32)
    if norm is not None:
        gain = tl.load(norm + column, column < K, other=0.0).to(tl.float32)
    first = None
    second = None
    if bias is not None:
        first = tl.load(bias + output, there, other=0.0)
        if GATE is not None:
            second = tl.load(bias + n + output, there, other=0.0)
    launch_dependents(PDL)
    wait_for_previous_kernel(PDL)
    before = None
    if ADD:
        before = tl.load(out + output, there, other=0.0)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    others = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        at = begin + column
        if begin > 0:
            w = tl.load(source + at, inside & (at < K), other=0.0)
            if GATE is not None:
                u = tl.load(partner + at, inside & (at < K), other=0.0)
            if norm is not None:
                gain = tl.load(norm + at, at < K, other=0.0).to(tl.float32)
        value = tl.load(x + at, at < K, other=0.0).to(tl.float32)
        if norm is not None:
            squares += value * value
            value *= gain
        products += w.to(tl.float32) * value
        if GATE is not None:
            others += u.to(tl.float32) * value
    y = tl.sum(products, axis=1)
    z = None
    if GATE is not None:
        z = tl.sum(others, axis=1)
    scale = None
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    y = gemm_epilogue(y, z, scale, first, second, before, GATE)
    tl.store(out + output, y.to(out.dtype.element_ty), there)


@triton.jit
def _multiply(
    x,
    norm,
    rows,
    at,
    last,
    w,
    u,
    y,
    z,
    squares,
    K: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the columns `at` of x, multiplied with w and u of the weight, to the products y and z,
    and their squares to the sums of squares."""
    row = tl.arange(0, ROWS)[:, None]
    value = tl.load(x + row * K + at, (row < rows) & (at < last), other=0.0)
    if norm is not None:
        wide = value.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        wide *= tl.load(norm + at, at < last, other=0.0).to(tl.float32)
        value = wide.to(value.dtype)
    y = tl.dot(w, tl.trans(value), y, input_precision="ieee")
    if GATE is not None:
        z = tl.dot(u, tl.trans(value), z, input_precision="ieee")
    return y, z, squares


@triton.jit(do_not_specialize=["rows"])
def _tall(
    x,
    weight,
    bias,
    norm,
    out,
    partial,
    counters,
    rows,
    n,
    eps,
    K: tl.constexpr,
    GATE: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute BLOCK_N outputs of all rows, from a share of the columns if they are split. The last
    of the programs that share adds the shares up in a fixed order, so that sums do not depend on
    which program was last."""
    launch_dependents(PDL)
    part = tl.program_id(0)
    split = tl.program_id(1)
    output = part * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (output < n)[:, None]
    row = tl.arange(0, ROWS)
    source = weight + output.to(tl.int64)[:, None] * K
    partner = source + tl.cast(n, tl.int64) * K
    column = tl.arange(0, BLOCK_K)[None, :]
    stages: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begins = stages * split // SPLITS * BLOCK_K
    last = tl.minimum(stages * (split + 1) // SPLITS * BLOCK_K, K)
    at = begins + column
    w = tl.load(source + at, inside & (at < last), other=0.0)
    u = w
    if GATE is not None:
        u = tl.load(partner + at, inside & (at < last), other=0.0)
    wait_for_previous_kernel(PDL)
    place = out + row[None, :] * n + output[:, None]
    there = (row < rows)[None, :] & inside
    before = None
    if ADD:
        before = tl.load(place, there, other=0.0)
    y = tl.zeros([BLOCK_N, ROWS], tl.float32)
    z = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    y, z, squares = _multiply(x, norm, rows, at, last, w, u, y, z, squares, K, GATE, ROWS)
    for begin in tl.range(begins + BLOCK_K, last, BLOCK_K, num_stages=STAGES):
        at = begin + column
        w = tl.load(source + at, inside & (at < last), other=0.0)
        u = w
        if GATE is not None:
            u = tl.load(partner + at, inside & (at < last), other=0.0)
        y, z, squares = _multiply(x, norm, rows, at, last, w, u, y, z, squares, K, GATE, ROWS)
    if SPLITS > 1:
        width: tl.constexpr = BLOCK_N * (1 if GATE is None else 2) + 1
        shares = partial + part.to(tl.int64) * SPLITS * width * ROWS
        share = shares + split * width * ROWS
        cell = tl.arange(0, BLOCK_N)[:, None] * ROWS + row[None, :]
        tl.store(share + cell, y)
        if GATE is not None:
            tl.store(share + BLOCK_N * ROWS + cell, z)
        if norm is not None:
            tl.store(share + (width - 1) * ROWS + row, squares)
        tl.debug_barrier()
        done = tl.atomic_add(counters + part, 1, sem="acq_rel")
        if done < SPLITS - 1:
            return
        tl.store(counters + part, 0)
        y = tl.zeros([BLOCK_N, ROWS], tl.float32)
        z = tl.zeros([BLOCK_N, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for other in range(SPLITS):
            share = shares + other * width * ROWS
            y += tl.load(share + cell, cache_modifier=".cg")
            if GATE is not None:
                z += tl.load(share + BLOCK_N * ROWS + cell, cache_modifier=".cg")
            if norm is not None:
                squares += tl.load(share + (width - 1) * ROWS + row, cache_modifier=".cg")
    scale = None
    if norm is not None:
        scale = tl.rsqrt(squares / K + eps)[None, :]
    first = None
    second = None
    if bias is not None:
        first = tl.load(bias + output, output < n, other=0.0)[:, None]
        if GATE is not None:
            second = tl.load(bias + n + output, output < n, other=0.0)[:, None]
    y = gemm_epilogue(y, z if GATE is not None else None, scale, first, second, before, GATE)
    tl.store(place, y.to(out.dtype.element_ty), there)

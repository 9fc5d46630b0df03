"""The product of a few rows and a weight on CUDA, in Triton, and what lies beside it in a layer:
`kernels.linear` imports this for its first small batch.

Such a product is bound by reading the weight, in * out * itemsize bytes of it, and cuBLAS, made for
tiles, reads a small one at half of the memory's speed. Here many programs read a few rows of the
weight each. Whoever reads x anyway norms it: as y = (x * g) W^T / rms(x), the row's scale is known
when its products are. A gate's output and its partner belong to one program.

Up to GEMV_ROWS rows the products are float32's, of a program's whole rows; above, tensor cores
multiply the weight by a tile of 16 or 32 rows.

The first part of the weight is loaded while the kernel before this one runs (`triton_launch`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels.triton_launch import arrivals, follow, pdl

GEMV_ROWS = 2


class GemvTile(NamedTuple):
    """outputs: of a program. depth: how much of each row of the weight it reads at once."""

    outputs: int
    depth: int
    warps: int


class TallTile(NamedTuple):
    """outputs: of a program. depth: columns of the weight in a stage. splits: programs that share
    an output."""

    outputs: int
    depth: int
    warps: int
    stages: int
    splits: int


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    out: Tensor,
    *,
    eps: float,
    gated: bool,
    add: bool,
) -> None:
    """As `kernels.linear.few_rows_op`."""
    rows, k = x.shape
    n = out.shape[1]
    if rows <= GEMV_ROWS:
        gemv(x, weight, bias, norm, out, eps, gated, add, gemv_tile(rows, k, gated))
    else:
        tall(x, weight, bias, norm, out, eps, gated, add, tall_tile(n, k, gated, x.itemsize))


def gemv_tile(rows: int, k: int, gated: bool) -> GemvTile:
    """What read each of fourteen shapes fastest, or nearly so."""
    if rows == 1 and k >= 3072:
        return GemvTile(2, 2048, 4)
    if rows == 1 and k > 1024:
        return GemvTile(2 if gated else 4, 1024, 4)
    return GemvTile(4, 512 if k <= 1024 else 1024, 2)


def tall_tile(n: int, k: int, gated: bool, itemsize: int) -> TallTile:
    """Likewise. As many splits as make some 256 programs, of two tiles at least."""
    outputs = 64
    width, stages, programs = (512, 2, 128) if gated else (256, 3, 256)
    depth = width // itemsize
    splits = triton.next_power_of_2(max(1, programs // triton.cdiv(n, outputs)))
    return TallTile(outputs, depth, 4, stages, max(1, min(splits, 8, k // depth // 2)))


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    out: Tensor,
    eps: float,
    gated: bool,
    add: bool,
    tile: GemvTile,
) -> None:
    """`few_rows` without tensor cores, for any number of rows that fit a program's registers."""
    (rows, k), n = x.shape, out.shape[1]
    _gemv[(triton.cdiv(n, tile.outputs),)](
        x,
        weight,
        bias,
        norm,
        out,
        rows,
        n,
        eps,
        K=k,
        GATED=gated,
        ADD=add,
        ROWS=triton.next_power_of_2(rows),
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        **pdl(),
    )


def tall(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    out: Tensor,
    eps: float,
    gated: bool,
    add: bool,
    tile: TallTile,
) -> None:
    """`few_rows` on tensor cores, the rows padded to 16 or to a power of two."""
    (rows, k), n = x.shape, out.shape[1]
    parts = triton.cdiv(n, tile.outputs)
    partial = counters = None
    block_rows = max(16, triton.next_power_of_2(rows))
    if tile.splits > 1:
        width = tile.outputs * (2 if gated else 1) + 1
        partial = torch.empty(
            parts, tile.splits, width, block_rows, dtype=torch.float32, device=x.device
        )
        counters = arrivals(x.device)
    _tall[(parts, tile.splits)](
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
        K=k,
        GATED=gated,
        ADD=add,
        ROWS=block_rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.depth,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl(),
    )


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit(do_not_specialize=["rows"])
def _gemv(
    x,
    weight,
    bias,
    norm,
    out,
    rows,
    n,
    eps,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of all rows: the weight is read once."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (output < n)[:, None]
    row = tl.arange(0, ROWS)[:, None]
    source = weight + output.to(tl.int64)[:, None] * K
    partner = source + n.to(tl.int64) * K
    column = tl.arange(0, BLOCK_K)[None, :]
    w = tl.load(source + column, inside & (column < K), other=0.0)
    if GATED:
        u = tl.load(partner + column, inside & (column < K), other=0.0)
    follow(PDL)
    total = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    other = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        at = begin + column
        if begin > 0:
            w = tl.load(source + at, inside & (at < K), other=0.0)
            if GATED:
                u = tl.load(partner + at, inside & (at < K), other=0.0)
        part = tl.load(x + row * K + at, (row < rows) & (at < K), other=0.0).to(tl.float32)
        if norm is not None:
            squares += part * part
            part *= tl.load(norm + at, at < K, other=0.0).to(tl.float32)
        total += w.to(tl.float32)[None, :, :] * part[:, None, :]
        if GATED:
            other += u.to(tl.float32)[None, :, :] * part[:, None, :]
    y = tl.sum(total, axis=2)
    z = tl.sum(other, axis=2)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
        y *= scale
        z *= scale
    if bias is not None:
        y += tl.load(bias + output, output < n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            z += tl.load(bias + n + output, output < n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        y = _silu(y) * z
    place = out + row * n + output[None, :]
    there = (row < rows) & (output < n)[None, :]
    if ADD:
        y += tl.load(place, there, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), there)


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
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Take the columns `at` of x, and w and u of the weight, into the products y and z and the sums
    of squares."""
    row = tl.arange(0, ROWS)[:, None]
    value = tl.load(x + row * K + at, (row < rows) & (at < last), other=0.0)
    if norm is not None:
        wide = value.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        wide *= tl.load(norm + at, at < last, other=0.0).to(tl.float32)
        value = wide.to(value.dtype)
    y = tl.dot(w, tl.trans(value), y, input_precision="ieee")
    if GATED:
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
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of all rows, from a share of the columns where they are split. The last
    program of those that share adds the shares up in their order, so that sums do not depend on
    which was last."""
    part = tl.program_id(0)
    split = tl.program_id(1)
    output = part * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (output < n)[:, None]
    row = tl.arange(0, ROWS)
    source = weight + output.to(tl.int64)[:, None] * K
    partner = source + n.to(tl.int64) * K
    column = tl.arange(0, BLOCK_K)[None, :]
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    first = tiles * split // SPLITS * BLOCK_K
    last = tl.minimum(tiles * (split + 1) // SPLITS * BLOCK_K, K)
    at = first + column
    w = tl.load(source + at, inside & (at < last), other=0.0)
    u = w
    if GATED:
        u = tl.load(partner + at, inside & (at < last), other=0.0)
    follow(PDL)
    y = tl.zeros([BLOCK_N, ROWS], tl.float32)
    z = tl.zeros([BLOCK_N, ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    y, z, squares = _multiply(x, norm, rows, at, last, w, u, y, z, squares, K, GATED, ROWS)
    for begin in tl.range(first + BLOCK_K, last, BLOCK_K, num_stages=STAGES):
        at = begin + column
        w = tl.load(source + at, inside & (at < last), other=0.0)
        u = w
        if GATED:
            u = tl.load(partner + at, inside & (at < last), other=0.0)
        y, z, squares = _multiply(x, norm, rows, at, last, w, u, y, z, squares, K, GATED, ROWS)
    if SPLITS > 1:
        width: tl.constexpr = BLOCK_N * (2 if GATED else 1) + 1
        shares = partial + part.to(tl.int64) * SPLITS * width * ROWS
        share = shares + split * width * ROWS
        cell = tl.arange(0, BLOCK_N)[:, None] * ROWS + row[None, :]
        tl.store(share + cell, y)
        if GATED:
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
            if GATED:
                z += tl.load(share + BLOCK_N * ROWS + cell, cache_modifier=".cg")
            if norm is not None:
                squares += tl.load(share + (width - 1) * ROWS + row, cache_modifier=".cg")
    if norm is not None:
        scale = tl.rsqrt(squares / K + eps)[None, :]
        y *= scale
        z *= scale
    if bias is not None:
        y += tl.load(bias + output, output < n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            z += tl.load(bias + n + output, output < n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        y = _silu(y) * z
    place = out + row[None, :] * n + output[:, None]
    there = (row < rows)[None, :] & inside
    if ADD:
        y += tl.load(place, there, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), there)

"""RMSNorm, gated linear units and rows of a table on CUDA, in Triton.

`kernels.elementwise` imports this when it first meets a CUDA tensor. A program takes a row, or a
part of one; the arithmetic is float32. `gemm_epilogue` is the elementwise work that the kernels of
products do besides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels.triton_launch import (
    launch_dependents,
    pdl,
    wait_and_launch_dependents,
    wait_for_previous_kernel,
)

PART = 1024
"""Number of elements of a row that a program of `silu_and_mul`, `gelu_tanh_and_mul` or `take_rows`
takes."""


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """See `kernels.elementwise.rms_norm`."""
    _rms_norm[(len(x),)](x, weight, out, x.shape[1], eps, **_whole_row(x.shape[1]), **pdl())


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    after: Tensor | None,
    out: Tensor | None,
    *,
    eps: float,
) -> None:
    """See `kernels.elementwise.add_rms_norm`."""
    size = x.shape[1]
    _add_rms_norm[(len(x),)](
        x, weight, residual, after, out, size, eps, **_whole_row(size), **pdl()
    )


def _whole_row(size: int) -> dict[str, int]:
    """Return the block and the warps of a program that takes a row of this size."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """See `kernels.elementwise.silu_and_mul`."""
    _gate("silu", gate_up, out)


def gelu_tanh_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """See `kernels.elementwise.gelu_tanh_and_mul`."""
    _gate("gelu_tanh", gate_up, out)


def _gate(gate: str, gate_up: Tensor, out: Tensor) -> None:
    rows, size = out.shape
    _gate_and_mul[(rows, triton.cdiv(size, PART))](
        gate_up, out, size, GATE=gate, BLOCK=PART, num_warps=4, **pdl()
    )


def take_rows(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """See `kernels.elementwise.take_rows`."""
    size = table.shape[1]
    _take_rows[(len(rows), triton.cdiv(size, PART))](
        table, rows, out, size, BLOCK=PART, num_warps=4, **pdl()
    )


@triton.jit
def gated(x, GATE: tl.constexpr):
    """Return the gate of x, float32: x * sigmoid(x) for silu. GELU by tanh is written with a
    sigmoid too, as (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    tl.static_assert(GATE == "silu" or GATE == "gelu_tanh")
    z = x
    if GATE == "gelu_tanh":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-z))


@triton.jit
def gemm_epilogue(y, z, scale, first, second, before, GATE: tl.constexpr):
    """Do the work of a layer that follows a product, in float32: the scale of the row's norm, the
    bias, the gate, and the sum with a tensor.

    y: the product.
    z: the second half of the gated product, of which y is the first.
    scale: the scale of the row's norm.
    first, second: the biases of y and z.
    before: the values to which the result is added.
    GATE: the name of the gate.

    Each is None if it does not apply, and all broadcast with y.
    """
    if scale is not None:
        y *= scale
    if first is not None:
        y += first.to(tl.float32)
    if z is not None:
        if scale is not None:
            z *= scale
        if second is not None:
            z += second.to(tl.float32)
        y = gated(y, GATE) * z
    if before is not None:
        y += before.to(tl.float32)
    return y


@triton.jit
def _take_rows(table, rows, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = table + tl.load(rows + row) * size
    tl.store(out + row * size + at, tl.load(source + at, at < size), at < size)


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    gain = tl.load(weight + at, there, other=0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    value = tl.load(x + row * size + at, there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    value *= scale * gain
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), there)


@triton.jit
def _add_rms_norm(
    x, weight, residual, after, out, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    gain = tl.load(weight + at, there, other=0.0).to(tl.float32)
    next_gain = gain
    if after is not None:
        next_gain = tl.load(after + at, there, other=0.0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    value = tl.load(x + row * size + at, there, other=0.0).to(tl.float32)
    total = tl.load(residual + row * size + at, there, other=0.0).to(tl.float32)
    total += value * tl.rsqrt(tl.sum(value * value) / size + eps) * gain
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual + row * size + at, rounded, there)
    if after is not None:
        value = rounded.to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value) / size + eps) * next_gain
        tl.store(out + row * size + at, value.to(out.dtype.element_ty), there)


@triton.jit
def _gate_and_mul(gate_up, out, size, GATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    gate = tl.load(gate_up + row * 2 * size + at, there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, there, other=0.0).to(tl.float32)
    value = gated(gate, GATE) * up
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), there)

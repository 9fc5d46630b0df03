"""RMSNorm, also of what is added to a residual, gated linear units, and rows of a table.

Each is one op, so that a fused kernel needs one launch. All of them write to `out`, so that a graph
gives them an address. This is the version for CPUs: `cpu.c`, or torch's operations if there is no
compiler. The arithmetic is float32 for any dtype. Knows nothing of layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from minisrv.kernels.native import native
from minisrv.kernels.registration import register_op


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
    """Compute out = x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang and Sennrich 2019).

    x, out: [T, size], contiguous.
    weight: [size], of the same dtype as x and out.
    """
    rows, size = x.shape
    kernel = _compiled("rms_norm", x.dtype)
    if kernel is None:
        out.copy_(torch.rms_norm(x.float(), (size,), weight.float(), eps))
        return
    threads = torch.get_num_threads()
    kernel(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, threads, eps)


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    after: Tensor | None,
    out: Tensor | None,
    *,
    eps: float,
) -> None:
    """Add x / sqrt(mean(x^2) + eps) * weight to a residual, in place; then norm that, as it is in
    its dtype, in the same way: what lies between two products of a model that norms behind its
    products.

    x, residual: [T, size], contiguous.
    weight, after: [size], of the same dtype as x; `after` is the weight of the second norm, None if
        there is none.
    out: [T, size], contiguous, for the second norm; None if there is none.
    """
    rows, size = x.shape
    kernel = _compiled("add_rms_norm", x.dtype, 5)
    if kernel is None:
        normed = torch.rms_norm(x.float(), (size,), weight.float(), eps)
        residual.copy_(normed.add_(residual))
        if after is not None and out is not None:
            rms_norm(residual, after, out, eps=eps)
        return
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (after, out)]
    threads = torch.get_num_threads()
    kernel(
        *(tensor.data_ptr() for tensor in (x, weight, residual)),
        *addresses,
        rows,
        size,
        threads,
        eps,
    )


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """Compute out = silu(gate) * up (Shazeer 2020).

    gate_up: [T, 2 * size], gate beside up, contiguous.
    out: [T, size], contiguous, of the same dtype.
    """
    _gate_and_mul("silu", gate_up, out)


def gelu_tanh_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """Compute out = gelu(gate) * up, with the approximation of GELU by tanh (Hendrycks and Gimpel
    2016); the tensors are those of `silu_and_mul`."""
    _gate_and_mul("gelu_tanh", gate_up, out)


def _gate_and_mul(gate: str, gate_up: Tensor, out: Tensor) -> None:
    rows, size = out.shape
    kernel = _compiled(f"{gate}_and_mul", out.dtype)
    if kernel is None:
        gates, up = gate_up.float().chunk(2, dim=-1)
        out.copy_(_FUNCTIONS[gate](gates).mul_(up))
        return
    kernel(gate_up.data_ptr(), 0, out.data_ptr(), rows, size, torch.get_num_threads(), 0.0)


def _gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU by tanh as x * sigmoid(2 u), which is exact where 1 + tanh(u) is near 0."""
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": _gelu_tanh}


def take_rows(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """Copy the rows at `rows` [R] int64 of table [N, size] to out [R, size]; both are contiguous
    and of the same dtype."""
    torch.index_select(table, 0, rows, out=out)


rms_norm_op = register_op(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor(a!) out, *, float eps) -> ()",
    cpu=rms_norm,
    cuda="minisrv.kernels.triton_elementwise:rms_norm",
)
add_rms_norm_op = register_op(
    "add_rms_norm",
    "(Tensor x, Tensor weight, Tensor(a!) residual, Tensor? after, Tensor(b!)? out, *, float eps) "
    "-> ()",
    cpu=add_rms_norm,
    cuda="minisrv.kernels.triton_elementwise:add_rms_norm",
)
silu_and_mul_op = register_op(
    "silu_and_mul",
    "(Tensor gate_up, Tensor(a!) out) -> ()",
    cpu=silu_and_mul,
    cuda="minisrv.kernels.triton_elementwise:silu_and_mul",
)
gelu_tanh_and_mul_op = register_op(
    "gelu_tanh_and_mul",
    "(Tensor gate_up, Tensor(a!) out) -> ()",
    cpu=gelu_tanh_and_mul,
    cuda="minisrv.kernels.triton_elementwise:gelu_tanh_and_mul",
)
GATES = {"silu": silu_and_mul_op, "gelu_tanh": gelu_tanh_and_mul_op}
"""The op that gates the halves of a product, by the name of the function that is applied to the
first half."""

take_rows_op = register_op(
    "take_rows",
    "(Tensor table, Tensor rows, Tensor(a!) out) -> ()",
    cpu=take_rows,
    cuda="minisrv.kernels.triton_elementwise:take_rows",
)

_Kernel = Callable[..., None]


@cache
def _compiled(name: str, dtype: torch.dtype, tensors: int = 3) -> _Kernel | None:
    """Return the function of `cpu.c` for a dtype, or None if there is none. Its arguments are the
    addresses of so many tensors, rows, size, threads and eps."""
    library = native()
    if library is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    function = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
    address, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[address] * tensors, number, number, number, ctypes.c_double]
    function.restype = None
    return cast(_Kernel, function)

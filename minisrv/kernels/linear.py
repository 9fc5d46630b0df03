"""Linear kernels: x W^T + b, with the weight laid out for the machine.

A kernel may also norm x before the product, and gate the result or add it to a tensor.

Knows: which layouts a machine multiplies fast. `lay_out` is the one place that chooses. Its result
is the same for eager steps and for graphs, because it depends on shapes and dtypes only. Knows
nothing of layers, checkpoints or batches.

On a CPU a small batch is bound by reading the weights, and only a blocked layout reads them at the
speed of the memory. 384 x 1024, one thread of a Zen 5 core, torch 2.13, us for 1 / 4 / 16 / 64
rows: float32 by `F.linear` 107 / 138 / 228 / 580, by [in, out] `mm` 63 / 133 / 232 / 569, in
oneDNN's layout 48 / 54 / 92 / 248; bfloat16 by `F.linear` 66 / 62 / 84 / 165, in oneDNN's layout 27
/ 28 / 50 / 130; int8 weights 13 / 26 / 100 / 390.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minisrv.kernels import tiles
from minisrv.kernels.elementwise import rms_norm_op, silu_and_mul_op

INT8_ROWS = 4
"""Maximum number of rows for which the int8 weights are multiplied as they are. That kernel reads
half of what bfloat16 needs, and its time grows with each row; above this bfloat16 is faster."""

TENSOR_CORES = (8, 0)
"""Compute capability from which on GPUs multiply bfloat16 on tensor cores, as the kernels for few
rows do."""

INT8_STEP = 16
"""Unit of the input width: `_weight_int8pack_mm` reads beyond its arguments unless the width is a
multiple of it."""


class Norm(NamedTuple):
    """The RMSNorm of a row before it is multiplied.

    weight: [in], the weight of the norm.
    eps: the number that is added to the mean square.
    """

    weight: Tensor
    eps: float


class Linear(Protocol):
    """A weight [out, in] and a bias, laid out once. Rows do not influence each other."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product [T, out] of x [T, in], as a new tensor."""

    def write_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        """Write norm(x) W^T + b to out [T, out]."""

    def write_gated_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        """Write silu(gate) * up to out [T, out / 2]; gate and up are the halves of norm(x) W^T +
        b."""

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add x W^T + b to residual [T, out], in place."""


def normed(x: Tensor, norm: Norm) -> Tensor:
    """Return the normed x, [T, in], as a new tensor."""
    out = torch.empty_like(x)
    rms_norm_op(x, norm.weight, out, eps=norm.eps)
    return out


class _Apart(ABC):
    """A linear kernel for which norm, product and gate are one op each."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""

    def write_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        out.copy_(self(normed(x, norm)))

    def write_gated_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        silu_and_mul_op(self(normed(x, norm)), out)


class MatmulLinear(_Apart):
    """A linear kernel of `addmm` and `mm` on a plain weight, which runs everywhere."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # A CPU multiplies float32 faster by rows of [in, out]; everything else uses rows of [out,
        # in].
        turned = weight.dtype == torch.float32 and weight.device.type == "cpu"
        self.weight = weight.t().contiguous() if turned else weight.t()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def write_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        if self.bias is None:
            torch.mm(normed(x, norm), self.weight, out=out)
        else:
            torch.addmm(self.bias, normed(x, norm), self.weight, out=out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


class CUDALinear(MatmulLinear):
    """A linear kernel for CUDA: cuBLAS for batches; for few rows, whose product is bound by reading
    the weight, kernels that also norm and gate. `kernels.tiles` decides between them."""

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_for_few(x):
            return super().__call__(x)
        out = x.new_empty(len(x), self.weight.shape[1])
        self._few_rows(out, x)
        return out

    def write_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        if self._is_for_few(x):
            self._few_rows(out, x, norm)
        else:
            super().write_to(out, x, norm)

    def write_gated_to(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        if self._is_for_few(x, gated=True):
            self._few_rows(out, x, norm, gated=True)
        else:
            silu_and_mul_op(super().__call__(normed(x, norm)), out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        if self._is_for_few(x, add=True):
            self._few_rows(residual, x, add=True)
        else:
            super().add_to(residual, x)

    def _is_for_few(self, x: Tensor, *, gated: bool = False, add: bool = False) -> bool:
        k, n = self.weight.shape
        return tiles.tile(len(x), n, k, x.itemsize, gated=gated, add=add) is not None

    def _few_rows(
        self,
        out: Tensor,
        x: Tensor,
        norm: Norm | None = None,
        *,
        gated: bool = False,
        add: bool = False,
    ) -> None:
        weight, eps = (None, 0.0) if norm is None else norm
        few_rows_op(x, self.weight.t(), self.bias, weight, out, eps=eps, gated=gated, add=add)


class OneDNNLinear(_Apart):
    """A linear kernel of oneDNN, on a weight in the blocked layout that oneDNN prefers: an opaque
    tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        add = torch.ops.mkldnn._linear_pointwise.binary
        residual.copy_(add(x, residual, self.weight, self.bias, "add"))


class Int8Linear(_Apart):
    """A linear kernel with weights of 8 bits and a scale for each output channel, symmetric;
    activations are not quantised.

    Few rows use the 8-bit weights; more rows use the same values in the layout that is fastest for
    them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # The scale is rounded before it divides, so that a scale in bfloat16 costs no accuracy.
        scale = (weight.abs().amax(dim=1).float() / 127).clamp_min(1e-30).to(weight.dtype)
        wide = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.weight = wide.to(torch.int8)
        self.scale = scale
        self.bias = bias
        self.few = INT8_ROWS if weight.shape[1] % INT8_STEP == 0 else 0
        self.many_rows = _dense((wide * scale.float()[:, None]).to(weight.dtype), bias)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.few:
            return self.many_rows(x)
        y = torch._weight_int8pack_mm(x, self.weight, self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        if len(x) > self.few:
            self.many_rows.add_to(residual, x)
        else:
            residual.add_(self(x))


@cache
def _by_triton() -> Callable[..., None]:
    """Return the version for CUDA. It is imported late because Triton may be missing where there is
    no GPU, and takes long to import."""
    from minisrv.kernels.triton_linear import few_rows

    return few_rows


torch.library.define(
    "minisrv::few_rows",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, Tensor(a!) out, *, float eps, "
    "bool gated, bool add) -> ()",
)
torch.library.impl(
    "minisrv::few_rows", "cuda", lambda *args, **kwargs: _by_triton()(*args, **kwargs)
)
torch.library.register_fake("minisrv::few_rows", lambda *args, **kwargs: None)

few_rows_op = torch.ops.minisrv.few_rows.default
"""The op that computes out [T, out] = x [T, in] weight^T + bias for few rows T, for which
`tiles.tile` has a tile; sums are float32.

weight: [out, in]. With `gated`, which requires a norm, it is [2 * out, in], and out is silu of the
    first half times the second.
norm: [in], the weight of the RMSNorm, with `eps`, that is applied to x before.
add: whether the result is added to what `out` holds.

All tensors are contiguous and of the same dtype.
"""


def lay_out(weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> Linear:
    """Return the fastest kernel for a weight [out, in]. The weight may be dropped afterwards."""
    return Int8Linear(weight, bias) if int8 else _dense(weight, bias)


def _dense(weight: Tensor, bias: Tensor | None) -> Linear:
    if weight.device.type == "cuda":
        capable = torch.cuda.get_device_capability(weight.device) >= TENSOR_CORES
        return (CUDALinear if capable else MatmulLinear)(weight, bias)
    if _onednn_takes(weight.dtype):
        return OneDNNLinear(weight, bias)
    return MatmulLinear(weight, bias)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has native kernels for `dtype` on this machine, and not an emulation."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))
        or (dtype == torch.float16 and bool(ops._is_mkldnn_fp16_supported()))
    )

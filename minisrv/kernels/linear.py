"""Linear methods: how a weight is stored and multiplied, x W^T + b.

A method needs to know no more than the product. It may also norm x before the product, gate the
product, or add it to a residual, where one kernel does these together faster.

Knows: which layouts and kernels a machine multiplies fast with. `LINEAR_METHODS` is the one place
that chooses. The choice depends on the quantisation, the device, shapes and dtypes only, so it is
the same for eager steps and for graphs. Knows nothing of layers, checkpoints or batches.

On a CPU a small batch is bound by reading the weights, and only a blocked layout reads them at the
speed of the memory. 384 x 1024, one thread of a Zen 5 core, torch 2.13, us for 1 / 4 / 16 / 64
rows: float32 by `F.linear` 107 / 138 / 228 / 580, by [in, out] `mm` 63 / 133 / 232 / 569, in
oneDNN's layout 48 / 54 / 92 / 248; bfloat16 by `F.linear` 66 / 62 / 84 / 165, in oneDNN's layout 27
/ 28 / 50 / 130; int8 weights 13 / 26 / 100 / 390.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from minisrv.kernels import tiles
from minisrv.kernels.elementwise import GATES, rms_norm_op
from minisrv.kernels.gpu import gpu_of
from minisrv.kernels.registration import register_op

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


def normed(x: Tensor, norm: Norm) -> Tensor:
    """Return the normed x, [T, in], as a new tensor."""
    out = torch.empty_like(x)
    rms_norm_op(x, norm.weight, out, eps=norm.eps)
    return out


class LinearMethod(ABC):
    """How a weight [out, in] and a bias are stored, and how rows are multiplied by them. Rows do
    not influence each other.

    `apply` is all that a method must have. The other operations are for methods that fuse them with
    the product, or write it where it is wanted; here, each is an op of its own.
    """

    weight: Tensor
    bias: Tensor | None

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [T, out], of x [T, in], as a new tensor."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that is stored, of which `of_tensors` makes the method again."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor]) -> Self:
        """Return the method that has these `tensors`. Nothing is computed or copied."""
        method = cls.__new__(cls)
        method.weight, method.bias = tensors[0], tensors[1] if len(tensors) > 1 else None
        return method

    @classmethod
    def merged(cls, methods: Sequence[LinearMethod]) -> LinearMethod:
        """Return the method of the weights of several methods of this class side by side, which are
        copied, unless they lie so already (`methods_of_one_input`)."""
        biases = [method.bias for method in methods if method.bias is not None]
        weight = torch.cat([method.plain_weight() for method in methods])
        return cls(weight, torch.cat(biases) if biases else None)  # type: ignore[call-arg]

    def plain_weight(self) -> Tensor:
        """Return the weight [out, in]."""
        raise NotImplementedError(f"{type(self).__name__} has no plain weight")

    def apply_to(self, x: Tensor, out: Tensor) -> None:
        """Write x W^T + b to out [T, out]."""
        out.copy_(self.apply(x))

    def apply_with_norm(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        """Write norm(x) W^T + b to out [T, out]."""
        self.apply_to(normed(x, norm), out)

    def apply_gated(self, x: Tensor, norm: Norm | None, gate: str, out: Tensor) -> None:
        """Write f(first) * second to out [T, out / 2]; first and second are the halves of norm(x)
        W^T + b, or of x W^T + b without a norm.

        gate: the name of f, a key of `GATES`.
        """
        GATES[gate](self.apply(x if norm is None else normed(x, norm)), out)

    def add_to(self, x: Tensor, residual: Tensor) -> None:
        """Add x W^T + b to residual [T, out], in place, by one kernel where there is one."""
        if self.fuses_residual(x.shape[0]):
            self.apply_with_residual(x, residual)
        else:
            residual.add_(self.apply(x))

    def fuses_residual(self, rows: int) -> bool:
        """Whether `apply_with_residual` may be called with this number of rows."""
        return False

    def apply_with_residual(self, x: Tensor, residual: Tensor) -> None:
        """Add x W^T + b to residual [T, out], in place."""
        raise NotImplementedError(f"{type(self).__name__} does not add the product to a residual")


class UnquantizedLinearMethod(LinearMethod):
    """`mm` and `addmm` on a plain weight, which run everywhere."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # A CPU multiplies float32 faster by rows of [in, out]; everything else uses rows of [out,
        # in].
        turned = weight.dtype == torch.float32 and weight.device.type == "cpu"
        self.weight = weight.t().contiguous() if turned else weight.t()
        self.bias = bias

    @classmethod
    def merged(cls, methods: Sequence[LinearMethod]) -> LinearMethod:
        tensors = [_whole(parts) for parts in zip(*(one.tensors for one in methods), strict=True)]
        found = [tensor for tensor in tensors if tensor is not None]
        return cls.of_tensors(found) if len(found) == len(tensors) else super().merged(methods)

    def parts(self, widths: Sequence[int]) -> list[Self]:
        """Return the methods of so many outputs each, whose weights are views of this one's."""
        tensors = zip(*(one.split(widths, dim=-1) for one in self.tensors), strict=True)
        return [self.of_tensors(list(part)) for part in tensors]

    def plain_weight(self) -> Tensor:
        return self.weight.t()

    def apply(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight)
        return torch.addmm(self.bias, x, self.weight)

    def apply_to(self, x: Tensor, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)

    def fuses_residual(self, rows: int) -> bool:
        return True

    def apply_with_residual(self, x: Tensor, residual: Tensor) -> None:
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


class TensorCoreLinearMethod(UnquantizedLinearMethod):
    """Products on CUDA's tensor cores: cuBLAS for batches; for few rows, whose product is bound by
    reading the weight, kernels that also norm, gate and add. `kernels.tiles` decides between
    them."""

    def apply(self, x: Tensor) -> Tensor:
        if not self._uses_skinny_gemm(x):
            return super().apply(x)
        out = x.new_empty(len(x), self.weight.shape[1])
        self._skinny_gemm(x, None, out)
        return out

    def apply_to(self, x: Tensor, out: Tensor) -> None:
        if self._uses_skinny_gemm(x):
            self._skinny_gemm(x, None, out)
        else:
            super().apply_to(x, out)

    def apply_with_norm(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        if self._uses_skinny_gemm(x):
            self._skinny_gemm(x, norm, out)
        else:
            super().apply_with_norm(x, norm, out)

    def apply_gated(self, x: Tensor, norm: Norm | None, gate: str, out: Tensor) -> None:
        if self._uses_skinny_gemm(x, gated=True):
            self._skinny_gemm(x, norm, out, gate=gate)
        else:
            GATES[gate](super().apply(x if norm is None else normed(x, norm)), out)

    def apply_with_residual(self, x: Tensor, residual: Tensor) -> None:
        if self._uses_skinny_gemm(x, add=True):
            self._skinny_gemm(x, None, residual, add=True)
        else:
            super().apply_with_residual(x, residual)

    def _uses_skinny_gemm(self, x: Tensor, *, gated: bool = False, add: bool = False) -> bool:
        if not x.is_contiguous():  # such as some of the columns of a merged product
            return False
        k, n = self.weight.shape
        return tiles.tile(len(x), n, k, x.itemsize, gated=gated, add=add) is not None

    def _skinny_gemm(
        self,
        x: Tensor,
        norm: Norm | None,
        out: Tensor,
        *,
        gate: str | None = None,
        add: bool = False,
    ) -> None:
        weight, eps = (None, 0.0) if norm is None else norm
        skinny_gemm_op(x, self.weight.t(), self.bias, weight, out, eps=eps, gate=gate, add=add)


class OneDNNLinearMethod(LinearMethod):
    """Products by oneDNN, on a weight in the blocked layout that oneDNN prefers: an opaque
    tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias

    def plain_weight(self) -> Tensor:
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def apply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def fuses_residual(self, rows: int) -> bool:
        return True

    def apply_with_residual(self, x: Tensor, residual: Tensor) -> None:
        add = torch.ops.mkldnn._linear_pointwise.binary
        residual.copy_(add(x, residual, self.weight, self.bias, "add"))


if torch.backends.mkldnn.is_available():
    # Weights without memory have shapes only, and no layout.
    torch.library.register_fake(
        "mkldnn::_reorder_linear_weight", lambda weight, *_: torch.empty_like(weight)
    )
    # A trace needs the shape of an op's result. torch registers it for oneDNN's product, but not
    # for the product to which a tensor is added.
    torch.library.register_fake(
        "mkldnn::_linear_pointwise.binary",
        lambda x, other, weight, bias, attr: x.new_empty(other.shape),
    )


class Int8LinearMethod(LinearMethod):
    """Products by weights of 8 bits with a scale for each output channel, symmetric; activations
    are not quantised.

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
        self.many_rows = _unquantized((wide * scale.float()[:, None]).to(weight.dtype), bias)

    @property
    def few(self) -> int:
        """The number of rows up to which the 8-bit weights are used."""
        return INT8_ROWS if self.weight.shape[1] % INT8_STEP == 0 else 0

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, self.scale, *self.many_rows.tensors]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor]) -> Self:
        method = cls.__new__(cls)
        method.weight, method.scale = tensors[:2]
        method.many_rows = _unquantized_method(tensors[2]).of_tensors(tensors[2:])
        method.bias = method.many_rows.bias
        return method

    @classmethod
    def merged(cls, methods: Sequence[LinearMethod]) -> LinearMethod:
        parts = [method for method in methods if isinstance(method, Int8LinearMethod)]
        many = [part.many_rows for part in parts]
        weight, scale = (
            torch.cat(tensors)
            for tensors in zip(*(part.tensors[:2] for part in parts), strict=True)
        )
        return cls.of_tensors([weight, scale, *type(many[0]).merged(many).tensors])

    def apply(self, x: Tensor) -> Tensor:
        if len(x) > self.few:
            return self.many_rows.apply(x)
        y = torch._weight_int8pack_mm(x, self.weight, self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def fuses_residual(self, rows: int) -> bool:
        return rows > self.few and self.many_rows.fuses_residual(rows)

    def apply_with_residual(self, x: Tensor, residual: Tensor) -> None:
        self.many_rows.apply_with_residual(x, residual)


skinny_gemm_op = register_op(
    "skinny_gemm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, Tensor(a!) out, *, float eps, "
    "str? gate, bool add) -> ()",
    cuda="minisrv.kernels.triton_linear:skinny_gemm",
)
"""The op that computes out [T, out] = x [T, in] weight^T + bias for few rows T, for which
`tiles.tile` has a tile; sums are float32.

weight: [out, in]; [2 * out, in] with a gate.
gate: the name of the function by which the first half of the product becomes a factor of the second
    (`GATES`); None for a product without a gate.
norm: [in], the weight of the RMSNorm, with `eps`, that is applied to x before.
add: whether the result is added to what `out` holds.

All tensors are contiguous and of the same dtype.
"""


def _unquantized(weight: Tensor, bias: Tensor | None) -> LinearMethod:
    """Return the fastest method for a weight in its own dtype on its device."""
    return _unquantized_method(weight)(weight, bias)


def _unquantized_method(
    weight: Tensor,
) -> type[UnquantizedLinearMethod] | type[OneDNNLinearMethod]:
    if (gpu := gpu_of(weight.device)) is not None:
        capable = gpu.capability >= TENSOR_CORES
        return TensorCoreLinearMethod if capable else UnquantizedLinearMethod
    return OneDNNLinearMethod if onednn_takes(weight.dtype) else UnquantizedLinearMethod


METHODS: dict[str, type[LinearMethod]] = {
    method.__name__: method
    for method in (
        UnquantizedLinearMethod,
        TensorCoreLinearMethod,
        OneDNNLinearMethod,
        Int8LinearMethod,
    )
}
"""All methods by name."""


LINEAR_METHODS: dict[str | None, Callable[[Tensor, Tensor | None], LinearMethod]] = {
    None: _unquantized,
    "int8": Int8LinearMethod,
}
"""For each quantisation of the settings, the function that makes the method of a weight [out, in]
and a bias [out]. The weight may be dropped afterwards."""


def methods_of_one_input(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], quantization: str | None
) -> list[LinearMethod]:
    """Return the methods of weights [out, in], by which the same x is multiplied, and their biases,
    which all have or none. Where the layout allows it, the weights lie side by side, so that a
    merged method of them takes no more memory."""
    if quantization is None and len(weights) > 1:
        chosen = _unquantized_method(weights[0])
        if issubclass(chosen, UnquantizedLinearMethod):
            added = [bias for bias in biases if bias is not None]
            whole = chosen(torch.cat(list(weights)), torch.cat(added) if added else None)
            return list(whole.parts([len(weight) for weight in weights]))
    return [
        LINEAR_METHODS[quantization](weight, bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor of which these are parts that lie side by side in the last dimension; None
    if they do not."""
    first, width = parts[0], 0
    for part in parts:
        begin = first.storage_offset() + width * first.stride(-1)
        same_memory = part.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same_memory or part.stride() != first.stride() or part.storage_offset() != begin:
            return None
        width += part.shape[-1]
    shape = (*first.shape[:-1], width)
    return first.as_strided(shape, first.stride(), first.storage_offset())


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has native kernels for `dtype` on this machine, and not an emulation."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return (
        dtype == torch.float32
        or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))
        or (dtype == torch.float16 and bool(ops._is_mkldnn_fp16_supported()))
    )

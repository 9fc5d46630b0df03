"""The layers that every decoder is made of.

Each layer keeps its weights in the layout that suits the machine and says where a checkpoint's
tensors go (`destinations`); merged weights are filled part by part. Knows nothing of the forward
context, of files, or of how layers are put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from minisrv.kernels.elementwise import rms_norm_op, take_rows_op
from minisrv.kernels.linear import LINEAR_METHODS, LinearMethod, Norm

Destination = tuple[str, Tensor]
"""A checkpoint's name without the layer's prefix, and the view of a parameter that it fills."""


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Return an uninitialised parameter on the default device. No parameter is ever trained."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Projection(nn.Module):
    """The projection y = x W^T + b, for one or several checkpoint projections merged side by side.

    parts: the output width of each checkpoint projection, by its name; a single one may be named
        "".
    weight: [out, in] until `prepare`, which makes the linear method of it and drops it.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        width = self.out_features = sum(self.parts.values())
        self.weight: nn.Parameter | None = parameter(width, in_features, dtype=dtype)
        self.bias = parameter(width, dtype=dtype) if bias else None
        self.method: LinearMethod

    def prepare(self, *, quantization: str | None = None) -> None:
        """Store the filled weight as its linear method does. The projection can be used from here
        on.

        quantization: the format of the stored weight, a key of `LINEAR_METHODS`.

        It may be called only once. Raises KeyError if there is no such format.
        """
        assert self.weight is not None, "prepared already"
        self.method = LINEAR_METHODS[quantization](self.weight, self.bias)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection [T, out] of x [T, in]."""
        return self.method.apply(x)

    def write_to(self, out: Tensor, x: Tensor, norm: RMSNorm) -> None:
        """Write norm(x) W^T + b to out [T, out]."""
        self.method.apply_with_norm(x, norm.as_kernel_argument(), out)

    def write_gated_to(self, out: Tensor, x: Tensor, norm: RMSNorm) -> None:
        """Write silu(gate) * up to out [T, out / 2]; gate and up are the halves of norm(x) W^T +
        b."""
        self.method.apply_gated(x, norm.as_kernel_argument(), "silu", out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """Add x W^T + b to residual [T, out], in place."""
        # If each of several GPUs had some of the weight's input columns, their products would have
        # to be summed before, and no method could fuse the residual.
        self.method.add_to(x, residual)

    def destinations(self) -> Iterator[Destination]:
        """Yield the name and the view of each merged weight, which a checkpoint stores as [out,
        in], and of its bias."""
        assert self.weight is not None, "prepared already, so the weight is dropped"
        begin = 0
        for name, width in self.parts.items():
            dot = f"{name}." if name else ""
            yield f"{dot}weight", self.weight[begin : begin + width]
            if self.bias is not None:
                yield f"{dot}bias", self.bias[begin : begin + width]
            begin += width


class RMSNorm(nn.Module):
    """Divides each row by its root mean square, then scales it by a weight."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype)
        self.eps = eps

    def write_to(self, out: Tensor, x: Tensor) -> None:
        """Write norm(x) to out; both are [T, size]."""
        rms_norm_op(x, self.weight, out, eps=self.eps)

    def as_kernel_argument(self) -> Norm:
        """Return the norm as data, for a kernel that norms the rows of its argument itself."""
        return Norm(self.weight, self.eps)

    def destinations(self) -> Iterator[Destination]:
        """Yield the one weight."""
        yield "weight", self.weight


class Embedding(nn.Module):
    """A table of which rows are looked up."""

    def __init__(self, num_embeddings: int, size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(num_embeddings, size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [T, size] of ids [T] int64."""
        out = self.weight.new_empty(len(ids), self.weight.shape[1])
        take_rows_op(self.weight, ids, out)
        return out

    def destinations(self) -> Iterator[Destination]:
        """Yield the one weight."""
        yield "weight", self.weight


class GatedMLP(nn.Module):
    """The MLP down(silu(gate(x)) * up(x)), with gate and up merged."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.intermediate = intermediate
        parts = {"gate_proj": intermediate, "up_proj": intermediate}
        self.gate_up = Projection(hidden, parts, bias=bias, dtype=dtype)
        self.down = Projection(intermediate, {"down_proj": hidden}, bias=bias, dtype=dtype)

    def add_to(self, residual: Tensor, norm: RMSNorm) -> None:
        """Add MLP(norm(residual)) to residual [T, hidden], in place."""
        gated = residual.new_empty(len(residual), self.intermediate)
        self.gate_up.write_gated_to(gated, residual, norm)
        self.down.add_to(residual, gated)

    def destinations(self) -> Iterator[Destination]:
        """Yield the destinations of three checkpoint projections."""
        yield from self.gate_up.destinations()
        yield from self.down.destinations()

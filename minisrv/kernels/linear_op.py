"""The op of a product in a compiled program, with what linear methods fuse with it.

Knows: the operations of a `LinearMethod`. Knows nothing of layouts and kernels, nor of compilers.
"""

from __future__ import annotations

from torch import Tensor

from minisrv.kernels.linear import METHODS, LinearMethod, Norm
from minisrv.kernels.registration import register_op


def linear(
    x: Tensor,
    tensors: list[Tensor],
    norm: Tensor | None,
    out: Tensor,
    *,
    method: str,
    eps: float = 0.0,
    gate: str | None = None,
    add: bool = False,
) -> None:
    """Compute `linear_op` by the operation of the method that fuses what is asked for."""
    by = METHODS[method].of_tensors(tensors)
    if add:
        by.add_to(x, out)
    elif gate is not None:
        by.apply_gated(x, None if norm is None else Norm(norm, eps), gate, out)
    elif norm is None:
        by.apply_to(x, out)
    else:
        by.apply_with_norm(x, Norm(norm, eps), out)


linear_op = register_op(
    "linear",
    "(Tensor x, Tensor[] tensors, Tensor? norm, Tensor(a!) out, *, str method, float eps=0.0, "
    "str? gate=None, bool add=False) -> ()",
    every_device=linear,
)
"""The op of a product for a compiler: out [T, out] = x [T, in] W^T + b. The compiler sees neither
how the weight is stored nor which kernel multiplies: the kernel may depend on the number of rows,
and a compiled program holds for any.

tensors: those of the method.
norm: [in], the weight of the RMSNorm, with `eps`, that is applied to x before; None for no norm.
method: the name of the method, a key of `METHODS`.
gate: the name of the function (`GATES`) by which the first half of the product becomes a factor of
    the second half, which is written to out; None for the whole product.
add: whether the product, of x without a norm, is added to what `out` holds.
"""


class TracedLinearMethod(LinearMethod):
    """Takes the place of a method while a model is traced: the product is one op, with all that
    methods may fuse with it.

    out_features: the width of the product.
    """

    def __init__(self, method: LinearMethod, out_features: int) -> None:
        self._tensors = method.tensors
        self.name = type(method).__name__
        self.out_features = out_features

    @property
    def tensors(self) -> list[Tensor]:
        return self._tensors

    def apply(self, x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], self.out_features)
        self.apply_to(x, out)
        return out

    def apply_to(self, x: Tensor, out: Tensor) -> None:
        linear_op(x, self._tensors, None, out, method=self.name)

    def apply_with_norm(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        linear_op(x, self._tensors, norm.weight, out, method=self.name, eps=norm.eps)

    def apply_gated(self, x: Tensor, norm: Norm | None, gate: str, out: Tensor) -> None:
        weight, eps = (None, 0.0) if norm is None else norm
        linear_op(x, self._tensors, weight, out, method=self.name, eps=eps, gate=gate)

    def add_to(self, x: Tensor, residual: Tensor) -> None:
        linear_op(x, self._tensors, None, residual, method=self.name, add=True)

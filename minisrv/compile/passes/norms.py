"""RMSNorm as models compute it by torch's operations, in the forms that differ by who wrote them.

All forms compute x / sqrt(mean(x^2) + eps) in float32. Llama's rounds that to the dtype of x before
it multiplies by the weight, Gemma's multiplies by 1 + weight in float32, others by the weight in
float32. The kernels of this server round once, at the end; a weight with 1 added is rounded to its
own dtype before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from minisrv.compile.nodes import (
    add_input,
    example,
    operands,
    operation,
    sizes,
    without_casts,
)
from minisrv.compile.values import Shifted, Source, Weight


@dataclass(frozen=True)
class MatchedNorm:
    """An RMSNorm over the last dimension.

    x: what is normed.
    weight: the input of the graph that is the weight [size].
    shift: what is added to the weight.
    eps: the number that is added to the mean square.
    """

    x: fx.Node
    weight: fx.Node
    shift: float
    eps: float

    def weight_source(self, sources: dict[str, Source]) -> Source:
        """Return where the weight is found by which the normed x is multiplied."""
        source = sources[self.weight.name]
        assert isinstance(source, Weight), "found so"
        return Shifted(source.path, self.shift) if self.shift else source

    def weight_input(self, graph: fx.Graph, sources: dict[str, Source]) -> fx.Node:
        """Return the input of the graph that is this weight."""
        name = f"shifted_{self.weight.name}"
        return add_input(graph, sources, name, self.weight_source(sources), example(self.weight))


def match_norm(node: Any, sources: dict[str, Source]) -> MatchedNorm | None:
    """Return the norm whose result a node is; None if it is something else."""
    dtype = getattr(example(node), "dtype", None)
    result = without_casts(node)
    if operation(result) == "rms_norm":
        x, size, weight, eps = (*result.args, *result.kwargs.values(), None)[:4]
        found = _match_weight(weight, dtype, sources)
        if found is None or len(size) != 1 or not isinstance(eps, float):
            return None
        return _checked(MatchedNorm(without_casts(x, dtype), *found, eps), dtype)
    for scaled, factor in operands(result, "mul"):
        found = _match_weight(factor, dtype, sources)
        normed = _match_division(without_casts(scaled), dtype)
        if found is not None and normed is not None:
            return _checked(MatchedNorm(normed[0], *found, normed[1]), dtype)
    return None


def _checked(norm: MatchedNorm, dtype: Any) -> MatchedNorm | None:
    x = example(norm.x)
    fits = x.dtype == dtype and sizes(norm.weight) == sizes(norm.x)[-1:]
    return norm if fits else None


def _match_weight(
    node: Any, dtype: Any, sources: dict[str, Source]
) -> tuple[fx.Node, float] | None:
    """Return the weight that a factor is, and what is added to it."""
    factor, shift = without_casts(node), 0.0
    for weight, number in operands(factor, "add"):
        if isinstance(number, (int, float)):
            factor, shift = without_casts(weight), float(number)
    if not isinstance(factor, fx.Node) or not isinstance(sources.get(factor.name), Weight):
        return None
    value = example(factor)
    return (factor, shift) if value.dim() == 1 and value.dtype == dtype else None


def _match_division(node: Any, dtype: Any) -> tuple[fx.Node, float] | None:
    """Return x and eps of x / sqrt(mean(x^2) + eps)."""
    for value, root in operands(node, "mul"):
        x = without_casts(value, dtype)
        root = without_casts(root)
        is_root = operation(root) == "rsqrt" or (
            operation(root) == "pow" and root.args[1:] == (-0.5,)
        )
        if not is_root:
            continue
        for square, eps in operands(root.args[0], "add"):
            if isinstance(eps, float) and without_casts(_mean_square(square), dtype) is x:
                return x, eps
    return None


def _mean_square(node: Any) -> Any:
    """Return the tensor of whose last dimension a node is the mean square."""
    if operation(node) != "mean":
        return None
    dim = node.kwargs.get("dim", (*node.args, None)[1])
    if dim not in (-1, (-1,), [-1]) or not node.kwargs.get("keepdim", node.args[2:] == (True,)):
        return None
    square = without_casts(node.args[0])
    if operation(square) == "square" or (operation(square) == "pow" and square.args[1:] == (2,)):
        return square.args[0]
    if operation(square) == "mul" and square.args[0] is square.args[1]:
        return square.args[0]
    return None

"""Gated linear units (Shazeer 2020), such as SwiGLU and GEGLU: a product gates its halves itself.

The gates are those that kernels have: silu, and GELU by tanh.
"""

from __future__ import annotations

from torch import fx

from minisrv.compile.nodes import (
    add_method,
    erase_unused,
    example,
    expression,
    is_only_for,
    operands,
    operation,
    replace,
    shape,
    sizes,
    storage,
)
from minisrv.compile.values import Source
from minisrv.kernels.linear_op import linear_op


def fuse_gates(graph: fx.Graph, _: dict[str, Source]) -> int:
    """Let products multiply their halves, gate and up. It holds for any number of rows."""
    products = {
        storage(node.args[3]): node
        for node in graph.nodes
        if node.target == linear_op and not node.kwargs.get("add")
    }
    matches = 0
    for node in list(graph.nodes):
        for gated, up in operands(node, "mul"):
            product = products.get(storage(up))
            gate = _gate(gated)
            if gate is not None and product is not None:
                matches += _fuse(graph, node, gate, gated, up, product)
                break
    return matches


def _gate(node: fx.Node) -> str | None:
    """Return the name of the gate that a node computes; None if it is none of those that products
    have."""
    if operation(node) == "silu":
        return "silu"
    by_tanh = operation(node) == "gelu" and node.kwargs.get("approximate") == "tanh"
    return "gelu_tanh" if by_tanh else None


def _fuse(
    graph: fx.Graph, node: fx.Node, gate: str, gated: fx.Node, up: fx.Node, product: fx.Node
) -> bool:
    x, tensors, norm, out = product.args
    assert isinstance(out, fx.Node), "an op writes to a tensor"
    size = shape(out)[1] // 2
    halves = _is_half(gated.args[0], out, 0) and _is_half(up, out, size)
    if not halves or out.target != "new_empty" or not is_only_for(out, {product, gated, node}):
        return False
    like, rows, _ = out.args
    with graph.inserting_before(product):
        half = add_method(graph, "new_empty", like, rows, size)  # type: ignore[arg-type]
    product.args = (x, tensors, norm, half)
    product.kwargs = {**product.kwargs, "gate": gate}
    with graph.inserting_before(node):
        result = half
        for _ in shape(node)[:-2]:
            result = add_method(graph, "unsqueeze", result, 0)
    replace(node, result)
    erase_unused(node)
    return True


def _is_half(node: object, out: fx.Node, begin: int) -> bool:
    """Whether a node is a half of the columns of a product, in all rows.

    begin: the column at which the half begins.
    """
    if not isinstance(node, fx.Node) or storage(node) != storage(out):
        return False
    value, (tokens, width) = example(node), sizes(out)
    rows = (tokens, width // 2)
    return (
        sizes(node) in (rows, (1, *rows))
        and value.stride()[-2:] == (width, 1)
        and expression(value.storage_offset()) == begin
    )

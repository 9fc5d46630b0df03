"""Products that are added to the residual stream: the product adds itself to it, in place.

In transformers' code a sum is a new tensor. Here it takes the place of the old residual, which
nothing reads any more, so that the stream is one buffer through all pieces.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from minisrv.compile.nodes import (
    as_rows,
    erase_unused,
    example,
    is_owned,
    is_whole,
    nodes_after,
    operands,
    operation,
    replace,
    sizes,
    storage,
)
from minisrv.compile.values import Source
from minisrv.kernels.linear_op import linear_op


def add_to_residuals(graph: fx.Graph, _: dict[str, Source]) -> int:
    """Let products add themselves to the tensor that they are added to. It holds for any number of
    rows."""
    matches = 0
    for node in list(graph.nodes):
        if node.target == linear_op and not _fuses(node):
            matches += _add_in_place(graph, node)
    return matches


def _fuses(node: fx.Node) -> bool:
    """Whether a product is something else than a product already."""
    return node.args[2] is not None or bool(node.kwargs.get("add") or node.kwargs.get("gated"))


def _add_in_place(graph: fx.Graph, node: fx.Node) -> bool:
    x, tensors, _, out = node.args
    total, product = _sum(node, out)
    for term, residual in operands(total, "add"):
        if term is product and isinstance(residual, fx.Node) and _may_change(residual, total, node):
            break
    else:
        return False
    with graph.inserting_before(node):
        rows = as_rows(graph, residual)
    node.args = (x, tensors, None, rows)
    node.kwargs = {**node.kwargs, "add": True}
    replace(total, residual)
    erase_unused(total)
    return True


def _sum(node: fx.Node, out: Any) -> tuple[fx.Node, fx.Node]:
    """Return what is computed of a product and nothing else, and the view of it that is taken."""
    value, user = out, node
    while True:
        users = [one for one in value.users if one is not node]
        if len(users) != 1:
            return user, value
        [user] = users
        if not is_whole(user, value):
            return user, value
        value = user


def _may_change(residual: fx.Node, total: fx.Node, node: fx.Node) -> bool:
    """Whether the sum may take the place of the residual from the product on."""
    a, b = example(residual), example(total)
    memory = storage(residual)
    return (
        operation(residual) is not None
        and residual < node
        and a.dtype == b.dtype
        and sizes(residual) == sizes(total)
        and a.is_contiguous()
        and is_owned(residual)
        and memory not in {storage(one) for one in node.all_input_nodes}
        and not any(
            memory == storage(used)
            for later in nodes_after(node)
            if later is not total
            for used in later.all_input_nodes
        )
    )

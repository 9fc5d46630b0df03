"""Products that are added to the residual stream: the product adds itself to it, in place."""

from __future__ import annotations

from typing import Any

from torch import fx

from minisrv.compile.nodes import as_rows, is_whole, operands, storage
from minisrv.compile.passes.in_place import InPlaceSums
from minisrv.compile.values import Source
from minisrv.kernels.linear_op import linear_op


def add_to_residuals(graph: fx.Graph, _: dict[str, Source]) -> int:
    """Let products add themselves to the tensor that they are added to. It holds for any number of
    rows."""
    sums, matches = InPlaceSums(graph), 0
    for node in list(graph.nodes):
        if node.target == linear_op and not _fuses(node):
            matches += _add_in_place(graph, node, sums)
    return matches


def _fuses(node: fx.Node) -> bool:
    """Whether a product is something else than a product already."""
    return node.args[2] is not None or bool(node.kwargs.get("add") or node.kwargs.get("gate"))


def _add_in_place(graph: fx.Graph, node: fx.Node, sums: InPlaceSums) -> bool:
    """Let a product add itself to a tensor, if it may."""
    x, tensors, _, out = node.args
    total, product = _sum(node, out)
    for term, residual in operands(total, "add"):
        if term is product and sums.may_become(residual, total, node):
            break
    else:
        return False
    if storage(residual) in {storage(one) for one in node.all_input_nodes}:
        return False
    with graph.inserting_before(node):
        rows = as_rows(graph, residual)
    node.args = (x, tensors, None, rows)
    node.kwargs = {**node.kwargs, "add": True}
    sums.put(residual, total)
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

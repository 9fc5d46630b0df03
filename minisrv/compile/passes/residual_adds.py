"""Products that are added to the residual stream: the product adds itself to it, in place.

In transformers' code a sum is a new tensor. Here it takes the place of the old residual, which
nothing reads any more, so that the stream is one buffer through all pieces.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from minisrv.compile.nodes import (
    as_rows,
    erase_unused,
    example,
    is_whole,
    operands,
    operation,
    replace,
    sizes,
    storage,
    users_of_memory,
)
from minisrv.compile.values import Source
from minisrv.kernels.linear_op import linear_op


def add_to_residuals(graph: fx.Graph, _: dict[str, Source]) -> int:
    """Let products add themselves to the tensor that they are added to. It holds for any number of
    rows."""
    inputs = {storage(node) for node in graph.nodes if node.op == "placeholder"}
    users, matches = users_of_memory(graph), 0
    for node in list(graph.nodes):
        if node.target == linear_op and not _fuses(node):
            matches += _add_in_place(graph, node, users, inputs)
    return matches


def _fuses(node: fx.Node) -> bool:
    """Whether a product is something else than a product already."""
    return node.args[2] is not None or bool(node.kwargs.get("add") or node.kwargs.get("gate"))


def _add_in_place(
    graph: fx.Graph,
    node: fx.Node,
    users: dict[int | None, list[fx.Node]],
    inputs: Collection[int | None],
) -> bool:
    """Let a product add itself to a tensor, if it may.

    users: the nodes that take each memory; kept up to date.
    inputs: the memory that the graph does not make.
    """
    x, tensors, _, out = node.args
    total, product = _sum(node, out)
    for term, residual in operands(total, "add"):
        if term is product and _may_change(residual, total, node):
            break
    else:
        return False
    memory, others = storage(residual), users[storage(residual)]
    if memory in inputs or any(node < other and other is not total for other in others):
        return False
    others += users.get(storage(total), [])
    with graph.inserting_before(node):
        rows = as_rows(graph, residual)
    node.args = (x, tensors, None, rows)
    node.kwargs = {**node.kwargs, "add": True}
    replace(total, residual)
    others.remove(total)
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


def _may_change(residual: Any, total: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor is one that the product could be added to in place of the sum."""
    if operation(residual) is None or not residual < node:
        return False
    a, b = example(residual), example(total)
    return (
        a.dtype == b.dtype
        and sizes(residual) == sizes(total)
        and a.is_contiguous()
        and storage(residual) not in {storage(one) for one in node.all_input_nodes}
    )

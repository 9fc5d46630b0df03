"""RMSNorm in front of a product: the product norms its argument itself.

The kernels for few rows norm what they read anyway, and for more rows the method norms before it
multiplies. It pays where the norm's argument is what a product wrote, such as a residual stream to
which it added itself: then no other kernel runs between the two. Otherwise a kernel of the compiler
makes the argument, and norms it at no cost.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from minisrv.compile.nodes import (
    as_rows,
    erase_unused,
    example,
    is_whole,
    origin,
    readers,
    replace,
    sizes,
    storage,
    writers_of_memory,
)
from minisrv.compile.passes.norms import match_norm
from minisrv.compile.values import Source
from minisrv.kernels.linear_op import linear_op


def fuse_norms(graph: fx.Graph, sources: dict[str, Source]) -> int:
    """Let products norm their argument. It holds for any number of rows."""
    writers, matches = writers_of_memory(graph), 0
    for node in list(graph.nodes):
        if node.target == linear_op and node.args[2] is None and not node.kwargs.get("add"):
            matches += _fuse(graph, node, sources, writers)
    return matches


def _fuse(
    graph: fx.Graph,
    node: fx.Node,
    sources: dict[str, Source],
    writers: dict[int | None, list[fx.Node]],
) -> bool:
    x: Any = node.args[0]
    _, tensors, _, out = node.args
    normed = origin(x)
    norm = match_norm(normed, sources)
    if norm is None or not example(norm.x).is_contiguous() or not _only_for(normed, node):
        return False
    if sizes(norm.x)[-1] != sizes(x)[-1]:  # each head is normed by itself
        return False
    first = min(readers(normed, norm.x))
    before = [one for one in writers.get(storage(norm.x), []) if one < node]
    if not before or before[-1].target != linear_op or before[-1] > first:
        return False
    weight = norm.weight_input(graph, sources)
    with graph.inserting_before(x):
        rows = as_rows(graph, norm.x)
    replace(x, rows)
    node.args = (rows, tensors, weight, out)
    node.kwargs = {**node.kwargs, "eps": norm.eps}
    erase_unused(x)
    return True


def _only_for(value: fx.Node, node: fx.Node) -> bool:
    """Whether a product is all that uses the elements of a value, or of views of the whole."""
    return all(
        user is node
        or user.target in ("size", "new_empty")
        or (is_whole(user, value) and _only_for(user, node))
        for user in value.users
    )

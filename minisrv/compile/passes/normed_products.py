"""Products that are normed and then added to the residual stream, as in Gemma 2 and 3 and OLMo 2.

One kernel norms the product and adds it to the residual, in place. If the residual is normed for
the next product, the same kernel does that too. Where no product comes next, as behind the last
layer, what follows is left to the compiler, which has to make a kernel for it anyway.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from minisrv.compile.nodes import (
    add_method,
    as_rows,
    erase_unused,
    example,
    operands,
    origin,
    readers,
    replace,
    shape,
    sizes,
    storage,
    writers_of_memory,
)
from minisrv.compile.passes.in_place import InPlaceSums
from minisrv.compile.passes.norms import MatchedNorm, match_norm
from minisrv.compile.values import Source
from minisrv.kernels.elementwise import add_rms_norm_op
from minisrv.kernels.linear_op import linear_op

_Writers = dict[int | None, list[fx.Node]]


def add_normed_products(graph: fx.Graph, sources: dict[str, Source]) -> int:
    """Let one kernel norm a product, add it to the residual, and norm that. It holds for any number
    of rows."""
    sums, writers, matches = InPlaceSums(graph), writers_of_memory(graph), 0
    inputs = {origin(node.args[0]) for node in graph.nodes if node.target == linear_op}
    norms: dict[fx.Node, tuple[fx.Node, MatchedNorm]] = {}
    """For what is normed for a product the result of the norm, and the norm."""
    for node in graph.nodes:
        norm = match_norm(node, sources) if node in inputs else None
        if norm is not None and sizes(norm.x) == sizes(node):
            norms.setdefault(origin(norm.x), (node, norm))
    for total in list(graph.nodes):
        found = _match_sum(total, sources, writers, sums)
        if found is None:
            continue
        product, norm, residual = found
        after = norms.get(total)
        if after is not None and not _may_norm(*after, norm.eps, writers):
            after = None
        if after is not None or total in inputs:
            _fuse(graph, sources, product, norm, residual, total, after)
            sums.put(residual, total)
            matches += 1
    return matches


def _match_sum(
    total: fx.Node, sources: dict[str, Source], writers: _Writers, sums: InPlaceSums
) -> tuple[fx.Node, MatchedNorm, fx.Node] | None:
    """Return the result [T, size] of a product, its norm, and the residual of which a node is the
    sum, if the residual may be changed into it; None if the node is something else."""
    for term, residual in operands(total, "add"):
        norm = match_norm(term, sources)
        if norm is None or len(term.users) > 1:
            continue
        product = origin(norm.x)
        written = writers.get(storage(product), [])
        if (
            product.target == "new_empty"
            and [one.target for one in written] == [linear_op]
            and sizes(product)[1:] == sizes(norm.x)[-1:]
            and example(product).dtype == example(residual).dtype
            and storage(product) != storage(residual)
            and sums.may_become(residual, total, total)
        ):
            return product, norm, residual
    return None


def _may_norm(result: fx.Node, norm: MatchedNorm, eps: float, writers: _Writers) -> bool:
    """Whether a norm may be computed as soon as its argument has been, by a kernel that norms with
    another eps as well."""
    last = max(readers(result, norm.x))
    changed = any(last > one > norm.x for one in writers.get(storage(norm.x), []))
    return norm.eps == eps and not changed


def _fuse(
    graph: fx.Graph,
    sources: dict[str, Source],
    product: fx.Node,
    norm: MatchedNorm,
    residual: fx.Node,
    total: fx.Node,
    after: tuple[fx.Node, MatchedNorm] | None,
) -> None:
    """Add the op that norms a product, adds it to the residual, and does the norm `after` that."""
    weight, next_weight, out = norm.weight_input(graph, sources), None, None
    if after is not None:
        next_weight = after[1].weight_input(graph, sources)
    with graph.inserting_before(total):
        rows = as_rows(graph, residual)
        if after is not None:
            like: Any = product.args
            out = result = add_method(graph, "new_empty", *like)
            for _ in shape(after[0])[:-2]:
                result = add_method(graph, "unsqueeze", result, 0)
        given = (product, weight, rows, next_weight, out)
        graph.call_function(add_rms_norm_op, given, {"eps": norm.eps})
    if after is not None:
        replace(after[0], result)
        erase_unused(after[0])

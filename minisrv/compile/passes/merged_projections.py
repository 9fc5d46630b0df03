"""Products of one input, such as q, k and v, or gate and up: one product by the weights side by
side.

At few rows a product of small weights takes hardly longer than its launch. On a CPU the merged
weight is stored beside the others, which the model's own forward still uses, so only small ones are
merged; large ones gain nothing there. On a GPU it is where the others are.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

from torch import fx

from minisrv.compile.nodes import erase_unused, example, origin, replace, shape, storage
from minisrv.compile.values import Merged, Source, Weight
from minisrv.compile.writes import written_by
from minisrv.kernels.linear import METHODS, LinearMethod
from minisrv.kernels.linear_op import linear_op

MOST_BYTES = 4 << 20
"""Maximum number of bytes that a merged weight takes beside the others."""


def merge_projections(graph: fx.Graph, sources: dict[str, Source]) -> int:
    """Merge the products of one input. It holds for any number of rows."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    writes: Counter[int | None] = Counter()
    """How often each tensor's memory has been written so far."""
    for node in graph.nodes:
        if node.target == linear_op:
            x, tensors, _, _ = node.args
            key = (origin(x), str(shape(x)), node.kwargs["method"], len(tensors))
            groups.setdefault((*key, writes[storage(x)]), []).append(node)
        writes.update(storage(argument) for argument in written_by(node))
    merged = [nodes for nodes in groups.values() if len(nodes) > 1 and _takes_little(nodes)]
    for nodes in merged:
        _merge(graph, nodes, sources)
    return len(merged)


def _takes_little(nodes: list[fx.Node]) -> bool:
    """Whether the merged tensors of products take at most `MOST_BYTES` beside those that there
    are."""
    parts = _methods(nodes)
    there = {tensor.untyped_storage()._cdata for part in parts for tensor in part.tensors}
    with example(nodes[0].args[0]).fake_mode:
        made = type(parts[0]).merged(parts).tensors
    more = [tensor for tensor in made if tensor.untyped_storage()._cdata not in there]
    return sum(tensor.nbytes for tensor in more) <= MOST_BYTES


def _methods(nodes: list[fx.Node]) -> list[LinearMethod]:
    """Return the methods of products, of tensors that have shapes only."""
    method = METHODS[str(nodes[0].kwargs["method"])]
    return [method.of_tensors([example(tensor) for tensor in _tensors(node)]) for node in nodes]


def _merge(graph: fx.Graph, nodes: list[fx.Node], sources: dict[str, Source]) -> None:
    first = nodes[0]
    x: Any = first.args[0]
    parts = _methods(nodes)
    paths = []
    for node in nodes:
        source = sources[_tensors(node)[0].name]
        assert isinstance(source, Weight), "a product has a weight of the model"
        paths.append(source.path[:-2])  # without "tensors" and the index
    tensors = []
    with graph.inserting_before(next(iter(graph.nodes))), example(x).fake_mode:
        for index, value in enumerate(type(parts[0]).merged(parts).tensors):
            tensor = graph.placeholder(f"merged_{first.name}_{index}")
            tensor.meta["example_value"] = value
            sources[tensor.name] = Merged(tuple(paths), index)
            tensors.append(tensor)
    widths = [shape(node.args[3])[1] for node in nodes]
    with graph.inserting_before(first):
        rows = graph.call_method("size", (x, 0))
        rows.meta["example_value"] = shape(x)[0]
        out = graph.call_method("new_empty", (x, rows, sum(widths)))
        out.meta["example_value"] = example(x).new_empty(shape(x)[0], sum(widths))
        graph.call_function(linear_op, (x, tensors, None, out), {"method": first.kwargs["method"]})
        begin = 0
        for node, width in zip(nodes, widths, strict=True):
            columns = (slice(None), slice(begin, begin + width))
            part = graph.call_function(operator.getitem, (out, columns))
            part.meta["example_value"] = example(out)[columns]
            begin += width
            own: Any = node.args[3]
            graph.erase_node(node)
            replace(own, part)
            erase_unused(own)


def _tensors(node: fx.Node) -> list[fx.Node]:
    tensors: Any = node.args[1]
    return list(tensors)

"""Products of one input, such as q, k and v, or gate and up: one product by the weights side by
side.

At few rows a product of small weights takes hardly longer than its launch, and a product that is
alone can norm its argument and gate its halves. Where a merged weight has to be stored beside the
others, which the model's own forward still uses, only small ones are merged.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

from torch import fx

from minisrv.compile.nodes import erase_unused, example, origin, replace, shape, storage
from minisrv.compile.values import Merged, Source, Weight
from minisrv.compile.writes import written_by
from minisrv.kernels.linear import METHODS
from minisrv.kernels.linear_op import linear_op

MOST_BYTES = 4 << 20
"""Maximum size in bytes of a merged weight that is a copy."""


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
    return sum(_merge(graph, nodes, sources) for nodes in groups.values() if len(nodes) > 1)


def _merge(graph: fx.Graph, nodes: list[fx.Node], sources: dict[str, Source]) -> bool:
    first = nodes[0]
    x: Any = first.args[0]
    method = METHODS[str(first.kwargs["method"])]
    stored = [[example(tensor) for tensor in _tensors(node)] for node in nodes]
    with example(x).fake_mode:
        merged = method.merged([method.of_tensors(tensors) for tensors in stored]).tensors
    memory = {tensor.untyped_storage()._cdata for tensors in stored for tensor in tensors}
    copied = [one for one in merged if one.untyped_storage()._cdata not in memory]
    if sum(tensor.nbytes for tensor in copied) > MOST_BYTES:
        return False
    paths = []
    for node in nodes:
        source = sources[_tensors(node)[0].name]
        assert isinstance(source, Weight), "a product has a weight of the model"
        paths.append(source.path[:-2])  # without "tensors" and the index
    tensors = []
    with graph.inserting_before(next(iter(graph.nodes))):
        for index, value in enumerate(merged):
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
    return True


def _tensors(node: fx.Node) -> list[fx.Node]:
    tensors: Any = node.args[1]
    return list(tensors)

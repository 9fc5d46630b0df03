"""Views and conversions that change nothing: their argument takes their place."""

from __future__ import annotations

from torch import Tensor, fx

from minisrv.compile.values import Source

_METHODS = ("view", "reshape", "contiguous", "to", "float", "expand", "expand_as")


def remove_no_op_views(graph: fx.Graph, _: dict[str, Source]) -> int:
    """Remove the views and conversions whose result is their argument. It holds for any number of
    rows."""
    matches = 0
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target in _METHODS:
            source = node.args[0]
            if _same(source.meta.get("example_value"), node.meta.get("example_value")):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                matches += 1
    return matches


def _same(argument: object, result: object) -> bool:
    """Whether two tensors are the same part of the same memory."""
    if not isinstance(argument, Tensor) or not isinstance(result, Tensor):
        return False
    return (
        argument.untyped_storage()._cdata == result.untyped_storage()._cdata
        and argument.dtype == result.dtype
        and argument.shape == result.shape
        and argument.stride() == result.stride()
        and argument.storage_offset() == result.storage_offset()
    )

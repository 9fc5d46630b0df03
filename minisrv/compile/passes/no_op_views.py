"""Views, conversions and the like that change nothing: their argument takes their place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from minisrv.compile.nodes import (
    erase_unused,
    example,
    expression,
    operation,
    replace,
    sizes,
    storage,
)
from minisrv.compile.values import Source

_OPERATIONS = (
    "view",
    "reshape",
    "contiguous",
    "to",
    "float",
    "type_as",
    "expand",
    "expand_as",
    "getitem",
)


def remove_no_op_views(graph: fx.Graph, _: dict[str, Source]) -> int:
    """Remove the operations whose result is their argument: views and conversions to what it is
    already, dropout where nothing is trained, and a tensor side by side with empty ones. It holds
    for any number of rows."""
    matches = 0
    for node in list(graph.nodes):
        source = _unchanged(node)
        if source is not None:
            replace(node, source)
            erase_unused(node)
            matches += 1
    return matches


def _unchanged(node: fx.Node) -> Any:
    """Return the argument of a node that is its result as well; None if there is none."""
    name = operation(node)
    if name in _OPERATIONS and _same(node.args[0], node):
        return node.args[0]
    if name == "dropout":
        training = node.kwargs.get("training", (*node.args, None, True)[2])
        return None if training else node.args[0]
    if name == "cat":
        parts: Any = node.args[0]
        full = [part for part in parts if 0 not in sizes(part)]
        return full[0] if len(full) == 1 else None
    return None


def _same(argument: Any, result: Any) -> bool:
    """Whether two tensors are the same part of the same memory."""
    a, b = example(argument), example(result)
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and storage(argument) == storage(result)
        and a.dtype == b.dtype
        and sizes(argument) == sizes(result)
        and [expression(x) for x in a.stride()] == [expression(x) for x in b.stride()]
        and expression(a.storage_offset()) == expression(b.storage_offset())
    )

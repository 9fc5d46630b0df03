"""Questions about the nodes of a traced graph, and how nodes are added and removed.

Knows: torch's operations by name, and memory as the traced step had it: two nodes whose values
share memory there share it in every step. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from minisrv.compile.values import Source
from minisrv.compile.writes import written_by

_CASTS = ("to", "float", "type_as", "bfloat16", "half")
_VIEWS = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "getitem", "contiguous")


def example(node: Any) -> Any:
    """Return the value of a node in the traced step; None if it is no node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def shape(node: Any) -> Any:
    """Return the shape of a node's tensor."""
    return example(node).shape


def expression(size: Any) -> Any:
    """Return a size for comparisons. A symbol must not be compared with a number itself: that would
    make it the number of the traced step."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def sizes(node: Any) -> tuple[Any, ...]:
    """Return the shape of a node's tensor for comparisons."""
    return tuple(map(expression, example(node).shape))


def storage(node: Any) -> int | None:
    """Return what identifies the memory of a node's tensor, or of the tensors that it is split
    into; None if there is no such memory."""
    value = example(node)
    parts = value if isinstance(value, (tuple, list)) else [value]
    if not all(isinstance(part, Tensor) for part in parts):
        return None
    found = {int(part.untyped_storage()._cdata) for part in parts}
    return found.pop() if len(found) == 1 else None


def operation(node: Any) -> str | None:
    """Return the name of a node's operation, the same for a function, an operator and a method;
    None if the node is none."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if isinstance(target, OpOverload):
        return str(target)
    return target if isinstance(target, str) else getattr(target, "__name__", None)


def operands(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield the two operands of a node in both orders, if it is the commutative operation of that
    name on them and nothing else."""
    if operation(node) == name and len(node.args) == 2 and not node.kwargs:
        first, second = node.args
        yield first, second
        yield second, first


def without_casts(node: Any, dtype: Any = None) -> Any:
    """Return the node whose values a node has in another dtype.

    dtype: the dtype at which to stop; None goes back to the first.
    """
    while operation(node) in _CASTS and (dtype is None or example(node).dtype != dtype):
        node = node.args[0]
    return node


def is_whole(node: Any, other: Any) -> bool:
    """Whether two tensors are the same elements of the same memory in the same order, whatever
    their shapes are."""
    a, b = example(node), example(other)
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and storage(node) == storage(other)
        and a.dtype == b.dtype
        and a.is_contiguous()
        and b.is_contiguous()
        and expression(a.storage_offset()) == expression(b.storage_offset())
        and expression(a.numel()) == expression(b.numel())
    )


def origin(node: Any) -> Any:
    """Return the node of which a node is a view that is the whole of it."""
    while operation(node) in _VIEWS and is_whole(node, node.args[0]):
        node = node.args[0]
    return node


def is_only_for(value: fx.Node, users: Collection[fx.Node]) -> bool:
    """Whether nothing but these nodes uses the elements of a value, or of views of it."""
    return all(
        user in users or (storage(user) == storage(value) and is_only_for(user, users))
        for user in value.users
    )


def users_of_memory(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """Return the nodes that take each memory as an argument, in their order."""
    found: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        for memory in {storage(one) for one in node.all_input_nodes}:
            found.setdefault(memory, []).append(node)
    return found


def writers_of_memory(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """Return the nodes that write each memory, in their order."""
    found: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        for one in written_by(node):
            found.setdefault(storage(one), []).append(node)
    return found


def readers(result: fx.Node, x: fx.Node) -> list[fx.Node]:
    """Return the nodes that take x itself, of those by which a result is computed of it."""
    found, left, seen = [], [result], {result}
    while left:
        node = left.pop()
        inputs = node.all_input_nodes
        if x in inputs:
            found.append(node)
        left += [one for one in inputs if x < one and one not in seen]
        seen |= set(inputs)
    return found


def add_method(graph: fx.Graph, name: str, source: fx.Node, *args: Any) -> fx.Node:
    """Add the call of a method of a tensor where the graph inserts nodes, and return the node."""
    node = graph.call_method(name, (source, *args))
    values = fx.node.map_arg(args, example)
    node.meta["example_value"] = getattr(example(source), name)(*values)
    return node


def as_rows(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Add a view [T, size] of a contiguous tensor [..., size] where the graph inserts nodes, and
    return it; the node itself if it is one."""
    if example(node).dim() == 2:
        return node
    return add_method(graph, "view", node, -1, shape(node)[-1])


def add_input(
    graph: fx.Graph, sources: dict[str, Source], name: str, source: Source, value: Tensor
) -> fx.Node:
    """Add an input to a graph, and return its node; the one that is there already for a source.

    value: its value in the traced step.
    """
    same: list[fx.Node] = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and sources.get(node.name) == source
    ]
    if same:
        return same[0]
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    sources[node.name] = source
    return node


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let another node take the place of a node. The views of it are views of the other from here
    on."""
    before = storage(node)
    views = [(user, storage(user)) for user in node.users]
    node.replace_all_uses_with(by)
    while views:
        user, memory = views.pop()
        if memory != before:
            continue
        views += [(one, storage(one)) for one in user.users]
        args, kwargs = fx.node.map_arg((user.args, dict(user.kwargs)), example)
        function = user.target if callable(user.target) else getattr(args[0], str(user.target))
        given = args if callable(user.target) else args[1:]
        user.meta["example_value"] = function(*given, **kwargs)


def erase_unused(node: Any) -> None:
    """Remove a node that nothing uses, and with it what only it used. What writes its arguments
    is not removed."""
    if node.users or node.op in ("placeholder", "output") or written_by(node):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for one in inputs:
        erase_unused(one)

"""What is done to queries and keys before attention: the attention op does it itself.

The op norms and rotates what it reads (`kernels.attention`), so it can be given queries and keys as
the projection leaves them. This needs another description of the layer than the model's own forward
has, whose op gets queries and keys that are rotated: with the weights of the norms, and a table of
cosines and sines. The keys in the cache are the same.

A layer is left as it is if anything in it is another computation: a rotation of a part of each
head or of neighbouring elements, a norm across heads, or one of either queries or keys.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from minisrv.compile.nodes import (
    add_method,
    erase_unused,
    example,
    is_only_for,
    operands,
    operation,
    shape,
    sizes,
    storage,
    without_casts,
)
from minisrv.compile.passes.norms import MatchedNorm, match_norm
from minisrv.compile.split import PREPARATION
from minisrv.compile.values import Preparation, Rotation, Source, Weight
from minisrv.graph.attention import attention_op
from minisrv.kernels.linear_op import linear_op

_RESHAPES = ("transpose", "permute", "getitem", "unsqueeze", "squeeze", "contiguous", "view")


@dataclass(frozen=True)
class _Heads:
    """Queries or keys before what the attention op can do to them.

    copy: the node that copies them to the static buffer.
    raw: the queries or keys before.
    """

    copy: fx.Node
    raw: fx.Node
    norm: MatchedNorm | None
    rotation: Rotation | None


def fuse_attention(graph: fx.Graph, sources: dict[str, Source]) -> int:
    """Leave norms and rotations of queries and keys to the attention op, and let a product that
    makes queries, keys and values side by side write them to the op's argument. It holds for any
    number of rows. Returns the number of layers that are changed."""
    matches = 0
    for node in list(graph.nodes):
        if node.target == attention_op:
            copies = _copies(node)
            if len(copies) == 3:
                prepared = _prepare_in_op(graph, node, copies, sources)
                matches += _write_directly(graph, node, copies) or prepared
    return matches


def _copies(attention: fx.Node) -> list[fx.Node]:
    """Return the nodes that write the argument of an attention op since the last one, in the order
    of its columns, if all are copies of heads."""
    qkv: Any = attention.args[0]
    found: list[fx.Node] = []
    node = attention.prev
    while node.op != "placeholder" and node.target != attention_op:
        if node.target == "copy_" and storage(node.args[0]) == storage(qkv):
            found.append(node)
        node = node.prev
    return sorted(found, key=lambda copy: int(example(copy.args[0]).storage_offset()))


def _prepare_in_op(
    graph: fx.Graph, attention: fx.Node, copies: list[fx.Node], sources: dict[str, Source]
) -> bool:
    positions: Any = attention.args[1]
    q, k = (_heads(copy, positions, sources) for copy in copies[:2])
    if q is None or k is None or (q.norm is None) != (k.norm is None):
        return False
    if q.rotation != k.rotation or (q.norm is None and q.rotation is None):
        return False
    preparation = Preparation(None, None, 0.0, q.rotation)
    if q.norm is not None and k.norm is not None:
        if q.norm.eps != k.norm.eps:
            return False
        q_norm, k_norm = (norm.weight_source(sources) for norm in (q.norm, k.norm))
        preparation = Preparation(q_norm, k_norm, q.norm.eps, q.rotation)
    attention.meta[PREPARATION] = preparation
    for heads in (q, k):
        target, value = heads.copy.args
        with graph.inserting_before(heads.copy):
            raw = _tokens_first(graph, heads.raw)
        heads.copy.args = (target, raw)
        erase_unused(value)
    return True


def _heads(copy: fx.Node, positions: fx.Node, sources: dict[str, Source]) -> _Heads | None:
    node = _base(copy.args[1])
    if node is None:
        return None
    rotated = _match_rotation(node, positions, sources)
    rotation = None
    if rotated is not None:
        rotation, before = rotated
        node = _base(before)
    norm = match_norm(node, sources)
    if norm is not None:
        node = _base(norm.x)
    return None if node is None else _Heads(copy, node, norm, rotation)


def _base(node: Any) -> Any:
    """Return what a node is a view of, as long as the view only changes the order of tokens and
    heads, or is of a leading dimension of one; None if it is no tensor of heads."""
    if _order(node) is None:
        return None
    while operation(node) in _RESHAPES and _has_elements_of(node, node.args[0]):
        before = _order(node.args[0])
        if before is None or (operation(node) == "view" and before != _order(node)):
            break
        node = node.args[0]
    return node


def _has_elements_of(node: Any, other: Any) -> bool:
    """Whether the sizes of two tensors are the same, besides those of one and their order. One may
    also be the parts that a tensor is split into, which are none."""
    if not isinstance(example(other), torch.Tensor):
        return False
    before, after = Counter(sizes(other)), Counter(sizes(node))
    return all(before[size] == after[size] for size in {*before, *after} - {1})


def _order(node: Any) -> bool | None:
    """Return whether a tensor of heads has its tokens first, as [T, heads, head_dim], or its heads,
    as [heads, T, head_dim], with leading dimensions of one; None if it is neither. The number of
    tokens is a symbol, so that it is no other size."""
    value = example(node)
    if not isinstance(value, torch.Tensor) or value.dim() < 3 or value.stride()[-1] != 1:
        return None
    if any(size != 1 for size in sizes(node)[:-3]):
        return None
    symbols = [isinstance(size, torch.SymInt) for size in value.shape[-3:]]
    return symbols[0] if sum(symbols) == 1 and not symbols[2] else None


def _tokens_first(graph: fx.Graph, heads: fx.Node) -> fx.Node:
    """Add a view [T, heads, head_dim] of heads where the graph inserts nodes, and return it."""
    for _ in shape(heads)[:-3]:
        heads = add_method(graph, "squeeze", heads, 0)
    return heads if _order(heads) else add_method(graph, "transpose", heads, 0, 1)


def _match_rotation(
    node: Any, positions: fx.Node, sources: dict[str, Source]
) -> tuple[Rotation, fx.Node] | None:
    """Return the rotation of which a node is the result, x * cos + rotate_half(x) * sin, and x;
    None if it is something else."""
    for straight, crossed in operands(node, "add"):
        for x, cos in operands(straight, "mul"):
            for half, sin in operands(crossed, "mul"):
                if not _is_rotated_half(half, x):
                    continue
                first = _match_angles(cos, "cos", positions, sources)
                second = _match_angles(sin, "sin", positions, sources)
                if first is not None and first == second:
                    return first, x
    return None


def _is_rotated_half(node: Any, x: Any) -> bool:
    """Whether a node is x with its halves swapped and the first one negated."""
    if operation(node) != "cat" or node.kwargs.get("dim", (*node.args, None)[1]) not in (-1, 3):
        return False
    parts = node.args[0]
    if len(parts) != 2 or operation(parts[0]) != "neg":
        return False
    size = shape(x)[-1] // 2
    second, first = parts[0].args[0], parts[1]
    return bool(
        operation(first) == operation(second) == "getitem"
        and first.args[0] is second.args[0] is x
        and first.args[1] == (Ellipsis, slice(None, size, None))
        and second.args[1] == (Ellipsis, slice(size, None, None))
    )


def _match_angles(
    node: Any, function: str, positions: fx.Node, sources: dict[str, Source]
) -> Rotation | None:
    """Return the rotation whose cosines or sines of the angles of all tokens a node is."""
    node, scale = _leaf(node), 1.0
    for value, factor in operands(node, "mul"):
        if isinstance(factor, (int, float)):
            node, scale = without_casts(value), float(factor)
    if operation(node) != function:
        return None
    both = node.args[0]
    if operation(both) != "cat" or both.kwargs.get("dim", (*both.args, None)[1]) != -1:
        return None
    parts = both.args[0]
    if len(parts) != 2 or parts[0] is not parts[1]:
        return None
    product = _leaf(parts[0])
    if operation(product) not in ("mul", "matmul"):
        return None
    leaves = [_leaf(operand) for operand in product.args]
    found = [sources.get(leaf.name) for leaf in leaves if isinstance(leaf, fx.Node)]
    if sources.get(positions.name) not in found or len(found) != 2:
        return None
    for source, leaf in zip(found, leaves, strict=True):
        if isinstance(source, Weight) and example(leaf).dim() == 1:
            return Rotation(source.path, scale)
    return None


def _leaf(node: Any) -> Any:
    """Return what a node is a view or a conversion of, with the same elements once."""
    names = (*_RESHAPES, "expand", "float", "to", "type_as", "reshape")
    while operation(node) in names and _has_elements_of(node, node.args[0]):
        node = node.args[0]
    return node


def _write_directly(graph: fx.Graph, attention: fx.Node, copies: list[fx.Node]) -> bool:
    """Let the product whose columns are copied to the argument of attention write there, if it is
    one product and nothing else uses it."""
    qkv: Any = attention.args[0]
    product = _last_product(attention, storage(copies[0].args[1]))
    if product is None or product < qkv or product.kwargs.get("add"):
        return False
    x, tensors, norm, out = product.args
    copied = sum(shape(copy.args[0])[1:].numel() for copy in copies)
    if out.target != "new_empty" or not sizes(out)[1] == sizes(qkv)[1] == copied:  # type: ignore[union-attr]
        return False
    same = all(_is_same_part(copy) for copy in copies)
    if not same or not is_only_for(out, {product, *copies}):  # type: ignore[arg-type]
        return False
    product.args = (x, tensors, norm, qkv)
    for copy in copies:
        target, value = copy.args
        graph.erase_node(copy)
        erase_unused(value)
        erase_unused(target)
    return True


def _last_product(attention: fx.Node, memory: int | None) -> fx.Node | None:
    """Return the product that writes this memory between an attention op and the one before."""
    node = attention.prev
    while node.op != "placeholder" and node.target != attention_op:
        if node.target == linear_op and storage(node.args[3]) == memory:
            return node
        node = node.prev
    return None


def _is_same_part(copy: fx.Node) -> bool:
    """Whether a copy takes from one tensor what it writes to the same place of another one."""
    target, source = (example(one) for one in copy.args)
    return (
        target.stride() == source.stride()
        and target.storage_offset() == source.storage_offset()
        and sizes(copy.args[0]) == sizes(copy.args[1])
    )

"""Which of the server's own kernels a piece calls, so that their launches are known before it runs.

A compiled piece is one op. The products and norms within it are calls of ops that choose a kernel
when they run, by the rows of the step, as they do between pieces.

Knows: the nodes of a piece, and the sizes of their tensors by the number of rows. Knows nothing of
what the ops compute, nor of how their launches are rehearsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from minisrv.compile.nodes import example, expression, storage
from minisrv.compile.values import KernelCall, Operand, PieceKernels, Size
from minisrv.kernels.linear_op import linear_op


class _UnevenSizeError(Exception):
    """A size does not grow evenly with the rows."""


def kernels_inside(
    nodes: Sequence[fx.Node], arguments: Sequence[fx.Node], rows: torch.SymInt
) -> PieceKernels | None:
    """Return the calls of the server's own ops among the nodes of a piece; None if there are none.

    A call is left out if a size of its tensors does not grow evenly with the rows: its kernels are
    compiled when they are first launched.

    arguments: the nodes whose values the piece is given, in their order.
    rows: the number of rows as the symbol that stands for it.
    """
    calls: list[KernelCall] = []
    for node in nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace == linear_op.namespace:
            try:
                calls.append(_call(node, lambda one: _operand(one, arguments, rows)))
            except _UnevenSizeError:
                continue
    places = (
        (index, dim)
        for index, node in enumerate(arguments)
        for dim, size in enumerate(example(node).shape)
        if isinstance(size, torch.SymInt) and expression(size) == expression(rows)
    )
    place = next(places, None)
    return PieceKernels(place, calls) if place is not None and calls else None


def _call(node: fx.Node, describe: Callable[[fx.Node], Operand]) -> KernelCall:
    def operand(given: Any) -> Any:
        if isinstance(given, (list, tuple)):
            return list(map(operand, given))
        return None if given is None else describe(given)

    target: Any = node.target
    settings: dict[str, Any] = dict(node.kwargs)
    return KernelCall(target.overloadpacket.__name__, list(map(operand, node.args)), settings)


def _operand(node: fx.Node, arguments: Sequence[fx.Node], rows: torch.SymInt) -> Operand:
    value: Tensor = example(node)
    if node in arguments:  # several arguments may be parts of one memory
        place: int | None = arguments.index(node)
    else:
        places = (i for i, given in enumerate(arguments) if storage(given) == storage(node))
        place = next(places, None)
    offset: Any = value.storage_offset()
    if place is not None:
        offset = offset - example(arguments[place]).storage_offset()
    return Operand(
        place,
        tuple(_by_rows(size, rows) for size in value.shape),
        tuple(_by_rows(stride, rows) for stride in value.stride()),
        _by_rows(offset, rows),
        str(value.dtype).removeprefix("torch."),
    )


def _by_rows(size: Any, rows: torch.SymInt) -> Size:
    """Return a size by the rows. Raises _UnevenSizeError if these do not say how large it is."""
    if not isinstance(size, torch.SymInt):
        return int(size), 0
    counts = (1, 2, 1000)
    try:
        one, two, many = (int(expression(size).subs(expression(rows), n)) for n in counts)
    except TypeError as error:  # another symbol is left
        raise _UnevenSizeError from error
    if many - one != 999 * (two - one):
        raise _UnevenSizeError
    return 2 * one - two, two - one

"""Sums that take the place of one of their terms, which nothing reads any more.

In transformers' code each sum is a new tensor. A residual stream that is added to in place is one
buffer through all pieces.
"""

from __future__ import annotations

from torch import fx

from minisrv.compile.nodes import (
    erase_unused,
    example,
    operation,
    replace,
    sizes,
    storage,
    users_of_memory,
)


class InPlaceSums:
    """Knows which terms of a graph's sums may be changed into the sum. It is kept up to date by
    `put`."""

    def __init__(self, graph: fx.Graph) -> None:
        self._inputs = {storage(node) for node in graph.nodes if node.op == "placeholder"}
        self._users = users_of_memory(graph)

    def may_become(self, term: fx.Node, total: fx.Node, by: fx.Node) -> bool:
        """Whether a term of a sum is a tensor that may be changed into the sum by an operation that
        takes place at the node `by`: the graph makes it, and nothing from there on reads it as it
        was."""
        if operation(term) is None or not term < by:
            return False
        a, b, memory = example(term), example(total), storage(term)
        others = self._users[memory]
        return (
            a.dtype == b.dtype
            and sizes(term) == sizes(total)
            and a.is_contiguous()
            and memory not in self._inputs
            and not any(by < other and other is not total for other in others)
        )

    def put(self, term: fx.Node, total: fx.Node) -> None:
        """Let a term take the place of a sum, into which it has been changed."""
        others = self._users[storage(term)]
        others += self._users.get(storage(total), [])
        replace(total, term)
        others.remove(total)
        erase_unused(total)

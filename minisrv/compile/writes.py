"""Which of its arguments an operation of a traced graph writes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._ops import OpOverload

_IN_PLACE = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a node writes."""
    written: list[Any] = [node.kwargs.get("out")]
    if isinstance(node.target, OpOverload):
        for declared, value in zip(node.target._schema.arguments, node.args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                written.append(value)
    elif (
        (node.op == "call_method" and str(node.target).endswith("_"))
        or node.target in _IN_PLACE
        or node.kwargs.get("inplace")
    ):
        written.append(node.args[0])
    return [value for value in written if isinstance(value, fx.Node)]

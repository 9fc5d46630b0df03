"""Registration of custom ops, which a graph, a recorder or a compiler sees as one unit each.

Knows: torch.library, and how an implementation for CUDA is found without importing Triton. Knows
nothing of what an op computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name
from typing import Any

import torch
from torch._ops import OpOverload

from minisrv.kernels.gpu import is_rehearsing

Function = Callable[..., None]

DIRECT: dict[OpOverload, Function] = {}
"""The plain function under each op that a CPU can run; it takes the op's arguments and does the
same. Code that replays a recorded op calls the plain function, because going through the dispatcher
costs more than a small ATen op."""

_resolve = cache(resolve_name)


def imported_at_first_call(path: str) -> Function:
    """Return a function that passes its calls on to another one, whose module is imported at the
    first call: Triton may be missing where there is no GPU, and takes long to import.

    path: the function's place, as "package.module:function". A call raises ImportError if the
        module cannot be imported, and AttributeError if it has no such function.
    """

    def call(*args: Any, **kwargs: Any) -> None:
        _resolve(path)(*args, **kwargs)

    return call


def register_op(
    name: str,
    schema: str,
    *,
    cpu: Function | None = None,
    cuda: str | None = None,
    every_device: Function | None = None,
) -> OpOverload:
    """Define the op `minisrv::<name>`, enter its plain function into `DIRECT`, and return the op.

    schema: arguments and results in torch.library's language. An op returns nothing and writes to
        those of its arguments that the schema marks as written, so that a trace needs no more than
        the schema. Tensors without memory, which have nothing to compute, reach the implementation
        for CUDA only while its launches are rehearsed (`kernels.gpu`).
    cpu: the implementation for CPUs.
    cuda: the place of the implementation for CUDA, see `imported_at_first_call`.
    every_device: one implementation for all devices, in place of the other two.

    Raises RuntimeError if the op is defined already.
    """
    assert schema.endswith("-> ()"), "an op writes to its arguments and returns nothing"
    qualified = f"minisrv::{name}"
    torch.library.define(qualified, schema)
    implementations = {
        "cpu": cpu,
        "cuda": None if cuda is None else imported_at_first_call(cuda),
        "default": every_device,
    }
    for device, implementation in implementations.items():
        if implementation is not None:
            torch.library.impl(qualified, device, implementation)
    on_gpu = every_device or implementations["cuda"]

    def without_memory(*args: Any, **kwargs: Any) -> None:
        if on_gpu is not None and is_rehearsing():
            on_gpu(*args, **kwargs)

    torch.library.register_fake(qualified, without_memory)
    op: OpOverload = getattr(torch.ops.minisrv, name).default
    plain = cpu or every_device
    if plain is not None:
        DIRECT[op] = plain
    return op

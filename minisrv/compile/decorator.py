"""The decorator of model classes whose forward can be compiled.

Knows: which dimensions of the arguments differ from step to step, and what runs in place of the
forward. Knows nothing of compilers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

Compiled = Callable[[Tensor, Tensor, Tensor], None]
"""A compiled forward: it takes input_ids [T], positions [T] and out [T, hidden], which it
writes."""


class Compilable(Protocol):
    """An instance of a decorated class.

    dynamic_dims: the dimension of each argument of `forward` whose size is that of the step, by the
        name of the argument.
    compiled: what calls of the model run in place of its forward; None for the forward itself.
    """

    dynamic_dims: ClassVar[Mapping[str, int]]
    compiled: Compiled | None


_M = TypeVar("_M", bound=type[nn.Module])


def support_torch_compile(dynamic_dims: Mapping[str, int]) -> Callable[[_M], _M]:
    """Return a decorator for a class of models, which makes it `Compilable`. An instance whose
    `compiled` is None runs as if its class were not decorated.

    dynamic_dims: see `Compilable`; in the order of the arguments.
    """

    def decorate(cls: _M) -> _M:
        def __call__(self: Any, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:  # noqa: N807
            compiled: Compiled | None = self.compiled
            if compiled is None:
                nn.Module.__call__(self, input_ids, positions, out)
            else:
                compiled(input_ids, positions, out)

        decorated: Any = cls
        decorated.dynamic_dims = dict(dynamic_dims)
        decorated.compiled = None
        decorated.__call__ = __call__
        return cls

    return decorate

"""The decorator of model classes whose forward can be compiled.

Knows: which dimensions of the arguments differ from step to step, and what runs in place of the
forward, with attention layers that may be described in another way. Knows nothing of compilers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from minisrv.kernels import AttentionLayer


class Compiled(ABC):
    """A compiled forward."""

    @abstractmethod
    def __call__(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        """Compute out [T, hidden], which is written, of input_ids [T] int64 and positions [T]
        int64."""

    def attention_layers(self, own: Sequence[AttentionLayer]) -> Sequence[AttentionLayer]:
        """Return the layers as the attention op has to take them when this code calls it: the
        model's own, unless the code leaves more to the op than the model's own forward does."""
        return own

    @property
    def buffers(self) -> Sequence[Tensor]:
        """Return the tensors, at fixed addresses, in which a run keeps what it reads later: another
        run in the middle of it overwrites them."""
        return ()


Forward = Callable[[Tensor, Tensor, Tensor], None]
"""A forward as `Compiled` runs it."""


class CompiledForward(Compiled):
    """A function that calls the attention op as the model's own forward does."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        self._forward(input_ids, positions, out)


class Compilable(Protocol):
    """An instance of a decorated class.

    dynamic_dims: the dimension of each argument of `forward` whose size is that of the step, by the
        name of the argument.
    compiled: what calls of the model run in place of its forward; None for the forward itself.
    attention_layers: the layers as the attention op has to take them, in the order of their
        indices, by what runs: the forward or `compiled`.
    own_attention_layers: the layers as the forward calls the op for them.
    """

    dynamic_dims: ClassVar[Mapping[str, int]]
    compiled: Compiled | None

    own_attention_layers: Sequence[AttentionLayer]

    @property
    def attention_layers(self) -> Sequence[AttentionLayer]: ...


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

        def attention_layers(self: Any) -> Sequence[AttentionLayer]:
            own: Sequence[AttentionLayer] = self.own_attention_layers
            return own if self.compiled is None else self.compiled.attention_layers(own)

        decorated: Any = cls
        decorated.dynamic_dims = dict(dynamic_dims)
        decorated.compiled = None
        decorated.__call__ = __call__
        decorated.attention_layers = property(attention_layers)
        return cls

    return decorate

"""The interface of an arena: tensors whose memory can be released while their addresses stay.

A captured graph holds addresses, so what it reads and writes must lie at the same ones as long as
it exists. Addresses are virtual, and the memory behind them need not be there while nothing runs.

Knows: when an arena's memory is there. Knows nothing of what is kept in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Arena(ABC):
    """Tensors whose memory is released and restored together. Between the two, nothing may use
    them."""

    def __init__(self) -> None:
        self._is_released = False

    @property
    def is_released(self) -> bool:
        """Whether the memory is released at present."""
        return self._is_released

    @abstractmethod
    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor, as `torch.empty` does, whose memory belongs to the arena.

        device: the device of the arena.
        """

    @abstractmethod
    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Make the memory of tensors part of the arena. Their values stay; addresses may change
        here for the last time, together for all tensors that share memory. Tensors that share
        memory with others must be given together with these."""

    def release(self, *, keep: bool) -> None:
        """Release the memory, after all work that was launched.

        keep: whether `restore` brings the values back, of which the host keeps a copy until then.

        If the host has no memory for the copy, RuntimeError is raised and nothing has changed.
        """
        assert not self._is_released, "released already"
        self._release(keep)
        self._is_released = True

    def restore(self) -> None:
        """Have memory at the same addresses again, with the values that were kept, or any.

        Raises torch.OutOfMemoryError if others have taken the memory meanwhile; it is still
        released then.
        """
        assert self._is_released, "not released"
        self._restore()
        self._is_released = False

    @torch.no_grad()
    def refill(self, values: list[Tensor]) -> None:
        """Have memory at the same addresses again, with new values of all adopted tensors.

        values: a tensor for each of the adopted ones, in their order and of the same shape and
            dtype. The list is emptied on the way, and the memory of what has been copied is used
            for what follows, so that hardly more than one of them exists twice.

        Raises torch.OutOfMemoryError if others have taken the memory meanwhile; it is still
        released then.
        """
        assert self._is_released, "not released"
        self._refill(values)
        self._is_released = False

    @abstractmethod
    def forget(self) -> None:
        """Drop the copy that the host keeps, if there is one."""

    @abstractmethod
    def _release(self, keep: bool) -> None:
        """See `release`."""

    @abstractmethod
    def _restore(self) -> None:
        """See `restore`."""

    @abstractmethod
    def _refill(self, values: list[Tensor]) -> None:
        """See `refill`."""

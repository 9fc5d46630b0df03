"""An arena on a CPU: pages that the kernel takes back, and gives again when they are next used.

Knows: pages and Linux. What the host is to keep stays where it is, because it lies in the host's
memory already.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from minisrv.arena.base import Arena

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class CPUArena(Arena):
    """See `Arena`. Tensors may have any layout, oneDNN's included."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[Tensor] = []

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Arena`."""
        tensor = torch.empty(*shape, dtype=dtype, device=device)
        self._tensors.append(tensor)
        return tensor

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """See `Arena`. The tensors stay where they are."""
        self._tensors += tensors

    def forget(self) -> None:
        """See `Arena`. What was kept are the pages themselves."""
        self._drop_pages()

    def _release(self, keep: bool) -> None:
        if not keep:
            self._drop_pages()

    def _restore(self) -> None:
        """Do nothing: a page comes when it is first used, and is zero if it was dropped."""

    def _refill(self, values: list[Tensor]) -> None:
        for tensor in self._tensors:
            tensor.copy_(values.pop(0))

    def _drop_pages(self) -> None:
        for begin, end in {_memory(tensor) for tensor in self._tensors}:
            # The pages at both ends may hold memory of others.
            first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            last = end // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last and _libc.madvise(first, last - first, mmap.MADV_DONTNEED):
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error))


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of the memory that a tensor lies in, and the one behind it."""
    if tensor.is_mkldnn:
        begin, nbytes = torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    else:
        storage = tensor.untyped_storage()
        begin, nbytes = storage.data_ptr(), storage.nbytes()
    return begin, begin + nbytes

"""An arena on a GPU: ranges of addresses, and the memory that the driver maps there.

Knows: CUDA's virtual memory and how torch takes memory that is not its own. The driver's library is
called directly, because torch reserves addresses for itself only.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from minisrv.arena.base import Arena
from minisrv.machine import available_memory

CHUNK_BYTES = 256 << 20
"""Number of bytes of a piece in which the memory of adopted tensors is mapped and copied. A power
of two, to which torch rounds up what it pins on the host."""

ALIGNMENT = 512
"""Alignment of tensors in bytes, that of torch's allocator, so that kernels take the same paths."""

_PINNED, _DEVICE, _READ_WRITE, _RECOMMENDED = 1, 1, 3, 1
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class Driver:
    """Virtual memory of one GPU. Every method raises RuntimeError if the driver refuses.

    device: the index of the GPU, as torch counts.
    granularity: the number of bytes of which sizes and addresses are multiples.

    OSError is raised if there is no driver.
    """

    def __init__(self, device: int, library: str = "libcuda.so.1") -> None:
        self._library = ctypes.CDLL(library)
        place = _Location(_DEVICE, device)
        self._properties = _Properties(type=_PINNED, location=place)
        self._access = _Access(place, _READ_WRITE)
        found = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(found),
            ctypes.byref(self._properties),
            _RECOMMENDED,
        )
        self.granularity: int = found.value

    def reserve(self, nbytes: int) -> int:
        """Return the first address of a new range, behind which there is no memory yet."""
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), _size(nbytes), _size(0), *_NONE)
        return address.value

    def give_back(self, address: int, nbytes: int) -> None:
        """Give a whole range back, behind which there is no memory."""
        self._call("cuMemAddressFree", _address(address), _size(nbytes))

    def map(self, address: int, nbytes: int) -> None:
        """Put new memory behind a part of a range. Raises torch.OutOfMemoryError."""
        handle = ctypes.c_uint64()
        self._call(
            "cuMemCreate",
            ctypes.byref(handle),
            _size(nbytes),
            ctypes.byref(self._properties),
            ctypes.c_uint64(0),
        )
        try:
            self._call("cuMemMap", _address(address), _size(nbytes), _size(0), handle, _NONE[1])
        finally:
            self._call("cuMemRelease", handle)  # the mapping keeps the memory
        place = (_address(address), _size(nbytes))
        try:
            self._call("cuMemSetAccess", *place, ctypes.byref(self._access), _size(1))
        except RuntimeError:
            self.unmap(address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory behind a part of a range away; it is free then."""
        self._call("cuMemUnmap", _address(address), _size(nbytes))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if not code:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        kind = torch.OutOfMemoryError if code == _OUT_OF_MEMORY else RuntimeError
        raise kind(f"{name} failed: {(text.value or b'').decode()} ({code}).")


_size, _address = ctypes.c_size_t, ctypes.c_uint64
_NONE = (ctypes.c_uint64(0), ctypes.c_uint64(0))


class Span:
    """A range of addresses, and the memory behind its beginning.

    address: the first address.
    nbytes: the number of bytes.
    chunk: the number of bytes that are mapped at a time.
    mapped: the number of bytes, from the beginning, behind which there is memory.
    """

    def __init__(self, driver: Driver, nbytes: int, chunk: int) -> None:
        unit = driver.granularity
        self.nbytes = -(-nbytes // unit) * unit
        self.chunk = -(-chunk // unit) * unit
        self.mapped = 0
        self._driver = driver
        self.address = driver.reserve(self.nbytes)

    def map_next(self) -> Tensor:
        """Map the next chunk, and return its bytes."""
        begin = self.mapped
        size = min(self.chunk, self.nbytes - begin)
        self._driver.map(self.address + begin, size)
        self.mapped += size
        return self.bytes(begin, size)

    def unmap(self) -> None:
        """Take all memory away, after all work that was launched."""
        if not self.mapped:
            return
        torch.cuda.synchronize()
        while self.mapped:
            size = self.mapped % self.chunk or self.chunk
            self._driver.unmap(self.address + self.mapped - size, size)
            self.mapped -= size

    def bytes(self, begin: int, nbytes: int) -> Tensor:
        """Return bytes of the span, behind which there is memory, as a tensor with a storage of its
        own. The span exists as long as the tensor does."""
        tensor: Tensor = torch.as_tensor(_Bytes(self, begin, nbytes), device="cuda")
        return tensor

    def __del__(self) -> None:
        # An interpreter that ends has no driver any more; the process gives everything back.
        with suppress(Exception):
            self.unmap()
            self._driver.give_back(self.address, self.nbytes)


class _Bytes:
    """Bytes of a span for torch, by the interface that libraries on a GPU share."""

    def __init__(self, span: Span, begin: int, nbytes: int) -> None:
        self.span = span
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (span.address + begin, False),
            "version": 2,
        }


class CUDAArena(Arena):
    """See `Arena`. Memory is mapped in pieces of 2 MiB at least."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._driver = Driver(device.index or 0)
        self._spans: list[Span] = []
        self._adopted: list[Tensor] = []
        self._kept: list[Tensor] = []
        """Copies of all chunks on the host, in order, in pinned memory. What is kept once can be
        restored any number of times, because adopted tensors do not change."""

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Arena`. The tensor is one chunk. Raises torch.OutOfMemoryError."""
        assert device == self._device, "an arena has one device"
        nbytes = math.prod(shape) * dtype.itemsize
        span = Span(self._driver, nbytes, chunk=nbytes)
        span.map_next()
        self._spans.append(span)
        return span.bytes(0, nbytes).view(dtype).view(*shape)

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """See `Arena`. The tensors move, one memory after the other, so that hardly more than one
        of them exists twice. Raises torch.OutOfMemoryError."""
        sharing: dict[int, list[Tensor]] = {}
        # A view refers to the tensor that it is a view of, which would keep the old memory.
        bases = [tensor._base for tensor in tensors if tensor._base is not None]
        for tensor in (*tensors, *bases):
            sharing.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        groups = [group for group in sharing.values() if group[0].untyped_storage().nbytes()]
        sizes = [_aligned(group[0].untyped_storage().nbytes()) for group in groups]
        span = Span(self._driver, sum(sizes), CHUNK_BYTES)
        self._spans.append(span)
        self._adopted += tensors
        begin = 0
        for group, size in zip(groups, sizes, strict=True):
            self._map(span, begin + size)
            old = group[0].untyped_storage()
            moved = span.bytes(begin, old.nbytes())
            moved.copy_(moved.new_empty(0).set_(old))
            for tensor in group:
                place = (tensor.storage_offset(), tensor.size(), tensor.stride())
                tensor.set_(moved.untyped_storage(), *place)
            begin += size

    def _map(self, span: Span, end: int) -> None:
        """Map chunks of a span until there is memory for its first `end` bytes."""
        while span.mapped < end:
            # What has been copied is free now, and is to be had once torch has given it back.
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            span.map_next()

    def forget(self) -> None:
        """See `Arena`."""
        torch.cuda.synchronize(self._device)  # no copy is under way
        self._kept.clear()
        # torch would keep what was pinned for itself.
        torch._C._host_emptyCache()

    def _release(self, keep: bool) -> None:
        if keep and not self._kept:
            self._keep()
        for span in self._spans:
            span.unmap()
        if not keep:
            self.forget()

    def _keep(self) -> None:
        needed, available = sum(span.nbytes for span in self._spans), available_memory()
        if needed > available:  # the kernel would end this process, or another one
            raise RuntimeError(f"{needed} bytes are needed, and {available} are available")
        try:
            for span in self._spans:
                for begin in range(0, span.nbytes, span.chunk):
                    chunk = span.bytes(begin, min(span.chunk, span.nbytes - begin))
                    host = torch.empty(len(chunk), dtype=torch.uint8, pin_memory=True)
                    self._kept.append(host.copy_(chunk, non_blocking=True))
            torch.cuda.synchronize(self._device)
        except BaseException:
            self.forget()
            raise

    def _restore(self) -> None:
        kept = iter(self._kept)
        try:
            for span in self._spans:
                while span.mapped < span.nbytes:
                    chunk = span.map_next()
                    if self._kept:
                        chunk.copy_(next(kept), non_blocking=True)
        except BaseException:
            for span in self._spans:
                span.unmap()
            raise
        torch.cuda.synchronize(self._device)

    def _refill(self, values: list[Tensor]) -> None:
        (span,) = self._spans  # that of the adopted tensors, which lie in it in their order
        try:
            for tensor in self._adopted:
                memory = tensor.untyped_storage()
                self._map(span, memory.data_ptr() + memory.nbytes() - span.address)
                tensor.copy_(values.pop(0))
        except BaseException:
            span.unmap()
            raise
        torch.cuda.synchronize(self._device)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT

"""Copies mapped weights to the memory of a device.

A thread that touches a mapped file waits for each of its pages, and a GPU copies from ordinary
memory through a small buffer of its driver. So several threads copy pages to buffers that the GPU
reads by itself, each thread to its own.

Knows: tensors and devices. Knows nothing of files, of the names of weights, or of models.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import TracebackType

import torch
from torch import Tensor

from minisrv import threads

BUFFER_BYTES = 16 << 20
"""Number of bytes that a thread copies to the GPU at a time."""

MOST_THREADS = 8
"""Maximum number of threads that copy. A few of them are as fast as the bus of a GPU."""


class Copies:
    """Copies from tensors on the CPU to tensors of a device, all of which are done when the context
    ends without an error. If one fails, the context raises its error."""

    def __init__(self, device: torch.device, on_copied: Callable[[], None]) -> None:
        """Start threads if the device is a GPU; for a CPU, torch's own threads copy.

        on_copied: is called for each copy that is done, by the thread that uses this object.
        """
        self._device = device
        self._on_copied = on_copied
        self._local = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._started: list[Future[None]] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what used the memory of the tensors before has ended
            number = min(MOST_THREADS, threads.cores())
            self._pool = ThreadPoolExecutor(number, "minisrv-copy", self._start_thread)

    def add(self, destination: Tensor, source: Tensor) -> None:
        """Copy a contiguous tensor to another of the same shape, maybe of another dtype. A GPU's
        copy is only begun."""
        if self._pool is None:
            destination.copy_(source)
            self._on_copied()
        else:
            self._started.append(self._pool.submit(self._copy, destination, source))

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is None:
            return
        try:
            if error is None:
                for done in as_completed(self._started):
                    done.result()
                    self._on_copied()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _start_thread(self) -> None:
        torch.cuda.set_device(self._device)
        self._local.buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._local.stream = torch.cuda.Stream(self._device)

    @torch.no_grad()
    def _copy(self, destination: Tensor, source: Tensor) -> None:
        buffer, stream = self._local.buffer, self._local.stream
        length = BUFFER_BYTES // source.itemsize
        pieces = zip(destination.view(-1).split(length), source.view(-1).split(length), strict=True)
        with torch.cuda.stream(stream):
            for to, piece in pieces:
                staged = buffer[: piece.nbytes].view(piece.dtype)
                # Not by torch, which would use several threads for each of these.
                ctypes.memmove(staged.data_ptr(), piece.data_ptr(), piece.nbytes)
                if to.dtype != staged.dtype:  # the GPU converts, and rounds in the same way
                    staged = staged.to(self._device, non_blocking=True)
                to.copy_(staged, non_blocking=True)
                stream.synchronize()

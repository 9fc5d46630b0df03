"""The graph backend for CUDA.

Knows: on which stream a capture runs, and in whose memory. Everything that an engine does runs on
one stream of its own, not the default one, so that a capture needs no change of streams: whatever
was warmed up there (library handles, workspaces) is what is recorded. All graphs share one private
pool, and the intermediates of one graph lie where another's do, because only one graph runs at a
time. Knows nothing of models, batches or modes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache

import torch

from minisrv.errors import GraphCaptureError
from minisrv.graph.backend import Replay


@cache
def engine_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which engines of this process run. Nothing else may use it, as all that
    it gets during a capture is recorded. torch hands out 32 streams of each priority by turns, so
    this is one of a priority that nothing else here asks for."""
    return torch.cuda.Stream(device, priority=-1)


class CUDABackend:
    """A `GraphBackend` for CUDA. It makes the engine's stream the current one of this thread."""

    def __init__(self, device: torch.device) -> None:
        self.stream = engine_stream(device)
        torch.cuda.set_stream(self.stream)
        self.pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        """See `GraphBackend`."""
        assert self._graph is None, "segments do not nest"
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA; only the calls of this thread are recorded.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self._graph = graph

    def end(self) -> Replay:
        """See `GraphBackend`. Raises GraphCaptureError for work that CUDA could not record."""
        graph, self._graph = self._graph, None
        assert graph is not None, "no segment is being recorded"
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise GraphCaptureError(f"CUDA could not record a graph: {error}") from error
        return graph.replay

    def finish(self) -> None:
        """Do nothing: intermediates were given their places while they were recorded."""

    def interrupted(self, between: Callable[[], None]) -> AbstractContextManager[None]:
        """See `GraphBackend`. A capture and a replay are one operation each."""
        return nullcontext()

    def memory_used(self) -> int:
        """Return the number of bytes of the GPU that any process uses: a graph takes memory of the
        driver too."""
        free, total = torch.cuda.mem_get_info(self.stream.device)
        return total - free

    def intermediates(self) -> None:
        """See `GraphBackend`. The pool is CUDA's allocator's."""

    def abandon(self) -> None:
        """See `GraphBackend`."""
        if self._graph is not None:
            with suppress(RuntimeError):  # the error that ended it is being raised already
                self._graph.capture_end()
            self._graph = None

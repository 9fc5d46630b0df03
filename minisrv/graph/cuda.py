"""CUDA's graph backend.

Knows: on which stream a capture runs, and in whose memory. Everything an engine does runs on one
stream of its own, not the default one, so that a capture needs no change of streams: what was
warmed up there (library handles, workspaces) is what is recorded. All graphs share one private
pool; intermediates of one graph lie where another's do, as only one runs at a time.
Knows nothing of models, batches or modes.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import torch

from minisrv.errors import GraphCaptureError
from minisrv.graph.backend import Replay


@cache
def engine_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that engines of this process run on."""
    return torch.cuda.Stream(device)


class CUDABackend:
    """A `GraphBackend` for CUDA; makes the engine's stream the current one of this thread."""

    def __init__(self, device: torch.device) -> None:
        self.stream = engine_stream(device)
        torch.cuda.set_stream(self.stream)
        self.pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        """Start to record a segment."""
        assert self._graph is None, "segments do not nest"
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA; only this one's calls are recorded.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self._graph = graph

    def end(self) -> Replay:
        """Stop recording. Raises GraphCaptureError for what CUDA could not record."""
        graph, self._graph = self._graph, None
        assert graph is not None, "no segment is being recorded"
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise GraphCaptureError(f"CUDA could not record a graph: {error}") from error
        return graph.replay

    def finish(self) -> None:
        """Nothing is left to do: intermediates got their places while they were recorded."""

    def memory_used(self) -> int:
        """Bytes of the GPU that anybody uses: a graph takes the driver's memory too."""
        free, total = torch.cuda.mem_get_info(self.stream.device)
        return total - free

    def abandon(self) -> None:
        """Forget the capture that an error has ended."""
        if self._graph is not None:
            with suppress(RuntimeError):  # the error that ended it is on its way already
                self._graph.capture_end()
            self._graph = None

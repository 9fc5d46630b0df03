"""Measures how long the work that a step launches takes.

Knows: the stages of a step, and each device's clock. Knows nothing of graphs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minisrv.core.step import SchedulerOutput
from minisrv.graph.observer import StepObserver
from minisrv.modes import GraphKey


class LaunchTimer(StepObserver):
    """Times one step, from the launch of its first stage to the end of its last one.

    On a GPU it uses events, so that gaps in which the GPU waits for the host count too. On a CPU it
    uses the clock, and adds up the stages.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = 0.0
        self._events: list[torch.cuda.Event] = []
        self._on_gpu = device.type == "cuda"

    @contextmanager
    def stage(self, key: GraphKey, output: SchedulerOutput) -> Iterator[None]:
        """See `StepObserver`."""
        if self._on_gpu and not self._events:
            self._record()
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        if self._on_gpu:
            self._record()

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    @property
    def ms(self) -> float:
        """Duration in milliseconds; on a GPU it waits for the step."""
        if not self._on_gpu:
            return 1000 * self._seconds
        self._events[-1].synchronize()
        return float(self._events[0].elapsed_time(self._events[-1]))

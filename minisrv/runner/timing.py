"""Measures how long the work that a step launches takes.

Knows: the runner's `launch`, which it replaces for the duration of a block, and each device's
clock.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import SchedulerOutput
from minisrv.modes import Part
from minisrv.runner.logprobs import LogprobReport

if TYPE_CHECKING:
    from minisrv.runner.model_runner import ModelRunner


class LaunchTimer:
    """Times the step that `runner` executes in the block, beginning when its buffers are filled.

    On a GPU it uses events and measures from the launch of the step to its end on the GPU,
    including gaps in which the GPU waits for the host. On a CPU it uses the clock.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._launch = runner.launch
        self._seconds = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if runner.buffers.device.type == "cuda":
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )

    def __enter__(self) -> Self:
        self._runner.launch = self._timed
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.launch = self._launch

    def _timed(
        self, part: Part, output: SchedulerOutput, dispatch: Dispatch
    ) -> LogprobReport | None:
        start = time.perf_counter()
        if self._events is not None and part is Part.FORWARD:
            self._events[0].record()
        result = self._launch(part, output, dispatch)
        if self._events is not None:
            self._events[1].record()
        self._seconds += time.perf_counter() - start
        return result

    @property
    def ms(self) -> float:
        """Duration in milliseconds; on a GPU it waits for the step."""
        if self._events is None:
            return 1000 * self._seconds
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1]))

"""Launches, the times a step hands work from the host to the device: counted, or made to cost time.

A launch is
- an operation that runs outside of a graph, unless it only makes a view or reserves memory;
- a piece of a graph, and whatever runs between two pieces, which counts as one launch.
So a FULL step is one launch, whatever it contains. Filling the static buffers and reading the
result are copies that every mode has; they are not counted.

Knows: the runner's `launch` and its wrappers, which it replaces by its own versions. A runner that
nobody counts or slows down runs none of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import SchedulerOutput
from minisrv.graph.cpu_tape import is_launch
from minisrv.graph.wrapper import CapturedGraph
from minisrv.modes import Part
from minisrv.runner.model_runner import Launch, ModelRunner


@contextmanager
def count_launches(runner: ModelRunner) -> Iterator[LaunchCounter]:
    """Count the launches of the steps that `runner` executes in the block. Counting makes them
    slow."""
    launch, counter = runner.launch, LaunchCounter(runner)

    def counted(part: Part, output: SchedulerOutput, dispatch: Dispatch) -> Any:
        with counter:
            return launch(part, output, dispatch)

    runner.launch = counted
    try:
        yield counter
    finally:
        runner.launch = launch


def busy_wait(microseconds: float) -> None:
    """Keep the host busy for that time, as launching does; a sleep is not precise enough."""
    end = time.perf_counter_ns() + microseconds * 1000
    while time.perf_counter_ns() < end:
        pass


def simulate_launches(
    runner: ModelRunner, microseconds: float, wait: Callable[[float], None] = busy_wait
) -> None:
    """Make every step that `runner` executes from now on longer by `microseconds` for each launch.

    Each part of a step waits once, for all its launches: intercepting each operation takes several
    microseconds itself, for views too. The number of launches depends only on the key below (a step
    whose number depended on more could not be captured), and is counted when a key is seen first.

    wait: the function that waits; it takes microseconds.
    """
    launch: Launch = runner.launch
    counter = LaunchCounter(runner)
    counts: dict[object, int] = {}

    def slow(part: Part, output: SchedulerOutput, dispatch: Dispatch) -> Any:
        key = (
            part,
            dispatch.mode,
            dispatch.descriptor,
            dispatch.epilogue,
            output.num_rows,
            output.needs_logits,
            output.masked,
        )
        if key in counts:
            result = launch(part, output, dispatch)
        else:
            before = counter.count
            with counter:
                result = launch(part, output, dispatch)
            counts[key] = counter.count - before
        wait(counts[key] * microseconds)
        return result

    runner.launch = slow


class LaunchCounter(TorchDispatchMode):
    """Counts launches while it is entered. Counters can be nested."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see cpu_tape._Recorder

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._wrappers = runner.wrappers
        self._replays: list[Callable[[CapturedGraph], None]] = []

    def __enter__(self) -> Self:
        self._replays = [wrapper.replay for wrapper in self._wrappers]
        for wrapper in self._wrappers:
            wrapper.replay = partial(self._replay, wrapper.replay)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        for wrapper, replay in zip(self._wrappers, self._replays, strict=True):
            wrapper.replay = replay

    def _replay(self, replay: Callable[[CapturedGraph], None], graph: CapturedGraph) -> None:
        before = self.count
        replay(graph)
        # Operations that the replay itself has dispatched are not counted.
        self.count = before + len(graph.walk)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.count += is_launch(func, (args, kwargs), result)
        return result

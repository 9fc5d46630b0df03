"""Launches, the times a step hands work from the host to the device: counted, or made to cost time.

A launch is
- an operation that runs outside of a graph, unless it only makes a view or reserves memory;
- a piece of a graph, and whatever runs between two pieces, which counts as one launch.
A piece of compiled code is one operation, whatever it contains.
So a FULL step is one launch, whatever it contains. Filling the static buffers and reading the
result are copies that every mode has; they are not counted.

Knows: what an observer of steps is told. A step that nobody observes runs none of this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.compile.decorator import CompiledForward
from minisrv.core.step import SchedulerOutput
from minisrv.graph.cpu_tape import is_launch
from minisrv.graph.observer import StepObserver
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage
from minisrv.nn.model import Model


class LaunchCounter(StepObserver):
    """Counts the launches of the steps that it observes. Counting makes them slow."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def stage(self, key: GraphKey, output: SchedulerOutput) -> Iterator[None]:
        """See `StepObserver`."""
        with _CountedOperations(self):
            yield

    @contextmanager
    def replay(self, num_launches: int) -> Iterator[None]:
        """See `StepObserver`."""
        before = self.count
        yield
        # Operations that the replay itself has dispatched are not counted.
        self.count = before + num_launches


class LaunchCensus(StepObserver):
    """Knows how many launches a stage takes without a graph, for the shapes that have been
    certified: it counts the eager run of each with which its graph is compared.

    model: the model, whose compiled code has other numbers than its own. Code that is compiled as a
        whole has none: it calls its kernels past torch.
    """

    is_told_of_trials = True

    def __init__(self, model: Model) -> None:
        self._model = model
        self._counts: dict[tuple[bool, BatchDescriptor], int] = {}

    def count(self, descriptor: BatchDescriptor, generation: int) -> int | None:
        """Return the launches of a stage by the code of a generation; None if they are not
        known."""
        return self._counts.get((generation > 0, descriptor))

    def stage(self, key: GraphKey, output: SchedulerOutput) -> AbstractContextManager[None] | None:
        """See `StepObserver`. No step of a request is counted, which would make it slow."""
        compiled, descriptor = self._model.compiled, key[1]
        if isinstance(compiled, CompiledForward) and descriptor.stage is Stage.MODEL:
            return None  # under a dispatch mode Dynamo would also trace the whole model anew
        shape = (compiled is not None, descriptor)
        is_trial = output.step_id < 0
        if not is_trial or key[0] is not CUDAGraphMode.NONE or shape in self._counts:
            return None
        return self._counted(shape, key, output)

    @contextmanager
    def _counted(
        self, shape: tuple[bool, BatchDescriptor], key: GraphKey, output: SchedulerOutput
    ) -> Iterator[None]:
        counter = LaunchCounter()
        with counter.stage(key, output):
            yield
        self._counts[shape] = counter.count


class _CountedOperations(TorchDispatchMode):
    """Adds the operations that are dispatched to the count of a `LaunchCounter`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see cpu_tape._Recorder

    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._counter.count += is_launch(func, (args, kwargs), result)
        return result


def busy_wait(microseconds: float) -> None:
    """Keep the host busy for that time, as launching does; a sleep is not precise enough."""
    end = time.perf_counter_ns() + microseconds * 1000
    while time.perf_counter_ns() < end:
        pass


class SimulatedLaunches(StepObserver):
    """Makes every step that it observes longer by `microseconds` for each launch.

    Each stage waits once, for all its launches: intercepting each operation takes several
    microseconds itself, for views too. The number of launches depends only on the key below and
    on the code of the model (a stage whose number depended on more could not be captured), and is
    counted when a key is seen first.

    wait: the function that waits; it takes microseconds.
    """

    def __init__(self, microseconds: float, wait: Callable[[float], None] = busy_wait) -> None:
        self._microseconds = microseconds
        self._wait = wait
        self._counts: dict[object, int] = {}
        self._counter: LaunchCounter | None = None

    @contextmanager
    def stage(self, key: GraphKey, output: SchedulerOutput) -> Iterator[None]:
        """See `StepObserver`."""
        kind = (key, output.num_rows, output.needs_logits, output.has_structured_output_requests)
        if kind in self._counts:
            yield
        else:
            self._counter = LaunchCounter()
            with self._counter.stage(key, output):
                yield
            self._counts[kind], self._counter = self._counter.count, None
        self._wait(self._counts[kind] * self._microseconds)

    def swapped(self) -> None:
        """See `StepObserver`. Other code has other numbers of launches."""
        self._counts.clear()

    @contextmanager
    def replay(self, num_launches: int) -> Iterator[None]:
        """See `StepObserver`."""
        if self._counter is None:
            yield
        else:
            with self._counter.replay(num_launches):
                yield

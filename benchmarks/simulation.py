"""An engine without a device: the scheduler, the prefix cache and the dispatcher are the real ones,
and a step takes the time that a cost model predicts. `budgets.py` and `fleet.py` use it.

Knows: when each step begins and ends. The host takes no time here. Imports no torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minisrv.core.attention_work import AttentionWork
from minisrv.core.budget import PrefillBudget
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import SchedulerOutput
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey
from minisrv.request import EngineOutput, EngineRequest

MAX_WAITING = 1_000_000
"""Number of requests that may wait: a simulation refuses none."""


@dataclass(frozen=True)
class EngineShape:
    """The sizes of an engine.

    ahead: whether a step is launched while another one runs.
    """

    ladders: Ladders
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    ahead: bool


def model_budget(shape: EngineShape, costs: CostModel, itl_target_ms: float) -> PrefillBudget:
    """Return the budget that an engine has by default."""
    ladders = shape.ladders
    dispatcher = Dispatcher(ladders)

    def predict_ms(num_tokens: int, work: AttentionWork) -> float:
        return costs.predict(dispatcher.dispatch(num_tokens, 1, query_len=None).key, work)

    return PrefillBudget(
        ladders.max_num_batched_tokens,
        sizes=(*ladders.mixed, *ladders.eager_sizes),
        predict_ms=predict_ms,
        itl_target_ms=itl_target_ms,
    )


class SimulatedEngine:
    """An engine whose steps take the time that a cost model predicts.

    now_ms: the time at which the last step ended, or at which the engine was told something.
    """

    def __init__(
        self,
        shape: EngineShape,
        device: CostModel,
        budget: PrefillBudget,
        *,
        enable_prefix_caching: bool,
    ) -> None:
        self.now_ms = 0.0
        self._device = device
        self._ahead = shape.ahead
        self._in_flight: deque[tuple[SchedulerOutput, float]] = deque()
        self._dispatcher = Dispatcher(shape.ladders)
        self.block_pool = BlockPool(shape.num_kv_blocks, shape.block_size)
        self.scheduler = Scheduler(
            self.block_pool,
            budget,
            max_num_seqs=shape.ladders.max_num_seqs,
            max_model_len=shape.max_model_len,
            max_waiting=MAX_WAITING,
            enable_prefix_caching=enable_prefix_caching,
        )

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or a step is in flight."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def next_ms(self) -> float:
        """The time at which the oldest step in flight ends; infinite if there is none."""
        return self._in_flight[0][1] if self._in_flight else math.inf

    def add(self, request: EngineRequest) -> None:
        """Queue a request."""
        self.scheduler.add(request, seed=0)

    def launch(self) -> None:
        """Launch what an engine would launch now."""
        while len(self._in_flight) <= self._ahead:
            output = self.scheduler.schedule()
            if output is None:
                break
            begin = self._in_flight[-1][1] if self._in_flight else self.now_ms
            key = self._dispatcher.dispatch(
                output.num_tokens, output.num_rows, query_len=output.query_len
            ).key
            ms = self._device.predict(key, output.work)
            self.ran(output, key, ms)
            self._in_flight.append((output, begin + ms))

    def ran(self, output: SchedulerOutput, key: GraphKey, ms: float) -> None:
        """Hear of a step that is launched."""

    def retire(self) -> list[EngineOutput]:
        """Go on to the end of the oldest step in flight, and return its outputs."""
        output, self.now_ms = self._in_flight.popleft()
        return self.scheduler.update(output.step_id, [[1]] * output.num_rows)

    def step(self) -> list[EngineOutput]:
        """Launch what can be launched, and retire a step."""
        self.launch()
        return self.retire() if self._in_flight else []


def packed(sample: StepSample) -> list[Any]:
    """Return a step as plain values."""
    (mode, key), work, ms = sample
    return [mode.name, key.num_tokens, key.uniform_decode, *work, round(ms, 4)]


def unpacked(values: Sequence[Any]) -> StepSample:
    """Return the step of such values."""
    mode, num_tokens, uniform_decode, context, pairs, longest, ms = values
    query_len = 1 if uniform_decode else None
    key = BatchDescriptor(num_tokens, num_tokens if uniform_decode else None, query_len)
    return StepSample((CUDAGraphMode[mode], key), AttentionWork(context, pairs, longest), ms)

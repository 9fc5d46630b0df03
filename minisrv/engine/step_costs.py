"""What steps cost in one engine: measured at start-up and whenever other code takes over the model,
and followed by the choice of graphs and by the number of prompt tokens of a step.

Knows: who chooses by which times. Knows nothing of how steps are timed, nor of how a choice is made
(`core.dispatcher`, `core.cost_model`, `core.budget`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from minisrv.certification.timing import cost_keys, cost_samples, sample_costs, time_graphs
from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.core.budget import ITL_TARGET_STEPS, PrefillBudget
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.graph_times import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders, decode_descriptor
from minisrv.modes import CUDAGraphMode, GraphKey, Stage, StageOutput
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class StepCosts:
    """The costs of steps, and those who choose by them: a dispatcher, and a budget with its target.

    dispatcher: knows which graphs are in service.
    at_start: ladders with few sizes, whose graphs are in service from the start.
    itl_target_ms: the target; 0 for none, and None for the one that follows from the measured time
        of a decode step (`ITL_TARGET_STEPS`). Without a target, nothing is predicted.
    chooses_graphs: whether the dispatcher chooses by measured times.
    times: the durations that were measured of steps by each graph; none unless the dispatcher
        chooses by them.
    samples: the timed steps to which the cost model was fitted; none if there is no target.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        at_start: Ladders,
        itl_target_ms: float | None,
        *,
        chooses_graphs: bool,
    ) -> None:
        self.dispatcher = dispatcher
        self._at_start = at_start
        self.cost_model = CostModel()
        self.times: Mapping[GraphKey, StepTime] = {}
        self.samples: list[StepSample] = []
        self._keys: dict[int, GraphKey] = {}  # of steps with prefill, which are asked for often
        self._target_ms = itl_target_ms
        self._chooses_graphs = chooses_graphs
        ladders = dispatcher.ladders
        self.budget = PrefillBudget(ladders.max_num_batched_tokens)
        if itl_target_ms != 0:
            self.budget = PrefillBudget(
                ladders.max_num_batched_tokens,
                sizes=(*ladders.mixed, *ladders.eager_sizes),
                predict_ms=self._predict_ms,
                itl_target_ms=math.inf if itl_target_ms is None else itl_target_ms,
            )

    @property
    def itl_target_ms(self) -> float:
        """The target that is kept; 0 for none."""
        return self.budget.target_or_zero

    def timed_keys(self) -> list[GraphKey]:
        """Return the steps whose times `use_times` is to be given."""
        return self._timed_keys(self.dispatcher.in_service, self._at_start)

    def timed_keys_of(self, ladders: Ladders, graphs: Collection[GraphKey]) -> list[GraphKey]:
        """Return the steps whose times `use_ladders` is to be given with these arguments."""
        return self._timed_keys(graphs, ladders.covering())

    def _timed_keys(self, graphs: Collection[GraphKey], few: Ladders) -> list[GraphKey]:
        costs = [] if self._target_ms == 0 else cost_keys(few)
        costs = [key for key in costs if key in graphs or key[0] is CUDAGraphMode.NONE]
        return list(dict.fromkeys([*(graphs if self._chooses_graphs else ()), *costs]))

    def asks_for(self, key: GraphKey) -> bool:
        """Whether `add` is to be given the time of a step by that graph."""
        return key[1].stage is Stage.MODEL and (self._chooses_graphs or self._target_ms != 0)

    def measure(self, runner: ModelRunner, pool: BlockPool, long_context: int) -> None:
        """Time the steps of a runner that serves nobody yet.

        long_context: see `sample_costs`.
        """
        if self._chooses_graphs:
            self.times = time_graphs(runner, pool)
            self._choose_graphs(self.times)
        if self._target_ms != 0:
            keys = cost_keys(self._at_start)
            self.samples = sample_costs(runner, pool, keys, self.times, long_context)
            self.cost_model.fit(self.samples)
            self._set_default_target()

    def longest_step_ms(self, key: GraphKey) -> float:
        """Return the time of the graph that runs the batches of a missing one, which takes no
        longer; 0 if graphs are not timed."""
        stand_in = self.times.get(self.dispatcher.stand_in(key))
        return stand_in.median_ms if stand_in is not None else 0.0

    def add(self, key: GraphKey, time: StepTime | None) -> None:
        """Let the dispatcher choose one more graph, which is installed, by its time if `asks_for`
        asks for that. What is predicted for batches that it holds is now the time of this graph. If
        anything fails, no batch runs by it."""
        with _undone_by_errors(self, self.dispatcher):
            if time is not None:
                samples = cost_samples({key: time})
                self.samples = [*self.samples, *samples]
                if self._target_ms != 0:
                    self.cost_model.add(samples)
                if self._chooses_graphs:
                    self.times = {**self.times, key: time}
                    self.dispatcher.use_times(self.times)
            self.dispatcher.use_graphs({*self.dispatcher.in_service, key})
            self._keys = {}

    def remove(self, key: GraphKey) -> None:
        """Let the dispatcher choose a graph no more."""
        self.dispatcher.use_graphs(self.dispatcher.in_service - {key})
        self._keys = {}

    def use_times(self, times: Mapping[GraphKey, StepTime]) -> None:
        """Choose by the durations of the `timed_keys` of other code, which has taken over. If
        anything fails, all choices are as before."""
        with _undone_by_errors(self, self.dispatcher, self.cost_model, self.budget):
            if self._chooses_graphs:
                self.times = times
                self._choose_graphs(times)
            if self._target_ms != 0:
                self.cost_model.rebase(cost_samples(times))
                self._set_default_target()
                logger.info("ITL target %.1f ms", self.itl_target_ms)

    def use_ladders(
        self,
        ladders: Ladders,
        graphs: Collection[GraphKey],
        times: Mapping[GraphKey, StepTime],
    ) -> None:
        """Choose among graphs of other ladders, which have taken over, by the durations of their
        `timed_keys_of`; none if there are no such keys. If anything fails, all choices are as
        before.

        graphs: the keys of those that serve.
        """
        with _undone_by_errors(self, self.dispatcher, self.cost_model, self.budget):
            self.dispatcher.ladders = ladders
            self.dispatcher.use_graphs(graphs)
            self._at_start = ladders.covering()
            if self._target_ms != 0:
                self.budget.sizes = (*ladders.mixed, *ladders.eager_sizes)
            self._keys = {}
            if times:
                self.use_times(times)

    def price(self, decode: bool, size: int) -> float:
        """Return the time that a step is predicted to take by the graph of a size, captured or not;
        the number of its tokens where nothing is predicted (`core.ladder_fit.Price`)."""
        ladders = self.dispatcher.ladders
        key = (
            (CUDAGraphMode.FULL, decode_descriptor(size, StageOutput.TOKENS, ladders.query_len))
            if decode
            else ladders.mixed_key(size)
        )
        return self.cost_model.predict(key, NO_WORK) or float(size)

    def _choose_graphs(self, times: Mapping[GraphKey, StepTime]) -> None:
        self.dispatcher.use_times(times)
        self._keys = {}

    def _set_default_target(self) -> None:
        if self._target_ms is None:
            ladders = self.dispatcher.ladders
            most, query_len = ladders.max_num_seqs, ladders.query_len
            decode = self.dispatcher.dispatch(most * query_len, most, query_len=query_len)
            decode_ms = self.cost_model.predict(decode.key, NO_WORK)
            self.budget.itl_target_ms = ITL_TARGET_STEPS * decode_ms

    def _predict_ms(self, num_tokens: int, work: AttentionWork) -> float:
        """Predict a step with prefill (`core.budget.PredictMs`)."""
        key = self._keys.get(num_tokens)
        if key is None:
            key = self.dispatcher.dispatch(num_tokens, 1, query_len=None).key
            self._keys[num_tokens] = key
        return self.cost_model.predict(key, work)


@contextmanager
def _undone_by_errors(*parts: object) -> Iterator[None]:
    """Put the attributes of objects back if the block raises an error. The block replaces what they
    refer to, and does not change it."""
    before = [vars(part).copy() for part in parts]
    try:
        yield
    except BaseException:
        for part, attributes in zip(parts, before, strict=True):
            vars(part).update(attributes)
        raise

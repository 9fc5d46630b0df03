"""The cost model in an engine: what it knows at the start, what it learns, and what follows."""

from __future__ import annotations

from itertools import product

import pytest

from minisrv.config import EngineConfig
from minisrv.core.attention_work import NO_WORK, AttentionWork
from minisrv.core.budget import Chunk
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.dispatcher import Dispatcher, StepTime
from minisrv.core.ladder import build_ladders
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.step_costs import StepCosts
from minisrv.engine.step_costs import logger as costs_logger
from minisrv.modes import BudgetReason, CUDAGraphMode, GraphKey
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.results import DeviceTime, StepResult
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model")))


def start(checkpoint: str, mode: str = "full-and-piecewise", **settings: object) -> EngineCore:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4, "device": "cpu"}
    limits |= {"itl_target_ms": 1000.0, "cudagraph_capture": "whole"}
    config = {**limits, "cudagraph_mode": CUDAGraphMode(mode), "model": checkpoint, **settings}
    return EngineCore(build_engine(EngineConfig(**config)))


def generate(engine: EngineCore, *lengths: int, **params: object) -> dict[str, list[int]]:
    """Run requests with prompts of these lengths, one of which arrives in each step."""
    waiting = list(enumerate(lengths))
    tokens: dict[str, list[int]] = {}
    while waiting or engine.has_work:
        if waiting:
            index, length = waiting.pop(0)
            given = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **params})
            prompt = [(5 * index + 3 * place) % 50 for place in range(length)]
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=given))
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("mode", ["none", "piecewise", "full-decode-only", "full-and-piecewise"])
def test_every_step_has_a_prediction_from_the_start(checkpoint: str, mode: str):
    """Also steps without a graph, which above a ladder are all large ones."""
    sizes = None if mode == "none" else (1, 4, 8)
    engine = start(checkpoint, mode, cudagraph_capture_sizes=sizes)
    dispatcher, model = engine.dispatcher, engine.cost_model
    for tokens, decode in product(range(1, 33), (True, False)):
        if decode and tokens > 4:
            continue
        rows = tokens if decode else 1
        found = dispatcher.dispatch(tokens, rows, query_len=1 if decode else None)
        assert (
            0 < model.predict(found.key, NO_WORK) <= model.predict(found.key, AttentionWork(9, 9))
        )


def test_served_steps_are_compared_and_learnt_from(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
):
    """Every step takes 70 ms here, much more than measured at start, and soon is predicted to."""
    monkeypatch.setattr(StepResult, "device_time", lambda self: DeviceTime(70.0, None))
    engine = start(checkpoint)
    generate(engine, 5, max_tokens=200)
    stats = engine.stats()
    errors = stats.step_time_errors
    assert sum(errors.counts) == sum(step.steps for step in stats.steps) == 200
    assert 4 < errors.total < 20, "at first predictions are far below, and soon no more"
    key = engine.dispatcher.dispatch(1, 1, query_len=1).key
    assert engine.cost_model.predict(key, AttentionWork(200)) == pytest.approx(70, rel=0.1)
    # Log-probabilities make the host wait in the middle of a step.
    generate(engine, 5, logprobs=0)
    assert sum(engine.stats().step_time_errors.counts) == 200
    assert sum(step.steps for step in engine.stats().steps) == 212


def test_a_target_changes_the_steps_and_no_token(checkpoint: str):
    """With a target that nothing meets, prompts beside decode are computed in small pieces; without
    a target, as many prompt tokens as may be are in a step, and nothing is timed."""
    lengths = (5, 60, 60)
    tight, free = start(checkpoint, itl_target_ms=1e-6), start(checkpoint, itl_target_ms=0.0)
    tokens = [generate(engine, *lengths, temperature=0.0) for engine in (tight, free)]
    assert tokens[0] == tokens[1]
    counted = [
        {count.reason: (count.steps, count.tokens) for count in engine.stats().budgets}
        for engine in (tight, free)
    ]
    assert BudgetReason.OVER_ITL_TARGET in counted[0]
    assert counted[1].keys() == {BudgetReason.ALL_WAITING, BudgetReason.STEP_LIMIT}
    assert [sum(number for _, number in each.values()) for each in counted] == [125, 125]
    steps = [sum(number for number, _ in each.values()) for each in counted]
    assert steps[0] > steps[1] == 5
    assert sum(free.stats().step_time_errors.counts) == 0


def test_a_target_is_kept_when_the_largest_graph_is_taken_out_of_service():
    """Its batches run eagerly, and none larger than the target allows is chosen for them."""
    ladders = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 8, 512)
    costs = StepCosts(Dispatcher(ladders), ladders, 50.0, chooses_graphs=False)
    costs.cost_model.fit(
        StepSample(key, NO_WORK, 10 + 0.1 * key[1].num_tokens) for key in costs.timed_keys()
    )
    chunks = [Chunk(0, 3000)]
    before = costs.budget.choose(4, 400, chunks)
    assert before == (380, BudgetReason.ITL_TARGET, pytest.approx(48.4))
    costs.remove(ladders.mixed_key(ladders.mixed[-1]))
    assert costs.budget.choose(4, 400, chunks) == before
    for size in range(1, 513):
        assert costs.budget._predict_ms(size, NO_WORK) > 0


def test_times_that_cannot_be_used_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """Whatever fails on the way, graphs, predictions and the target all follow the times of the
    code that serves. The dispatcher once kept those of code that did not."""
    ladders = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 4, 64)
    costs = StepCosts(Dispatcher(ladders), ladders, None, chooses_graphs=True)

    def times(full_ms: float, piecewise_ms: float) -> dict[GraphKey, StepTime]:
        by_mode = {CUDAGraphMode.FULL: full_ms, CUDAGraphMode.PIECEWISE: piecewise_ms}
        found = {key: by_mode.get(key[0], 9.0) + key[1].num_tokens for key in costs.timed_keys()}
        return {key: StepTime(ms, ms) for key, ms in found.items()}

    def state() -> tuple[object, ...]:
        keys = [costs.dispatcher.dispatch(size, size, query_len=1).key for size in range(1, 5)]
        predicted = [costs.budget._predict_ms(size, NO_WORK) for size in range(1, 65)]
        return keys, predicted, costs.itl_target_ms

    def fail(*_: object) -> None:
        raise RuntimeError("not now")

    costs.use_times(times(1.0, 5.0))
    before, other = state(), times(8.0, 0.5)
    for part, name in ((CostModel, "rebase"), (CostModel, "predict"), (costs_logger, "info")):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, fail)
            with pytest.raises(RuntimeError):
                costs.use_times(other)
        assert state() == before, name
    costs.use_times(other)
    assert all(new != old for new, old in zip(state(), before, strict=True))

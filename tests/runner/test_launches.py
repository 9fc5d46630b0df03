"""Launches of kernels and graphs: each step's number is counted exactly, a simulated cost is waited
for exactly, and neither costs anything when it is not asked for."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from minisrv.certification.batches import BatchRow
from minisrv.certification.timing import time_graphs
from minisrv.certification.trial import StepTrial, reserved_space
from minisrv.compile.decorator import CompiledForward
from minisrv.config import EngineConfig
from minisrv.core.ladder import epilogue_descriptor
from minisrv.engine import builder, step_costs
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.errors import ConfigError
from minisrv.graph.observer import observing
from minisrv.modes import BatchDescriptor, CUDAGraphMode, StageOutput
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner import launches
from minisrv.runner.launches import LaunchCensus, LaunchCounter, SimulatedLaunches, busy_wait
from tests.checkpoints import make_checkpoint

LAYERS = 2
EPILOGUE = 5
"""Number of operations behind the model: gather of the rows, lm_head, masks, sampling, and the
write back to the persistent tensors of the requests."""
FORWARD = 1 + 11 * LAYERS + 1
"""Number of operations of the model: embedding, layers (see tests/nn/test_op_count.py), and the
last norm."""
PIECES = 2 * LAYERS + 1
"""Number of launches of a forward pass by pieces: each attention op, a piece before each and one
behind the last."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    return str(make_checkpoint(directory, "qwen3", num_hidden_layers=LAYERS))


def start(checkpoint: str, mode: str = "full-and-piecewise", **settings) -> EngineCore:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4}
    limits["cudagraph_capture"] = "whole"
    limits["device"] = "cpu"  # A GPU has other kernels, and so other numbers of launches.
    settings = {**limits, "cudagraph_mode": CUDAGraphMode(mode), **settings}
    return EngineCore(build_engine(EngineConfig(model=checkpoint, **settings)))


def add(engine: EngineCore, name: str, **params) -> None:
    given = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, **params}
    engine.add(
        EngineRequest(request_id=name, prompt_token_ids=[5, 6, 7], params=SamplingParams(**given))
    )


def steps(engine: EngineCore) -> list[int]:
    """Run to the end, and return the number of launches of each step."""
    found = []
    while engine.has_work:
        counter = LaunchCounter()
        with observing(engine.observers, counter):
            engine.step()
        found.append(counter.count)
    return found


@pytest.mark.parametrize(
    ("mode", "prefill", "decode"),
    [
        ("none", FORWARD + EPILOGUE, FORWARD + EPILOGUE),
        ("piecewise", PIECES + EPILOGUE, PIECES + EPILOGUE),
        ("full-decode-only", FORWARD + 1, 1),
        ("full", 1 + 1, 1),
        ("full-and-piecewise", PIECES + 1, 1),
    ],
)
def test_the_launches_of_a_step(checkpoint, mode, prefill, decode, tape_holds_mixed_batches):
    engine = start(checkpoint, mode)
    add(engine, "a")
    # Sampling is one operation, whatever its parameters are.
    add(engine, "b", temperature=0.8, top_p=0.9)
    assert steps(engine) == [prefill] + 5 * [decode]


def test_operations_behind_a_graph_count(checkpoint):
    """Operations behind a graph are counted too: a step whose logits are read samples and reports
    outside of its graph."""
    engine = start(checkpoint)
    add(engine, "a", logprobs=2)
    _, *decodes = steps(engine)
    assert len(set(decodes)) == 1
    assert decodes[0] > 2 + 2 + 5, "the graphs, the sampler, the scatter, and the report"


def test_counting_leaves_nothing_behind(checkpoint):
    """Behind the block nothing is counted any more, and nobody else observes the
    runner."""
    engine = start(checkpoint)
    before = [*engine.observers]
    add(engine, "a")
    counter = LaunchCounter()
    with observing(engine.observers, counter):
        engine.step()
    engine.step()
    assert counter.count == PIECES + 1, "what runs behind the block is not counted"
    assert engine.runner.observers == before


@pytest.mark.parametrize("is_whole", [False, True])
def test_code_that_is_compiled_as_a_whole_has_no_number(checkpoint, is_whole):
    """Its kernels are called past torch, and Dynamo would trace the model anew below a count."""
    engine = start(checkpoint, "none")
    model, key = engine.runner.model, (CUDAGraphMode.NONE, BatchDescriptor(4))
    census = LaunchCensus(model)
    model.compiled = CompiledForward(model.forward) if is_whole else None
    with (
        reserved_space(engine.runner, engine.scheduler.block_pool) as space,
        observing(engine.observers, census),
    ):
        trial = StepTrial(engine.runner, space, key, (BatchRow(0, 4),))
        trial.run(None)
        trial.clear()
    assert census.count(key[1], int(is_whole)) == (None if is_whole else FORWARD)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Collect the waits, in microseconds, of an engine that starts with `simulate_launch_us`,
    instead of waiting."""
    found: list[float] = []
    monkeypatch.setattr(
        builder, "SimulatedLaunches", lambda us: SimulatedLaunches(us, found.append)
    )
    return found


def test_each_step_waits_for_its_launches_and_no_capture_for_any(checkpoint, waits, monkeypatch):
    """Capture and certification do not wait; the steps that are timed for the cost model do."""
    sample_costs, before_timing = step_costs.sample_costs, []

    def sampled(*arguments):
        before_timing.extend(waits)
        return sample_costs(*arguments)

    monkeypatch.setattr(step_costs, "sample_costs", sampled)
    engine = start(checkpoint, simulate_launch_us=2.5, itl_target_ms=1000.0)
    assert engine.info.ladder.graphs > 0
    assert before_timing == []
    assert waits
    waits.clear()
    for name in ("a", "b"):
        add(engine, name)
        while engine.has_work:
            engine.step()
        # Nothing is launched behind a graph that holds the whole step.
        found = [wait for wait in waits if wait]
        assert found == [2.5 * PIECES, 2.5] + 5 * [2.5], "the same when the count is known"
        waits.clear()


class Output(NamedTuple):
    """The fields of a SchedulerOutput that tell kinds of steps apart."""

    num_rows: int
    needs_logits: bool
    has_structured_output_requests: bool


def test_a_count_is_of_one_kind_of_stage():
    """A known count may not stand for a stage that differs in kind, mode, shape, rows, logits or
    masks: each of these may choose another kernel."""
    waits: list[float] = []
    simulated = SimulatedLaunches(1.0, waits.append)
    stages = [
        ((mode, descriptor), Output(rows, logits, masked))
        for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)
        for descriptor in (
            BatchDescriptor(4),
            BatchDescriptor(8),
            epilogue_descriptor(4, StageOutput.TOKENS),
            epilogue_descriptor(4, StageOutput.LOGITS),
        )
        for rows in (1, 2)
        for logits, masked in ((False, False), (True, False), (True, True))
    ]
    expected = {stage: count for count, stage in enumerate(stages, 1)}
    for stage in stages * 2:
        with simulated.stage(*stage):
            for _ in range(expected[stage]):
                torch.zeros(1)
    assert waits == list(expected.values()) * 2


def test_a_swap_forgets_the_counts():
    """Other code has other numbers of launches; the count of the code before it stayed."""
    waits: list[float] = []
    simulated = SimulatedLaunches(1.0, waits.append)
    stage = (CUDAGraphMode.NONE, BatchDescriptor(4)), Output(4, False, False)
    for count, swaps in ((5, False), (9, False), (2, True), (9, False)):
        if swaps:
            simulated.swapped()
        with simulated.stage(*stage):
            for _ in range(count):
                torch.zeros(1)
    assert waits == [5, 5, 2, 2]


def test_simulated_steps_can_be_counted(checkpoint, waits):
    """Two counters may work at once, as in bench under --simulate-launch-us."""
    engine = start(checkpoint, simulate_launch_us=1.0)
    waits.clear()
    add(engine, "a")
    assert steps(engine) == [PIECES + 1] + 5 * [1]
    assert [wait for wait in waits if wait] == [PIECES, 1] + 5 * [1]


def test_timed_graphs_take_the_simulated_time_too(checkpoint):
    """The times of `minisrv plan --measure` are those of the steps that the engine would run."""
    engine = start(checkpoint, "full-decode-only", simulate_launch_us=2000.0)
    times = time_graphs(engine.runner, engine.scheduler.block_pool)
    assert times
    assert min(time.min_ms for time in times.values()) >= 2.0


def test_simulation_changes_no_token_and_says_so(checkpoint, waits, caplog):
    tokens = {}
    for us in (0.0, 3.0):
        caplog.clear()
        engine = start(checkpoint, simulate_launch_us=us)
        add(engine, "greedy", logprobs=1)
        add(engine, "sampled", temperature=0.9, seed=4)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        tokens[us] = [(each.request_id, each.token_ids, each.logprobs) for each in outputs]
        assert engine.info.simulated_launch_us == us
        assert ("SIMULATED: every launch takes 3 us longer" in caplog.text) == bool(us)
    assert tokens[0.0] == tokens[3.0]
    assert waits


@pytest.mark.parametrize("us", [-1.0, float("nan"), float("inf")])
def test_what_cannot_be_waited_is_refused(us):
    with pytest.raises(ConfigError, match="simulate_launch_us"):
        EngineConfig(simulate_launch_us=us)


def test_busy_wait_ends_when_the_time_is_over(monkeypatch):
    clock = iter([1_000, 5_000, 6_499, 6_500, 6_501])
    monkeypatch.setattr(launches.time, "perf_counter_ns", lambda: next(clock))
    busy_wait(5.5)
    assert next(clock) == 6_501

"""The step trace: each record says what its step did, in every mode, with no or one step launched
ahead; and no more is kept than was asked for."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from minisrv.certification.shadow import ShadowTrial
from minisrv.config import EngineConfig
from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import SchedulerOutput
from minisrv.engine import step_trace
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import RefitReport
from minisrv.engine.step_trace import STEPS_OF_AN_ANSWER, StepTrace
from minisrv.engine.trace_format import AskSteps, Steps, TracedStep
from minisrv.graph.observer import StepObserver, observing
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineOutput, EngineRequest, SamplingParams
from minisrv.runner.launches import LaunchCounter
from tests.checkpoints import make_checkpoint
from tests.engine.test_compilation import FakeCompiler

ALL = 1 << 31
LAYERS = 2
FORWARD, EPILOGUE, SAMPLING = 1 + 11 * LAYERS + 1, 5, 3
"""Numbers of launches; see tests/runner/test_launches.py. Where every row samples, an epilogue is
lm_head, sampling and the write back."""
RUN_AGAIN = ShadowTrial.run
MODES = ("none", "piecewise", "full-decode-only", "full-and-piecewise")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=LAYERS))


def start(checkpoint: str, mode: str = "full-and-piecewise", **settings: Any) -> EngineCore:
    """A small engine whose cache holds fewer tokens than its requests may have."""
    compiled = settings.pop("compiled", False)
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "block_size": 4, "device": "cpu"}
    limits |= {"cudagraph_capture": "whole", "num_kv_blocks": 16, "max_model_len": 48}
    config = {**limits, "model": checkpoint, "cudagraph_mode": CUDAGraphMode(mode), **settings}
    if "itl_target_ms" not in config:
        config["itl_target_ms"] = 0.0
    make_compiler = FakeCompiler(cached=True) if compiled else None
    return EngineCore(build_engine(EngineConfig(**config), make_compiler=make_compiler))


def add(engine: EngineCore, name: str, length: int, **params: Any) -> None:
    given = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True, **params}
    prompt = [ord(name[0]) % 50 + place for place in range(length)]
    engine.add(
        EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(**given),
            include_graph_stats=True,
        )
    )


def trace_of(engine: EngineCore) -> StepTrace:
    assert engine.step_trace is not None
    return engine.step_trace


def whole(engine: EngineCore) -> Steps:
    """All that is kept, with the requests of each step."""
    trace, found, after = trace_of(engine), Steps(), -1
    while True:
        answer = trace.read(AskSteps(after, ALL, ALL))
        requests = {batch.id: batch.requests for batch in answer.batches}
        for step in answer.steps:
            step.requests = requests[step.batch]
        found = Steps(answer.first, answer.end, [*found.steps, *answer.steps])
        if not answer.steps or answer.steps[-1].id + 1 == answer.end:
            return found
        after = answer.steps[-1].id


class Witness:
    """Sees the steps that an engine launches, and how many launches each took if that is counted.

    Where steps are launched ahead, a step of the engine has the launches of another one.
    """

    def __init__(self, engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[SchedulerOutput, Dispatch]] = []
        self.launches: list[int] = []
        self.outputs: list[EngineOutput] = []
        self.engine = engine
        launch = engine.runner.execute_model

        def execute_model(output: SchedulerOutput, dispatch: Dispatch) -> None:
            self.seen.append((output, dispatch))
            launch(output, dispatch)

        monkeypatch.setattr(engine.runner, "execute_model", execute_model)

    def run(self) -> None:
        while self.engine.has_work:
            counter = LaunchCounter()
            with observing(self.engine.observers, counter):
                self.outputs += self.engine.step()
            self.launches.append(counter.count)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("mode", "compiled"), [*((mode, False) for mode in MODES), ("full-and-piecewise", True)]
)
def test_every_record_says_what_its_step_did(
    checkpoint: str, mode: str, ahead: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of prompts, mixed and pure batches, reports of log-probabilities, a preemption."""
    engine = start(checkpoint, mode, async_scheduling=ahead, compiled=compiled)
    witness = Witness(engine, monkeypatch)
    for name, length, params in [
        ("a", 20, {"max_tokens": 24}),
        ("b", 3, {"logprobs": 1, "max_tokens": 4}),
        ("c", 15, {"max_tokens": 24}),
        ("d", 15, {"max_tokens": 24}),
    ]:
        add(engine, name, length, **params)
    witness.run()
    steps, ids = whole(engine).steps, {}
    assert [step.id for step in steps] == [output.step_id for output, _ in witness.seen]
    for step, (output, dispatch) in zip(steps, witness.seen, strict=True):
        descriptor, epilogue = dispatch.descriptor, dispatch.epilogue
        assert (step.mode, step.reason) == (dispatch.mode.name, dispatch.reason.value)
        assert (step.rung, step.rung_requests) == (descriptor.num_tokens, descriptor.num_reqs)
        assert step.padding == step.rung - step.tokens >= 0
        assert step.padding == 0 or step.mode != "NONE"
        rows = output.rows
        assert isinstance(step.requests, list)
        assert [tokens for _, tokens in step.requests] == [row.num_tokens for row in rows]
        for row, (opaque_id, _) in zip(rows, step.requests, strict=True):
            assert ids.setdefault(row.request_id, opaque_id) == opaque_id
        decodes = sum(row.is_decode for row in rows)
        assert (step.rows, step.decode_rows) == (len(rows), decodes)
        assert step.tokens == sum(row.num_tokens for row in rows)
        assert step.prefill_tokens == step.tokens - decodes
        assert step.context == sum(row.num_computed_tokens + row.num_tokens for row in rows)
        assert step.leaves == descriptor.output.name
        if epilogue is None:
            assert step.epilogue is step.epilogue_leaves is None
        else:
            told = (step.epilogue, step.epilogue_leaves)
            assert told == (epilogue[1].num_tokens, epilogue[1].output.name)
        assert step.batch == output.batch_id
        assert step.generation == int(compiled)
        assert step.budget_reason == (output.budget_reason and output.budget_reason.value)
        assert step.host_ms.keys() == {
            *("schedule", "dispatch", "fill", "launch", "result", "wait", "update")
        }
        assert all(ms > 0 for ms in step.host_ms.values())
        assert step.predicted_ms is None
        assert step.host_ms["launch"] <= step.measured_ms < 60_000, "a CPU launches by computing"
    if not ahead:
        counted = zip(steps, witness.launches, strict=True)
        assert all(step.launches in (None, launches) for step, launches in counted)
        assert all(sum(step.host_ms.values()) <= step.wall_ms for step in steps)
    assert_launches_are_replaced(engine, steps)
    assert len(set(ids.values())) == len(ids) == 4
    assert not set(ids) & set(ids.values())
    assert sum(step.sampled for step in steps) == sum(len(o.token_ids) for o in witness.outputs)
    assert sum(step.sampled for step in steps) == 24 + 4 + 24 + 24
    assert sum(step.preempted for step in steps) == engine.scheduler.num_preemptions > 0
    assert (steps[-1].running, steps[-1].waiting, steps[-1].kv_used) == (0, 0, 0)
    assert max(step.waiting for step in steps) > 0
    assert max(step.running for step in steps) == 3
    # The metrics and the answers about single requests tell the same.
    counted = Counter()
    for count in engine.stats().steps:
        counted[(count.mode, count.reason)] = (count.steps, count.tokens, count.padded_tokens)
    for key, group in itertools.groupby(sorted(steps, key=_key), _key):
        alike = list(group)
        told = (len(alike), sum(s.tokens for s in alike), sum(s.padding for s in alike))
        assert counted.pop(key) == told
    assert not counted
    for last in witness.outputs:
        if last.finish_reason is not None:
            assert_stats_agree(last, ids[last.request_id], steps)
    stats = [last.graph_stats for last in witness.outputs if last.graph_stats is not None]
    assert sum(each.preemptions for each in stats) == engine.scheduler.num_preemptions


def assert_launches_are_replaced(engine: EngineCore, steps: list[TracedStep]) -> None:
    """Check that the launches which a graph stands for are those of the same stages without one,
    where all of them are graphs."""
    epilogues = engine.dispatcher.ladders.epilogues
    for step in steps:
        by_graphs = step.mode == "FULL" or (step.mode == "PIECEWISE" and epilogues)
        is_counted = bool(by_graphs) and step.epilogue_leaves != "LOGITS"
        assert is_counted == (step.launches is not None) == (step.launches_replaced is not None)
        if step.launches is None or step.launches_replaced is None:
            continue
        assert step.launches_replaced > step.launches
        if not step.generation:
            # A decode step gathers its inputs. All its rows sample, and none of them by a mask.
            stages = FORWARD + (step.mode == "FULL")
            expected = stages + (SAMPLING if step.epilogue is None else EPILOGUE)
            assert step.launches_replaced == expected


def _key(step: TracedStep) -> tuple[str, str]:
    return step.mode, step.reason


def assert_stats_agree(last: EngineOutput, opaque_id: str, steps: list[TracedStep]) -> None:
    """Check what a request is told of its own steps."""
    own = [step for step in steps if opaque_id in {name for name, _ in step.requests or ()}]
    stats = last.graph_stats
    assert stats is not None
    assert last.graph_steps is not None
    assert stats.id == opaque_id
    assert sum(last.graph_steps.values()) == len(own)
    assert stats.padded_tokens == sum(step.padding for step in own)
    graphs = Counter(f"{step.mode}/{step.rung}" for step in own if step.mode != "NONE")
    assert stats.rungs == graphs
    assert stats.generations == sorted({step.generation for step in own})
    assert min(stats.queue_ms, stats.prefill_ms, stats.decode_ms) >= 0


def test_only_who_asks_is_told(checkpoint: str) -> None:
    engine = start(checkpoint)
    params = SamplingParams(max_tokens=2)
    for name, asks in (("a", True), ("b", False)):
        request = EngineRequest(
            request_id=name, prompt_token_ids=[1], params=params, include_graph_stats=asks
        )
        engine.add(request)
    told = {}
    while engine.has_work:
        told |= {o.request_id: o.graph_stats for o in engine.step() if o.finish_reason}
    assert told["a"] is not None
    assert told["b"] is None


def test_cached_tokens_and_an_abort_in_the_queue(checkpoint: str) -> None:
    engine = start(checkpoint)
    found = {}
    for name in ("abc", "axy"):  # with the same prompt
        add(engine, name, 13, max_tokens=1)
        while engine.has_work:
            found |= {o.request_id: o.graph_stats for o in engine.step() if o.graph_stats}
    assert [stats.cached_tokens for stats in found.values()] == [0, 12]
    add(engine, "waits", 3)
    last = engine.abort("waits")
    assert last is not None
    stats = last.graph_stats
    assert stats is not None
    assert (stats.rungs, stats.generations, stats.preemptions) == ({}, [], 0)
    assert stats.prefill_ms == stats.decode_ms == 0 < stats.queue_ms


def test_predictions(checkpoint: str) -> None:
    """With a target every step has a prediction, but for those that wait for the host."""
    engine = start(checkpoint, itl_target_ms=1000.0)
    add(engine, "a", 5)
    add(engine, "b", 5, logprobs=0, max_tokens=3)
    while engine.has_work:
        engine.step()
    steps = whole(engine).steps
    assert {step.predicted_ms is None for step in steps} == {True, False}
    for step in steps:
        assert (step.predicted_ms is None) == (step.epilogue_leaves == "LOGITS")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_no_more_is_kept_than_was_asked_for(checkpoint: str, size: int) -> None:
    engine = start(checkpoint, step_trace=size)
    trace = trace_of(engine)
    for round_ in range(3):
        add(engine, f"{round_}", 3 + round_, max_tokens=5)
        add(engine, f"{round_}+", 9, max_tokens=2 + round_)
        while engine.has_work:
            engine.step()
            found = whole(engine)
            assert [step.id for step in found.steps] == [*range(found.first, found.end)]
            assert len(found.steps) == min(size, found.end)
            kept = {step.batch for step in found.steps}
            assert kept == trace._batches.keys(), "nothing else refers to requests"
            assert trace._num_rows == sum(len(batch.ids) for batch in trace._batches.values())


def test_the_rows_that_are_kept_are_bounded_together(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_trace, "MAX_ROWS", 3)
    engine = start(checkpoint)
    for name in "abc":
        add(engine, name, 5, max_tokens=4 + ord(name) % 3)
    while engine.has_work:
        engine.step()
        batches = {step.batch: step.rows for step in whole(engine).steps}
        assert sum(batches.values()) <= 3 or len(batches) == 1


def test_what_a_reader_asks_for(checkpoint: str) -> None:
    engine = start(checkpoint, step_trace=200)
    for _ in range(9):
        add(engine, "a", 4, max_tokens=40)
        while engine.has_work:
            engine.step()
    trace, end = trace_of(engine), trace_of(engine)._end
    first = end - 200
    assert first > 0

    def ids(after: int | None, limit: int) -> list[int]:
        answer = trace.read(AskSteps(after, -1, limit))
        assert (answer.first, answer.end) == (first, end)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=Steps) == answer
        assert {step.batch for step in answer.steps} == {batch.id for batch in answer.batches}
        return [step.id for step in answer.steps]

    assert ids(None, 3) == [end - 3, end - 2, end - 1]
    assert ids(end, 3) == ids(None, 3), "an id of an earlier start"
    assert ids(None, 0) == ids(end - 1, 3) == []
    assert ids(end - 3, ALL) == [end - 2, end - 1]
    assert ids(end - 3, 1) == [end - 2]
    some = [*range(first, first + STEPS_OF_AN_ANSWER)]
    assert ids(None, ALL) == ids(-1, ALL) == ids(0, ALL) == some


def test_an_answer_has_a_bounded_number_of_rows(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at least one step. The reader goes on behind it, and misses neither steps nor events."""
    engine = start(checkpoint)
    trace = trace_of(engine)
    for name in "abcdef":
        add(engine, name, 3, max_tokens=4)
        engine.step()
    engine.filling.quarantine(next(iter(engine.runner.graphs)), "it was wrong.")
    trace.note(engine.describe())
    while engine.has_work:
        engine.step()
    expected = trace.read(AskSteps(-1, -1, ALL))
    assert len(expected.batches) > 5
    monkeypatch.setattr(step_trace, "ROWS_OF_AN_ANSWER", 4)
    steps: list[int] = []
    events: list[int] = []
    after, number = -1, -1
    while after + 1 < expected.end:
        answer = trace.read(AskSteps(after, number, ALL))
        assert answer.steps
        ids = {batch.id for batch in answer.batches}
        assert ids == {step.batch for step in answer.steps}
        assert sum(len(b.requests) for b in answer.batches) <= max(4, answer.steps[0].rows)
        steps += [step.id for step in answer.steps]
        events += [event.number for event in answer.events]
        after, number = steps[-1], max([number, *events])
    assert steps == [step.id for step in expected.steps]
    assert events == [event.number for event in expected.events] != []


def test_events_have_their_place(checkpoint: str) -> None:
    """Graphs that come into service while steps run are events between these, each told once."""
    engine = start(checkpoint, cudagraph_capture="covering")
    trace, told, after, number = trace_of(engine), [], -1, -1
    add(engine, "a", 4, max_tokens=40)
    while engine.has_work or engine.background.has_work:
        if engine.has_work:
            engine.step()
        if engine.advance_background():
            trace.note(engine.describe())
        answer = trace.read(AskSteps(after, number, ALL))
        for event in answer.events:
            assert after - 1 <= event.after < answer.end
            told.append(event.number)
            number = event.number
        after = answer.end - 1
    assert told == [*range(len(told))]
    report = engine.filling.report
    events = trace.read(AskSteps(-1, -1, ALL)).events
    assert [event.event for event in events] == ["graph_captured"] * len(events)
    line = events[-1].line()
    assert (line["graphs"], line["total"]) == (report.graphs, report.total)
    assert line["in_service"] == engine.info.ladders


def test_graphs_that_leave_and_ladders_that_change_are_events(checkpoint: str) -> None:
    """A graph that is quarantined, one that is refused, and a refit."""
    engine = start(checkpoint)
    trace = trace_of(engine)
    key = next(iter(engine.runner.graphs))
    engine.filling.quarantine(key, "it was wrong.")
    trace.note(engine.describe())
    before = engine.describe()
    ladders = replace(engine.runner.ladders, decode=(5, *engine.runner.ladders.decode[-1:]))
    engine.dispatcher.ladders = ladders
    engine.filling.replaced(RefitReport(refits=1, seconds=2.0))
    info = engine.describe()
    trace.note(info)
    refused = msgspec.structs.replace(info.ladder, refused={"FULL decode 5 TOKENS": "it differs."})
    trace.note(msgspec.structs.replace(info, ladder=refused))
    lines = [event.line() for event in trace.read(AskSteps(-1, -1, ALL)).events]
    assert [line["event"] for line in lines] == ["quarantine", "refit", "refused"]
    assert lines[0]["reason"] == "it was wrong."
    assert lines[0]["graphs"] == before.ladder.graphs == before.ladder.total - 1
    assert lines[1]["ladders"] == info.ladders == ladders.sizes
    assert info.ladders != before.ladders
    assert lines[2]["graph"] == "FULL decode 5 TOKENS"


@pytest.mark.parametrize("ahead", [False, True])
def test_no_step_is_told_to_take_the_time_of_something_else(
    checkpoint: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose last request was aborted does nothing before the next one comes, and no part
    of a step includes its verification."""
    clock = itertools.count(0.0, 1e-6)
    times = SimpleNamespace(time=time.time, perf_counter=lambda: next(clock))
    monkeypatch.setattr(step_trace, "time", times)

    def long_run(trial: ShadowTrial) -> None:
        RUN_AGAIN(trial)
        wait(1000.0)

    def wait(seconds: float) -> None:
        nonlocal clock
        clock = itertools.count(next(clock) + seconds, 1e-6)

    monkeypatch.setattr(ShadowTrial, "run", long_run)
    engine = start(checkpoint, async_scheduling=ahead, verify_graphs=1.0)
    add(engine, "a", 5)
    for _ in range(5):
        engine.step()
    engine.abort("a")
    while engine.has_work:
        engine.step()
    wait(1e6)
    add(engine, "b", 5)
    while engine.has_work:
        engine.step()
    steps = whole(engine).steps
    assert engine.verification.counts["agreed"] == len(steps) > 10
    assert all(sum(step.host_ms.values()) < 1000.0 for step in steps)
    assert all(step.wall_ms < 1e8 for step in steps)


def test_without_a_trace_nobody_observes(checkpoint: str) -> None:
    engine = start(checkpoint, step_trace=0)
    assert engine.step_trace is None
    assert engine.observers == []
    add(engine, "a", 3)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    stats = outputs[-1].graph_stats
    assert stats is not None
    assert stats.id is None
    assert sum(stats.rungs.values()) == 10


def test_another_observer_changes_nothing(checkpoint: str) -> None:
    engine = start(checkpoint)
    with observing(engine.observers, StepObserver()):
        add(engine, "a", 3)
        while engine.has_work:
            engine.step()
    assert len(whole(engine).steps) == 10

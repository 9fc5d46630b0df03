"""Other ladders enter service between the steps of an engine: as one generation, certified, because
they fit the batches better, or not at all."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minisrv.certification.trial import StepTrial
from minisrv.compile.decorator import CompiledForward
from minisrv.core.attention_work import NO_WORK
from minisrv.core.batch_counts import BatchCounts
from minisrv.core.cost_model import CostModel
from minisrv.core.ladder import build_ladders, decode_descriptor
from minisrv.core.ladder_fit import computed_tokens
from minisrv.engine import background, builder, refit
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import RefitReport, SleepTag
from minisrv.engine.platforms import CPUPlatform
from minisrv.engine.platforms.cuda import CUDAPlatform
from minisrv.engine.refit import LEAST_GAIN, propose
from minisrv.engine.step_costs import StepCosts
from minisrv.errors import EngineAsleepError
from minisrv.graph.captured import CapturedGraph
from minisrv.modes import CUDAGraphMode, Reason, StageOutput
from minisrv.nn.decoder import Decoder
from tests.checkpoints import make_checkpoint
from tests.engine.test_compilation import FakeCompiler
from tests.engine.test_compilation import start as compiling
from tests.engine.test_filling import fill, requests, serve, start

FORWARD = Decoder.forward
COUNT = 14
"""A number of requests in whose steps more than two decode."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work has turns behind each step, and every look at a few steps may be followed by a
    proposal."""
    for name in ("LEAST_GAP", "REST"):
        monkeypatch.setattr(background, name, 0.0)
    for name in ("LOOK_SECONDS", "REST_SECONDS"):
        monkeypatch.setattr(refit, name, 0.0)
    monkeypatch.setattr(refit, "LEAST_STEPS", 20)


def report_of(engine: EngineCore) -> RefitReport:
    report = engine.describe().ladder.refit
    assert engine.stats().ladder.refit == report
    return report


def check_whole(engine: EngineCore) -> None:
    """Everything that knows of ladders knows those in service, and every batch has its graph."""
    ladders = engine.runner.ladders
    assert engine.dispatcher.ladders is ladders
    assert set(engine.runner.graphs) == set(ladders.keys()) == engine.dispatcher.in_service
    report = engine.describe().ladder
    assert (report.decode, report.mixed, report.epilogues) == (
        ladders.decode,
        ladders.mixed,
        ladders.epilogues,
    )
    assert (report.graphs, report.missing, report.refused) == (len(ladders.keys()), 0, {})
    for size in range(1, ladders.max_num_seqs + 1):
        found = engine.dispatcher.dispatch(size, size, query_len=1)
        assert not found.missing
        assert found.mode is ladders.mode.decode_mode


@pytest.mark.parametrize(
    ("mode", "ahead"),
    [("full-and-piecewise", True), ("piecewise", False), ("full-decode-only", False)],
)
def test_tokens_stay_the_same_while_other_ladders_take_over(
    checkpoint: str,
    mode: str,
    ahead: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Requests run before, during and behind it, wherever it makes way, and none of their steps
    lacks a graph."""
    monkeypatch.setattr(background, "TURN", 0.0)
    settings = {"cudagraph_mode": CUDAGraphMode(mode), "async_scheduling": ahead}
    expected, _ = serve(start(checkpoint, **settings), COUNT)
    engine = start(checkpoint, cudagraph_refit="apply", **settings)
    fill(engine)
    before, most = engine.runner.ladders, engine.info.ladder.total
    old = [weakref.ref(graph) for graph in engine.runner.graphs.values()]
    rounds = 0
    with caplog.at_level(logging.INFO):
        while not report_of(engine).refits:
            found, ran = serve(engine, COUNT, turns=40)
            assert found == expected
            modes = {key.split("/")[0] for each in ran for key in each}
            assert ("NONE" in modes) is (mode == "full-decode-only")  # for prompts, as ever
            assert not any(Reason.SIZE_MISSING in key for each in ran for key in each)
            rounds += 1
            assert rounds < 10
    after = engine.runner.ladders
    assert after != before
    assert (after.decode[-1:], after.mixed[-1:]) == (before.decode[-1:], before.mixed[-1:])
    assert len(after.keys()) <= most
    check_whole(engine)
    gc.collect()
    assert not [each for each in (ref() for ref in old) if each is not None]
    for words in ("would save", "--cudagraph-capture-sizes", "other ladders serve, with"):
        assert words in caplog.text
    assert serve(engine, COUNT, turns=0)[0] == expected


def test_a_proposal_changes_nothing(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the description and in the log, once in a while, as a line for the command."""
    engine = start(checkpoint, cudagraph_refit="propose")
    fill(engine)
    ladders, graphs = engine.runner.ladders, dict(engine.runner.graphs)
    monkeypatch.setattr(refit, "REST_SECONDS", 1000.0)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            serve(engine, COUNT)
            fill(engine)
    report = report_of(engine)
    assert report.gain >= LEAST_GAIN
    assert (report.refits, report.refused) == (0, "")
    assert caplog.text.count("--cudagraph-capture-sizes ") == 1
    assert engine.runner.ladders is ladders
    assert dict(engine.runner.graphs) == graphs
    again = start(checkpoint, cudagraph_capture_sizes=report.sizes)
    assert again.info.ladder.total <= len(ladders.keys())


def test_without_it_nothing_is_looked_at(checkpoint: str) -> None:
    engine = start(checkpoint)
    fill(engine)
    serve(engine, COUNT)
    assert not engine.background.has_work
    assert report_of(engine) == RefitReport()


def test_nothing_is_proposed_that_saves_too_little() -> None:
    ladders = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, 32, 48)

    def proposal(decode: dict[int, int]) -> Any:
        return propose(ladders, BatchCounts(decode), computed_tokens, 99, lambda: None)

    assert proposal({}) is None
    assert proposal({32: 100, 8: 1000}) is None
    assert proposal({8: 10_000, 9: 100}) is None  # 700 tokens of 81,600
    found = proposal({8: 10_000, 9: 1000})
    assert found.gain == pytest.approx(7 / 96)
    assert found.padding == 0.0
    assert found.padding_before == pytest.approx(7 / 96)
    assert propose(ladders, BatchCounts({9: 99}), computed_tokens, 3, lambda: None) is None


def test_graphs_that_fail_their_certification_leave_the_ladders_as_they_are(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same proposal is not tried again."""
    expected, _ = serve(start(checkpoint), COUNT)
    engine = start(checkpoint, cudagraph_refit="apply")
    fill(engine)
    ladders, graphs = engine.runner.ladders, dict(engine.runner.graphs)

    def freezes(model: Decoder, ids: torch.Tensor, positions: Any, out: torch.Tensor) -> None:
        FORWARD(model, ids, positions, out)
        if len(ids) not in (*ladders.decode, *ladders.mixed):
            out.add_(1e-7 * float(positions.numpy().sum()))

    monkeypatch.setattr(Decoder, "forward", freezes)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert serve(engine, COUNT)[0] == expected
    fill(engine)
    report = report_of(engine)
    assert "differs from the eager run's" in report.refused
    assert report.refits == 0
    assert len(report.sizes) > 3
    assert caplog.text.count("the proposed capture sizes may not serve: ") >= 1
    tried = engine.runner.ladders
    assert tried is ladders
    assert dict(engine.runner.graphs) == graphs
    check_whole(engine)


def use_imagined_times(monkeypatch: pytest.MonkeyPatch, ms: Callable[[int], float]) -> None:
    """Let a step by a graph take that time, by its padded tokens."""

    def time(trial: Any, graph: Any) -> float:
        return 100.0 if graph is None else ms(trial.key[1].num_tokens)

    monkeypatch.setattr(CPUPlatform, "times_graphs", True)
    monkeypatch.setattr(StepTrial, "time", time)
    monkeypatch.setattr(CostModel, "observe", lambda *_: None)  # steps that are served take others


@pytest.mark.parametrize("where", ["room", "swap"])
def test_without_memory_or_with_an_error_the_ladders_stay(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected, _ = serve(start(checkpoint), COUNT)
    use_imagined_times(monkeypatch, lambda size: 1.0 + size)
    monkeypatch.setattr(CPUPlatform, "has_room", lambda *given: given[-1] < 1 << 30)
    engine = start(checkpoint, cudagraph_refit="apply", itl_target_ms=1000.0)
    fill(engine)
    ladders, graphs = engine.runner.ladders, dict(engine.runner.graphs)
    sizes = engine.scheduler.budget.sizes
    if where == "room":
        monkeypatch.setattr(refit, "predicted_bytes", lambda *_: 1 << 30)
    else:

        def fails(*_: Any) -> None:
            raise RuntimeError("it breaks")

        monkeypatch.setattr(StepCosts, "use_times", fails)
    assert serve(engine, COUNT)[0] == expected
    fill(engine)
    report = report_of(engine)
    assert report.refused == (
        "they may take 1024.0 MiB, which the GPU has not left."
        if where == "room"
        else "RuntimeError('it breaks')."
    )
    assert report.refits == 0
    assert engine.runner.ladders is ladders
    assert dict(engine.runner.graphs) == graphs
    assert engine.scheduler.budget.sizes == sizes
    check_whole(engine)
    assert serve(engine, COUNT)[0] == expected


def refitted(engine: EngineCore) -> None:
    for _ in range(10):
        serve(engine, COUNT)
        fill(engine)
        if report_of(engine).refits:
            return
    raise AssertionError("the ladders were not refitted")


def test_steps_are_predicted_and_chosen_by_the_times_of_the_new_graphs(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And sizes are proposed because of the times, not of the padding: here a step of up to 8
    requests takes as long as one of 8, and so no smaller size is of use."""
    use_imagined_times(monkeypatch, lambda size: 1.0 + max(8, size))
    engine = start(checkpoint, cudagraph_refit="apply", itl_target_ms=1000.0)
    fill(engine)
    refitted(engine)
    ladders = engine.runner.ladders
    check_whole(engine)
    # Those up to 4 and the next one are there because no batch is padded more than fourfold.
    assert len([size for size in ladders.decode if size < 8]) <= 2
    assert engine.scheduler.budget.sizes == (*ladders.mixed, *ladders.eager_sizes)
    for size in ladders.decode:
        key = engine.dispatcher.dispatch(size, size, query_len=1).key
        assert engine.cost_model.predict(key, NO_WORK) == pytest.approx(1 + max(8, size), rel=0.15)


class Buffered(CompiledForward):
    """Code that keeps its input in a buffer, as compiled pieces keep what a later one needs, and
    reads it at the end."""

    def __init__(self, model: Decoder) -> None:
        kept = torch.zeros(len(model.qkv), dtype=torch.int64)

        def forward(ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
            own = kept[: len(ids)]
            own.copy_(ids)
            FORWARD(model, ids, positions, out)
            out.mul_((own.unsqueeze(1) == ids.unsqueeze(1)).to(out.dtype))

        super().__init__(forward)
        self._kept = kept

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [self._kept]


@dataclass
class BufferedCompiler(FakeCompiler):
    def load(self, directory: Path, between: Callable[[], None]) -> Buffered:
        return Buffered(self.model)


def test_the_ladders_are_refitted_when_they_are_whole_and_compiled_code_serves(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before; and behind it, steps still run by the compiled code. The rest of the ladder is
    captured from it, and the other ladders are, while it serves: what it keeps in buffers of its
    own is set aside for the steps of requests."""
    monkeypatch.setattr(background, "TURN", 0.0)

    def slow(model: Decoder, *args: Any) -> None:
        for _ in range(3):
            FORWARD(model, *args)

    monkeypatch.setattr(Decoder, "forward", slow)
    settings = {"cudagraph_refit": "apply", "cudagraph_capture": "covering"}
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 32, "num_kv_blocks": 400}
    engine = compiling(checkpoint, BufferedCompiler(), **settings, **limits)
    found_whole = []

    def look(*given: Any) -> Any:
        found_whole.append(engine.filling.is_whole and not engine.compilation.is_under_way)
        return propose(*given)

    monkeypatch.setattr(refit, "propose", look)
    assert not engine.filling.is_whole
    assert engine.compilation.is_under_way
    for _ in range(10):
        serve(engine, COUNT, turns=40)
        if report_of(engine).refits:
            break
    assert report_of(engine).refits
    assert all(found_whole)
    assert engine.compilation.generation == 1
    assert not engine.describe().ladder.refused
    program = engine.runner.model.compiled
    assert program is not None
    fill(engine)
    assert engine.runner.model.compiled is program
    check_whole(engine)


@pytest.mark.parametrize("why", ["", "the disk is full."])
def test_kernels_are_compiled_before_other_graphs_are_captured(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Steps go on meanwhile. If they cannot be compiled, the ladders stay."""
    compiled: list[Any] = []
    served: list[int] = []

    def compiling(job: Any) -> Any:
        compiled.append(job.ladders)
        for _ in range(5):
            served.append(engine.counters.stats().generated_tokens)
            assert not engine.background.is_in_the_middle
            yield
        return why

    monkeypatch.setattr(builder, "compiled_meanwhile", compiling)
    engine = start(checkpoint, cudagraph_refit="apply")
    fill(engine)
    ladders = engine.runner.ladders
    for _ in range(3):
        serve(engine, COUNT)
        fill(engine)
    report = report_of(engine)
    assert len({*served}) > 3
    if why:
        assert report.refused == "their kernels could not be compiled: the disk is full."
        assert engine.runner.ladders is ladders
    else:
        assert report.refits
        assert engine.runner.ladders is compiled[-1]


def test_a_graph_that_was_quarantined_does_not_come_back(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the old one goes with its generation, whose memory it would keep."""
    use_imagined_times(monkeypatch, lambda size: 1.0 + size)
    engine = start(checkpoint, cudagraph_refit="apply", itl_target_ms=1000.0)
    fill(engine)
    gone, bad = (
        (CUDAGraphMode.FULL, decode_descriptor(size, StageOutput.TOKENS)) for size in (8, 16)
    )
    graphs = [weakref.ref(engine.runner.graphs[key]) for key in (gone, bad)]
    for key in (gone, bad):
        engine.filling.quarantine(key, "it was wrong.")
    gc.collect()
    assert all(graph() is not None for graph in graphs), "a step may still run by one"
    refitted(engine)
    gc.collect()
    assert not any(graph() is not None for graph in graphs), "its generation has gone"
    ladders = engine.runner.ladders
    assert gone not in ladders.keys()  # noqa: SIM118  (not a mapping)
    assert bad in ladders.keys()  # noqa: SIM118  (not a mapping)
    assert engine.dispatcher.in_service == set(engine.runner.graphs) == {*ladders.keys()} - {bad}
    report = engine.describe().ladder
    assert report.quarantined.keys() == {"FULL decode 8 TOKENS", "FULL decode 16 TOKENS"}
    assert (report.graphs, report.missing) == (report.total - 1, 0)
    assert engine.dispatcher.dispatch(16, 16, query_len=1).missing == (bad,)


def test_sleep_waits_for_a_refit_and_the_new_graphs_wake_up(checkpoint: str) -> None:
    settings = {"cudagraph_refit": "apply", "enable_sleep_mode": True}
    engine = start(checkpoint, **settings)
    fill(engine)
    expected, _ = serve(engine, COUNT, turns=0)
    serve(engine, COUNT, turns=0)
    while not engine.sleeper.is_busy:
        engine.advance_background()
    assert not report_of(engine).refits
    while engine.sleeper.is_busy:
        engine.advance_background()
    assert report_of(engine).refits == 1
    engine.sleeper.sleep(1)
    serve_steps = engine.stats().steps
    assert not engine.advance_background()
    with pytest.raises(EngineAsleepError):
        engine.add(next(requests(1)))
    engine.sleeper.wake_up(SleepTag)
    assert engine.stats().steps == serve_steps
    assert serve(engine, COUNT)[0] == expected
    check_whole(engine)


def test_an_engine_that_nobody_has_leaves_no_graphs_of_a_refit(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured() -> list[CapturedGraph]:
        return [each for each in gc.get_objects() if type(each) is CapturedGraph]

    monkeypatch.setattr(background, "TURN", 0.0)
    others = captured()
    engine = start(checkpoint, cudagraph_refit="apply")
    fill(engine)
    serve(engine, COUNT, turns=0)
    serve(engine, COUNT, turns=0)
    while not engine.background.is_in_the_middle:
        engine.advance_background()
    for _ in range(200):
        engine.advance_background()
    assert engine.background.is_in_the_middle
    runner = weakref.ref(engine.runner)
    del engine
    gc.collect()  # ends the thread, which has
    gc.collect()  # let go of what it held then
    assert runner() is None
    assert all(any(graph is other for other in others) for graph in captured())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["full", "full-and-piecewise"])
def test_other_ladders_take_over_on_a_gpu(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Graphs are captured into a pool of their own while steps are in flight, and the memory of the
    old ones is free again. Graphs are not timed, and sizes are proposed for their padding."""
    monkeypatch.setattr(CUDAPlatform, "times_graphs", False)
    settings = {"device": "cuda", "cudagraph_mode": CUDAGraphMode(mode)}
    expected, _ = serve(start(checkpoint, **settings), COUNT)
    engine = start(checkpoint, cudagraph_refit="apply", **settings)
    fill(engine)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    began = time.monotonic()
    while not report_of(engine).refits:  # the kernels of new sizes take seconds to compile
        assert time.monotonic() < began + 120
        assert not report_of(engine).refused
        assert serve(engine, COUNT)[0] == expected
        fill(engine)
    check_whole(engine)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= before + (64 << 20)
    assert serve(engine, COUNT)[0] == expected

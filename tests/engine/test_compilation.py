"""Compiled code enters service between the steps of requests, as a whole, certified, or not at all.

Programs are made by hand here: the model's own forward stands for compiled code, and what makes a
program wrong or slow is added to it. So that it is the faster one, the forward that the model
itself runs is computed several times.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import torch
import zmq

from minisrv import device_kind
from minisrv.certification.generation import (
    build_generation,
    measure_speedup,
    model_keys,
    timed_keys,
)
from minisrv.certification.trial import StepTrial, borrow_space
from minisrv.compile.decorator import Compiled, CompiledForward, Forward
from minisrv.config import EngineConfig
from minisrv.core.attention_work import NO_WORK
from minisrv.core.budget import ITL_TARGET_STEPS
from minisrv.core.kv_cache import BlockPool, hash_block
from minisrv.engine import background, compilation
from minisrv.engine.background import LEAST_GAP, REST, TURN, Background
from minisrv.engine.builder import build_engine
from minisrv.engine.compilation import Compilation
from minisrv.engine.core import EngineCore
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import (
    CompilationReport,
    CompilationState,
    EngineMessage,
    Hello,
    Ready,
    StepOutputs,
    Submit,
    decode_engine_message,
    encode,
)
from minisrv.engine.platforms import CPUPlatform
from minisrv.engine.process import _EngineServer
from minisrv.errors import CertificationError, CompilationError, MinisrvError
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.observer import StepObserver
from minisrv.modes import CUDAGraphMode, Reason
from minisrv.nn.decoder import Decoder
from minisrv.nn.model import Model
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.generation import Generation
from tests.checkpoints import make_checkpoint

FORWARD = Decoder.forward
TIMES = 4
"""How often the model's own forward computes everything."""

FEW = 16
"""Number of requests that run beside code that is refused."""

MADE = Path("program")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(autouse=True)
def slow_forward(monkeypatch) -> None:
    def forward(self: Decoder, *args: Any) -> None:
        for _ in range(TIMES):
            FORWARD(self, *args)

    monkeypatch.setattr(Decoder, "forward", forward)


@pytest.fixture(autouse=True)
def no_gaps(monkeypatch) -> None:
    monkeypatch.setattr(background, "LEAST_GAP", 0.0)
    monkeypatch.setattr(background, "REST", 0.0)
    monkeypatch.setattr(background, "TURN", 0.0)


@dataclass
class Progress:
    done: int = 1
    total: int = 3


@dataclass
class Process:
    """A process that compiles; it says each of `says` once, and its last word again and again."""

    says: list[Progress | Path | MinisrvError]
    closed: bool = False

    def poll(self) -> Progress | Path | MinisrvError:
        return self.says.pop(0) if len(self.says) > 1 else self.says[0]

    def close(self) -> None:
        self.closed = True


def right(model: Decoder) -> Forward:
    return lambda *args: FORWARD(model, *args)


class Pieces(Compiled):
    """A forward that stands for a program of pieces, whose launches are counted."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, *args: torch.Tensor) -> None:
        self._forward(*args)


@dataclass
class FakeCompiler:
    """Makes programs of a model.

    program: makes the program that is loaded.
    cached: whether the cache has it.
    slow: the speed of the program, by the steps for which it was found too slow.
    """

    model: Any = None
    program: Callable[[Decoder], Forward] = right
    process: Process = field(default_factory=lambda: Process([Progress(), MADE]))
    cached: bool = False
    started: int = 0
    discarded: bool = False
    slow: dict[str, float] = field(default_factory=dict)

    def __call__(self, model: Model) -> FakeCompiler:
        self.model = model
        return self

    def find(self) -> Path | None:
        return MADE if self.cached else None

    def discard(self, directory: Path) -> None:
        assert directory == MADE
        self.discarded = True

    def slowness(self, steps: str) -> float | None:
        return self.slow.get(steps)

    def remember_slowness(self, directory: Path, steps: str, speedup: float) -> None:
        self.discard(directory)
        self.slow[steps] = speedup

    def start(self) -> Process:
        self.started += 1
        return self.process

    def load(self, directory: Path, between: Callable[[], None]) -> Compiled:
        assert directory == MADE
        between()
        return Pieces(self.program(self.model))


def nothing(done: int, total: int) -> None:
    """Progress that nobody wants to see."""


def start(
    checkpoint: str, compiler: FakeCompiler | None, *, serve_slower: bool = False, **settings: Any
) -> EngineCore:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, "device": "cpu"}
    limits |= {"cudagraph_capture": "whole"}
    config = EngineConfig(
        model=checkpoint, **{**limits, "num_kv_blocks": 80, "dtype": "float32", **settings}
    )
    parts = build_engine(
        config, make_compiler=compiler, serve_slower=serve_slower, check_addresses=True
    )
    return EngineCore(parts)


def requests(count: int) -> Iterator[EngineRequest]:
    for index in range(count):
        kinds = ({"temperature": 0.0}, {"temperature": 0.9, "seed": index}, {"logprobs": 2})
        params = SamplingParams(max_tokens=17 + index % 5, ignore_eos=True, **kinds[index % 3])
        prompt = [7, 8, 9, 10, 11, *range(index, 2 * index)]
        yield EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params)


def serve(engine: EngineCore, count: int = 30) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run requests to their ends, with parts of a compilation between all steps. Returns the tokens
    and the log-probabilities of each request, and its steps by mode, reason and code."""
    found: dict[str, Any] = {}
    ran: dict[str, Any] = {}
    for request in requests(count):
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append((output.token_ids, output.logprobs))
            if output.graph_steps is not None:
                ran[output.request_id] = output.graph_steps
        for _ in range(40):
            engine.background.advance(busy=True)
    while engine.background.has_work:
        engine.background.advance(busy=False)
    engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
    return found, ran


@functools.cache
def tokens_without_compiled_code(checkpoint: str) -> dict[str, Any]:
    """Return the tokens and the log-probabilities that a few requests get by the model's own
    code."""
    return serve(start(checkpoint, None), FEW)[0]


def test_batches_are_dispatched_by_the_durations_of_the_generation_that_serves(
    checkpoint, monkeypatch
):
    """Durations that were measured at the start once chose among the graphs of compiled code."""

    def time(trial: StepTrial, graph: Any) -> float:
        if trial.runner.model.compiled is None:
            return 100.0
        return 1.0 if trial.key[0] is CUDAGraphMode.PIECEWISE else 10.0

    monkeypatch.setattr(CPUPlatform, "times_graphs", True)
    monkeypatch.setattr(StepTrial, "time", time)
    engine = start(checkpoint, FakeCompiler())
    batch = {"num_tokens": 2, "num_reqs": 2, "query_len": 1}
    assert engine.dispatcher.dispatch(**batch).reason is Reason.PURE_DECODE
    serve(engine)
    assert engine.compilation.generation == 1
    assert engine.dispatcher.dispatch(**batch).reason is Reason.CHEAPER


@pytest.mark.parametrize("mode", ["full-and-piecewise", "none"])
def test_predictions_and_the_default_target_follow_the_generation_that_serves(
    checkpoint, monkeypatch, mode
):
    """Compiled code is five times as fast here. Steps are predicted to be so, whether a graph holds
    them or not, when not one of them has been served, and the target falls with them. A target that
    was asked for stays."""

    def time(trial: StepTrial, graph: Any) -> float:
        return (50.0 if trial.runner.model.compiled is None else 10.0) + trial.output.num_tokens

    def target(engine: EngineCore) -> float:
        return engine.stats().itl_target_ms

    monkeypatch.setattr(StepTrial, "time", time)
    monkeypatch.setattr(device_kind, "KINDS", {"cpu": replace(device_kind.CPU, itl_target_ms=None)})
    monkeypatch.setattr(CPUPlatform, "kind", device_kind.KINDS["cpu"])
    settings = {"cudagraph_mode": CUDAGraphMode(mode), "max_num_batched_tokens": 64}
    for asked in (None, 70.0):
        engine = start(checkpoint, FakeCompiler(), itl_target_ms=asked, **settings)
        keys = [engine.dispatcher.dispatch(size, 1, query_len=None).key for size in (1, 16, 64)]
        before = [engine.cost_model.predict(key, NO_WORK) for key in keys]
        rows = engine.config.max_num_seqs
        decode = engine.dispatcher.dispatch(rows, rows, query_len=1).key
        steps_ms = ITL_TARGET_STEPS * engine.cost_model.predict(decode, NO_WORK)
        first = engine.config.itl_target_ms
        assert first == engine.info.itl_target_ms == (asked or pytest.approx(steps_ms))
        while engine.compilation.is_under_way:
            engine.background.advance(busy=False)
        assert engine.compilation.generation == 1
        after = [engine.cost_model.predict(key, NO_WORK) for key in keys]
        assert [old - new for old, new in zip(before, after, strict=True)] == [
            pytest.approx(40.0, abs=1.0)
        ] * 3
        steps_ms = ITL_TARGET_STEPS * engine.cost_model.predict(decode, NO_WORK)
        assert target(engine) == engine.describe().itl_target_ms == (asked or steps_ms)
        assert (target(engine) < first / 3) == (asked is None)


@pytest.mark.parametrize("mode", ["full-and-piecewise", "piecewise", "none"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_swap_under_running_requests_changes_no_token(checkpoint, ahead, mode):
    """Between two steps of running requests compiled code takes over: every request gets the tokens
    and log-probabilities that it would have got, and is told which of its steps ran by which
    code."""
    settings = {"async_scheduling": ahead, "cudagraph_mode": CUDAGraphMode(mode)}
    expected, _ = serve(start(checkpoint, None, **settings))
    compiler = FakeCompiler()
    engine = start(checkpoint, compiler, **settings)
    assert engine.info.compilation == CompilationReport(CompilationState.COMPILING)
    before = engine.runner.graphs
    observer, told = StepObserver(), []
    observer.swapped = lambda: told.append(engine.runner.model.compiled)  # type: ignore[method-assign]
    engine.observers.append(observer)
    found, ran = serve(engine)
    assert found == expected
    assert told == [engine.runner.model.compiled], "once, when the steps run by the new code"
    report = engine.stats().compilation
    assert (report.state, report.generation, report.swaps) == (CompilationState.COMPILED, 1, 1)
    assert report.seconds.keys() == {"compile", "kernels", "load", "certify"}
    assert (compiler.started, compiler.process.closed) == (1, True)
    graphs = engine.runner.graphs
    assert graphs.keys() == before.keys() == set(engine.runner.ladders.keys())
    assert not set(map(id, graphs.values())) & set(map(id, before.values()))
    codes = [{key.endswith("/compiled") for key in steps} for steps in ran.values()]
    assert False in codes[0]
    assert codes[-1] == {True}
    assert {False, True} in codes
    steps = engine.stats().compiled_steps
    assert 0 < steps < sum(count.steps for count in engine.stats().steps)


@pytest.mark.parametrize("cached", [False, True])
def test_compiled_code_takes_over_the_graphs_that_serve(checkpoint, cached):
    """A generation that takes over while the ladders fill has the graphs that the one before it
    had, or those of a start-up, and its ladders fill further."""
    expected, _ = serve(start(checkpoint, None, max_num_seqs=8, max_num_batched_tokens=32))
    compiler = FakeCompiler(cached=cached)
    engine = start(
        checkpoint,
        compiler,
        cudagraph_capture="covering",
        max_num_seqs=8,
        max_num_batched_tokens=32,
    )
    runner = engine.runner
    whole, covering = (set(some.keys()) for some in (runner.ladders, runner.ladders.covering()))
    if not cached:
        compiler.process.says = [Progress()]
        while len(runner.graphs) < len(covering) + 3:
            engine.background.advance(busy=False)
        compiler.process.says = [MADE]
        while engine.compilation.is_under_way:
            engine.background.advance(busy=False)
        assert len(covering) < len(runner.graphs) < len(whole)
    else:
        assert set(runner.graphs) == covering
    assert engine.compilation.generation == 1
    assert runner.model.compiled is not None
    found, _ = serve(engine)
    assert found == expected
    assert set(runner.graphs) == whole == engine.dispatcher.in_service
    assert engine.filling.report.missing == 0


def test_a_run_of_the_models_own_code_is_interrupted_by_steps_of_other_sizes(checkpoint):
    """Transformers' code, as it is served, keeps the arguments of its attention for all layers. A
    step of requests between two layers once left its own there, and compiled code was refused."""
    settings = {"model_impl": "transformers", "cudagraph_mode": CUDAGraphMode.NONE}
    expected, _ = serve(start(checkpoint, None, **settings), 3)
    compiler = FakeCompiler(program=lambda model: model.forward)
    engine = start(checkpoint, compiler, serve_slower=True, **settings)
    found, _ = serve(engine, 3)
    assert found == expected
    assert engine.compilation.generation == 1, engine.compilation.report.reason


def test_nothing_is_left_of_the_old_generation(checkpoint):
    """When a generation has taken over, the graphs and the memory of the other one are free at
    once. They were kept by a circle of references, which an engine that has frozen its objects
    never collects."""
    engine = start(checkpoint, FakeCompiler())
    runner = engine.runner
    backend = runner.model_step.backend
    assert isinstance(backend, CPUTapeBackend)
    old = [
        weakref.ref(backend),
        weakref.ref(backend.arena),
        *(weakref.ref(graph) for graph in runner.graphs.values()),
        *(weakref.ref(call) for graph in runner.graphs.values() for call in graph.calls[::2]),
    ]
    del backend
    gc.collect()
    gc.disable()
    try:
        serve(engine)
        assert engine.compilation.generation == 1
        assert not [ref for ref in old if ref() is not None]
    finally:
        gc.enable()


# ---- refusals ------------------------------------------------------------------------------------


def adds(amount: float) -> Callable[[Decoder], Forward]:
    def program(model: Decoder) -> Forward:
        def run(ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
            FORWARD(model, ids, positions, out)
            out[:, 0] += amount

        return run

    return program


def freezes(model: Decoder) -> Forward:
    """A program with a value that a graph keeps from its capture."""

    def run(ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        FORWARD(model, ids, positions, out)
        out.add_(1e-7 * float(positions.numpy().sum()))

    return run


def reads_back(model: Decoder) -> Forward:
    def run(ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        FORWARD(model, ids, positions, out)
        out.mul_(1.0 if ids[0].item() >= 0 else 2.0)

    return run


def slow(model: Decoder) -> Forward:
    def run(*args: torch.Tensor) -> None:
        for _ in range(2 * TIMES):
            FORWARD(model, *args)

    return run


def binds_another_layer(model: Decoder) -> Forward:
    """A program with the weights of the right shapes in the wrong places."""

    def run(*args: torch.Tensor) -> None:
        first, second = model.layers[0], model.layers[1]
        first.mlp, second.mlp = second.mlp, first.mlp
        FORWARD(model, *args)
        first.mlp, second.mlp = second.mlp, first.mlp

    return run


def fails(model: Decoder) -> Forward:
    def run(*args: torch.Tensor) -> None:
        raise RuntimeError("this code does not run")

    return run


def cannot_be_loaded(model: Decoder) -> Forward:
    raise CompilationError("this program is broken.")


REFUSED = {
    "certification: .*log-probabilities .* differ": FakeCompiler(program=adds(1e-3)),
    "certification: .*of the compiled code differ": FakeCompiler(program=binds_another_layer),
    "certification: .*log-probabilities .* differ .*nan": FakeCompiler(program=adds(float("nan"))),
    "certification: .*of the replay differs": FakeCompiler(program=freezes),
    "capture: .*reads a value back to the host": FakeCompiler(program=reads_back),
    "capture: RuntimeError: this code does not run": FakeCompiler(program=fails),
    "slower: .* times as fast": FakeCompiler(program=slow),
    "load: this program is broken": FakeCompiler(program=cannot_be_loaded),
    "compile: the process was killed": FakeCompiler(
        process=Process([Progress(), CompilationError("the process was killed.")])
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_wrong_or_slow_does_not_serve(checkpoint, caplog, reason):
    """The server goes on as it is, with a line in the log and a count in the metrics."""
    expected = tokens_without_compiled_code(checkpoint)
    compiler = REFUSED[reason]
    engine = start(checkpoint, compiler)
    before = Generation.in_service(engine.runner)
    with caplog.at_level(logging.WARNING):
        found, ran = serve(engine, FEW)
    assert found == expected
    assert not [key for steps in ran.values() for key in steps if key.endswith("/compiled")]
    report = engine.stats().compilation
    kind = reason.split(":")[0]
    assert (report.state, report.generation, report.swaps) == (CompilationState.REFUSED, 0, 0)
    assert report.refusals == {kind: 1}
    assert re.search(reason, report.reason)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert f"({kind})" in caplog.text
    assert compiler.discarded is (kind in ("certification", "capture", "slower"))
    assert bool(compiler.slow) is (kind == "slower")
    assert engine.stats().compiled_steps == 0
    now = Generation.in_service(engine.runner)
    assert (now.program, now.backend) == (None, before.backend)
    assert all(a is b for a, b in zip(now.graphs, before.graphs, strict=True))
    assert compiler.process.closed


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"), [("float32", 1e-6, 1e-3), ("bfloat16", 0.02, 0.3)]
)
def test_code_may_round_as_its_dtype_does(checkpoint, dtype, allowed, refused):
    """Compiled code rounds at other places than the model's own. As much noise as the dtype has is
    allowed, and far more is not."""

    def program(model: Decoder, amount: float) -> Forward:
        def run(ids: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
            FORWARD(model, ids, positions, out)
            out.mul_(1 + amount * (-1.0) ** torch.arange(out.shape[1]))

        return run

    states = []
    for amount in (allowed, refused):
        compiler = FakeCompiler(cached=True, program=functools.partial(program, amount=amount))
        states.append(start(checkpoint, compiler, dtype=dtype).info.compilation.state)
    assert states == [CompilationState.COMPILED, CompilationState.REFUSED]


def test_kernels_of_a_program_are_compiled_before_it_is_loaded(checkpoint):
    """The first launch of a kernel that is not compiled makes all requests wait for seconds."""
    engine = start(checkpoint, None)
    runner, pool = engine.runner, engine.scheduler.block_pool
    compiler, events = FakeCompiler(model=runner.model, process=Process([MADE])), []

    def compile_kernels(program: Path) -> Generator[None, None, str]:
        assert program == MADE
        events.append("begun")
        yield
        events.append("done")
        return "no process could be started"  # the kernels are compiled by their launches then

    background = Background()
    way = Compilation(
        background, compiler, runner, pool, CPUTapeBackend, compile_kernels=compile_kernels
    )
    way.capture_graphs(runner.ladders.keys(), nothing)
    while events != ["begun", "done"]:
        assert way.report.state is CompilationState.COMPILING
        background.advance(busy=False)
    while way.is_under_way:
        background.advance(busy=False)
    assert way.report.state is CompilationState.COMPILED
    assert {"compile", "kernels", "load", "certify"} == way.report.seconds.keys()


def test_an_error_while_kernels_are_compiled_is_a_refusal(checkpoint):
    """It ended the engine."""
    engine = start(checkpoint, None)
    runner, pool = engine.runner, engine.scheduler.block_pool

    def compile_kernels(program: Path) -> Generator[None, None, str]:
        yield
        raise OSError("the disk is full")

    background = Background()
    compiler = FakeCompiler(model=runner.model, process=Process([MADE]))
    way = Compilation(
        background, compiler, runner, pool, CPUTapeBackend, compile_kernels=compile_kernels
    )
    way.capture_graphs(runner.ladders.keys(), nothing)
    while way.is_under_way:
        background.advance(busy=False)
    assert way.report.refusals == {"compile": 1}
    assert "the disk is full" in way.report.reason


def test_an_engine_that_ends_ends_the_process_that_compiles(checkpoint):
    compiler = FakeCompiler(process=Process([Progress()]))
    engine = start(checkpoint, compiler)
    engine.background.advance(busy=False)
    assert not engine.background.has_work
    engine.background.close()
    assert compiler.process.closed
    assert not engine.background.advance(busy=False)


# ---- before the engine is ready ------------------------------------------------------------------


def test_a_program_in_the_cache_serves_from_the_start(checkpoint):
    """A restart compiles nothing: every graph is that of the program, and every step runs by it."""
    expected = tokens_without_compiled_code(checkpoint)
    compiler = FakeCompiler(cached=True)
    engine = start(checkpoint, compiler)
    assert engine.info.compilation.generation == 1
    assert engine.info.ladder.graphs == len(engine.runner.ladders.keys())
    found, ran = serve(engine, FEW)
    assert found == expected
    assert all(key.endswith("/compiled") for steps in ran.values() for key in steps)
    assert compiler.started == 0


@pytest.mark.usefixtures("raising_sigint")
def test_an_interrupted_start_ends_and_keeps_the_program(checkpoint):
    """Ctrl-C in compiled code was taken for a fault of that code: a good program was thrown away,
    and the start went on."""
    pressed = []

    def interrupted(model: Decoder) -> Forward:
        def run(*args: torch.Tensor) -> None:
            try:
                if not pressed:
                    pressed.append(True)
                    os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt as error:  # as torch does
                raise RuntimeError(f"{type(error).__name__}: ") from error
            FORWARD(model, *args)

        return run

    compiler = FakeCompiler(cached=True, program=interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(checkpoint, compiler)
    assert pressed
    assert not compiler.discarded
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert start(checkpoint, compiler).info.compilation.generation == 1


def test_a_program_in_the_cache_that_is_wrong_leaves_a_whole_server(checkpoint):
    expected = tokens_without_compiled_code(checkpoint)
    compiler = FakeCompiler(cached=True, program=adds(1e-3))
    engine = start(checkpoint, compiler)
    assert compiler.discarded
    assert engine.info.compilation.refusals == {"certification": 1}
    assert engine.info.ladder.graphs == len(engine.runner.ladders.keys())
    assert serve(engine, FEW)[0] == expected


def test_compile_wait_is_ready_with_compiled_code(checkpoint):
    engine = start(checkpoint, FakeCompiler(), compile_wait=True)
    assert engine.info.compilation.generation == 1
    _, ran = serve(engine, 3)
    assert all(key.endswith("/compiled") for steps in ran.values() for key in steps)


def test_a_start_that_waits_times_each_graph_once(checkpoint, monkeypatch):
    """It timed those of compiled code when these were certified, and again when it was ready."""
    timed: list[bool] = []

    def time_generation(runner: Any, pool: Any, new: Any, keys: Any, turn: Any) -> dict[Any, Any]:
        timed.append(bool(keys))
        return {}

    monkeypatch.setattr(CPUPlatform, "times_graphs", True)
    monkeypatch.setattr(compilation, "time_generation", time_generation)
    engine = start(checkpoint, FakeCompiler(), compile_wait=True)
    assert engine.info.compilation.generation == 1
    assert timed == [False]
    engine = start(checkpoint, FakeCompiler())
    serve(engine, 3)
    assert engine.compilation.generation == 1
    assert timed == [False, True]


def test_what_was_measured_to_be_slow_is_not_compiled_again(checkpoint, caplog):
    """Each restart once compiled and measured it anew, beside the requests that it served. Where
    other steps are measured, the outcome may be another one."""
    compiler = FakeCompiler(program=slow)
    serve(start(checkpoint, compiler))
    assert (compiler.started, len(compiler.slow)) == (1, 1)
    with caplog.at_level(logging.WARNING):
        engine = start(checkpoint, compiler)
    assert "An earlier start has measured that" in caplog.text
    assert "with --compile-wait it is measured again" in engine.info.compilation.reason
    assert engine.info.compilation.refusals == {"slower": 1}
    assert not engine.compilation.is_under_way
    assert engine.info.ladder.graphs == len(engine.runner.ladders.keys())
    assert compiler.started == 1
    assert start(checkpoint, compiler, max_num_seqs=2).compilation.is_under_way


def test_a_start_that_serves_slower_code_remembers_that_others_should_not(checkpoint):
    """`minisrv bench` measures slower code too. What it had left in the cache then served at the
    next start of a server, which does not time what it finds."""
    compiler = FakeCompiler(program=slow)
    engine = start(checkpoint, compiler, serve_slower=True, compile_wait=True)
    assert engine.info.compilation.state is CompilationState.COMPILED
    assert compiler.discarded
    assert start(checkpoint, compiler).info.compilation.refusals == {"slower": 1}


# ---- what workers are told -----------------------------------------------------------------------


def test_every_worker_is_told_of_the_swap(checkpoint, tmp_path):
    """The engine's process swaps while it serves: its workers get the whole answer to their request
    and the new description of the engine, and so does one that comes later."""
    server = _EngineServer(f"ipc://{tmp_path}/engine", Heartbeat(tmp_path / "heartbeat"))
    server.core = start(checkpoint, FakeCompiler())
    server.state = Ready(server.core.info)
    workers = []

    def connect(name: str) -> zmq.Socket:
        worker = server.context.socket(zmq.DEALER)
        workers.append(worker)
        worker.set(zmq.ROUTING_ID, name.encode())
        worker.connect(f"ipc://{tmp_path}/engine")
        worker.send(encode(Hello()))
        return worker

    def hear(worker: zmq.Socket) -> EngineMessage:
        while not worker.poll(0):
            server._turn()
        return decode_engine_message(worker.recv())

    try:
        first, second = connect("api-0"), connect("api-1")
        states = []
        for worker in (first, second):
            answer = hear(worker)
            assert isinstance(answer, Ready)
            states.append(answer.info.compilation.state)
        first.send(encode(Submit(list(requests(1)))))
        tokens = 0
        while CompilationState.COMPILED not in states or tokens < 17:
            match hear(first):
                case Ready(info):
                    states.append(info.compilation.state)
                case StepOutputs(outputs):
                    tokens += sum(len(output.token_ids) for output in outputs)
        kinds = [CompilationState.COMPILING, CompilationState.CERTIFYING, CompilationState.COMPILED]
        assert sorted(set(states), key=kinds.index) == kinds
        assert tokens == 17
        for worker in (second, connect("api-2")):
            generation = 0
            while not generation:
                told = hear(worker)
                assert isinstance(told, Ready)
                generation = told.info.compilation.generation
    finally:
        for worker in workers:
            worker.close(linger=0)
        server.close()


# ---- room and time -------------------------------------------------------------------------------


def test_trials_take_nothing_from_the_prefix_cache():
    """Blocks that the prefix cache can find are not lent, and lent blocks come back before them, so
    that none of them is evicted any sooner."""
    pool = BlockPool(8, 4)
    held = [pool.allocate() for _ in range(4)]
    for block in held[:3]:
        pool.cache_full_block(block, hash_block((None, None), None, [block]))
    for block in held:
        pool.free(block)
    assert pool.reserve(99) == [4, 5, 6, 7]
    assert pool.num_free == 3
    pool.give_back([4, 5, 6, 7])
    assert [pool.allocate() for _ in range(4)] == [4, 5, 6, 7]
    assert pool.get_cached_blocks([hash_block((None, None), None, [1])]) == [1]
    assert pool.reserve(99) == []


def test_trials_take_what_was_used_least_recently_where_all_is_in_the_prefix_cache(checkpoint):
    """A server whose free blocks all belonged to the prefix cache never got its graphs."""
    engine = start(checkpoint, None)
    pool, runner = engine.scheduler.block_pool, engine.runner
    held = [pool.allocate() for _ in range(pool.num_free)]
    for block in held:
        pool.cache_full_block(block, hash_block((None, None), None, [block]))
        pool.free(block)
    key = runner.ladders.keys()[-1]
    space = borrow_space(runner, pool, key)
    assert list(space.blocks) == held[: len(space.blocks)]
    found = [len(pool.get_cached_blocks([hash_block((None, None), None, [b])])) for b in held]
    assert found == [0] * len(space.blocks) + [1] * (len(held) - len(space.blocks))
    pool.give_back(space.blocks)
    assert borrow_space(runner, pool, key).blocks == space.blocks, "no more is taken"


class AlwaysOver:
    """Turns that are over at once, so that the work makes way wherever it can.

    between: is called instead of the steps of requests.
    """

    is_over = True
    spare_blocks = 0

    def __init__(self, between: Callable[[], None]) -> None:
        self.make_way = between
        self.waits = 0

    def begin_part(self, part: str) -> None:
        pass

    def wait(self) -> None:
        self.waits += 1
        self.make_way()


def test_a_certification_waits_for_blocks(checkpoint):
    """While all free blocks belong to the prefix cache, nothing goes on, and an idle engine does
    not spin; when there are others, it does."""
    engine = start(checkpoint, None)
    pool, runner = engine.scheduler.block_pool, engine.runner
    held = [pool.allocate() for _ in range(pool.num_free)]
    new = Generation.empty(runner, CPUTapeBackend(), CompiledForward(right(runner.model)))
    free: list[int] = []

    def between() -> None:
        free.append(pool.num_free)
        assert not any(new.graphs)
        if turn.waits == 2:
            pool.free(held.pop())
            turn.make_way = lambda: free.append(pool.num_free)

    turn = AlwaysOver(between)
    build_generation(runner, pool, new, runner.ladders.keys(), [], turn)
    assert turn.waits == 2
    assert free[:3] == [0, 0, 0]
    assert free[3] == 0, "the block is lent"
    assert free.count(1) == len(runner.ladders.keys()) - 1, "between two trials it is not"
    assert pool.num_free == 1


def test_a_request_that_needs_all_blocks_waits_for_one_trial_at_most(checkpoint):
    """It waited for the end of the whole certification, while each trial borrowed the blocks that
    the trial before it had given back."""
    engine = start(checkpoint, FakeCompiler())
    pool = engine.scheduler.block_pool
    while not pool.num_used:
        engine.background.advance(busy=False)
    everything = [7] * (pool.capacity - 8)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add(EngineRequest(request_id="all", prompt_token_ids=everything, params=params))
    tokens = 0
    while engine.has_work:
        tokens += sum(len(output.token_ids) for output in engine.step())
        engine.background.advance(busy=True)
    assert tokens == 8
    assert engine.compilation.is_under_way
    while engine.background.has_work:
        engine.background.advance(busy=False)
    assert engine.compilation.generation == 1


def test_without_memory_for_it_no_other_program_is_compiled(checkpoint):
    """A start that has found a whole program plans no memory for two generations. If the program
    then could not be loaded, another one was compiled and certified all the same."""
    engine = start(checkpoint, None)
    runner, pool = engine.runner, engine.scheduler.block_pool
    compiler = FakeCompiler(model=runner.model)
    way = Compilation(Background(), compiler, runner, pool, CPUTapeBackend, has_room=False)
    way.capture_graphs(runner.ladders.keys(), lambda done, total: None)
    assert way.report.refusals == {"load": 1}
    assert not way.is_under_way
    assert compiler.started == 0
    assert len(runner.graphs) == len(runner.ladders.keys())


def test_where_the_work_makes_way_the_engine_is_as_it_was(checkpoint):
    """Wherever steps of requests may run, in the middle of the model too, the old generation is in
    service, nobody who observes steps has been told of a trial or is forgotten, and no poison of a
    trial is left. Steps that leave anything in the buffers there do not change the trial."""
    engine = start(checkpoint, None)
    runner, told = engine.runner, []
    observer = StepObserver()
    observer.stage = lambda key, output: told.append(key)  # type: ignore[method-assign]
    runner.observers.append(observer)
    observers = list(runner.observers)
    for cache in runner.kv_caches:
        cache.zero_()  # what no step has written may be anything
    before = Generation.in_service(runner)
    new = Generation.empty(runner, CPUTapeBackend(), CompiledForward(right(runner.model)))
    buffers = [runner.model.qkv, runner.model.attn_out, runner.buffers.hidden]
    turns = 0

    def between() -> None:
        nonlocal turns
        turns += 1
        now = Generation.in_service(runner)
        assert (now.program, now.backend) == (None, before.backend)
        assert all(a is b for a, b in zip(now.graphs, before.graphs, strict=True))
        assert runner.observers == observers
        assert gc.isenabled()
        assert not any(tensor.isnan().any() for tensor in buffers)
        for tensor in (*buffers, runner.buffers.positions, runner.buffers.block_table):
            tensor.fill_(7)

    turn, pool, keys = AlwaysOver(between), engine.scheduler.block_pool, runner.ladders.keys()
    build_generation(runner, pool, new, keys, model_keys(runner.ladders, keys), turn)
    pieces = [key for key in keys if key[0] is CUDAGraphMode.PIECEWISE]
    layers = len(runner.kv_caches)
    # Each graph of a whole model is captured, and replayed on a clean and on a poisoned batch, one
    # call of a tape after the other.
    calls = 3 * sum(
        len(tape.calls)
        for graphs in new.graphs[1:]
        for graph in graphs.values()
        for tape in graph.calls
    )
    assert turns > 4 * len(keys) + 4 * layers * len(pieces) + calls
    assert not told
    assert not any(cache.isnan().any() for cache in runner.kv_caches)
    assert sum(map(len, new.graphs)) == len(keys)
    turns = 0
    assert measure_speedup(runner, pool, new, turn) > 1
    assert turns > layers
    assert not told


def test_what_a_run_changes_before_it_makes_way_is_found(checkpoint):
    engine = start(checkpoint, None)
    runner = engine.runner

    def program(*args: torch.Tensor) -> None:
        runner.request_tensors.seed[1] += 1
        FORWARD(runner.model, *args)

    new = Generation.empty(runner, CPUTapeBackend(), CompiledForward(program))
    turn = AlwaysOver(lambda: None)
    with pytest.raises(CertificationError, match="changed seed of a request index"):
        build_generation(runner, engine.scheduler.block_pool, new, runner.ladders.keys(), [], turn)


def test_the_work_rests_while_requests_run(checkpoint, monkeypatch):
    """Behind a part that took long, the steps of requests run for longer before the next one; an
    idle engine does not wait."""
    monkeypatch.setattr(background, "LEAST_GAP", LEAST_GAP)
    monkeypatch.setattr(background, "REST", REST)
    engine = start(checkpoint, None)
    now = [0.0]
    compiler = FakeCompiler(model=engine.runner.model)
    took = []

    def poll() -> Progress:
        now[0] += 0.1
        took.append(now[0])
        return Progress()

    monkeypatch.setattr(compiler.process, "poll", poll)
    pool, runner = engine.scheduler.block_pool, engine.runner
    turns = Background(clock=lambda: now[0])
    Compilation(turns, compiler, runner, pool, CPUTapeBackend).capture_graphs([], nothing)
    for _ in range(100):
        turns.advance(busy=True)
        now[0] += 0.01
    assert took == pytest.approx([0.1, 0.6, 1.1], abs=0.02)
    for _ in range(3):
        turns.advance(busy=False)
    assert len(took) == 6


def test_an_interrupted_certification_is_a_refusal(checkpoint, monkeypatch):
    """After Ctrl-C in a turn the code was certified for ever, by its report."""
    engine = start(checkpoint, FakeCompiler())
    while not engine.background.is_in_the_middle:
        engine.background.advance(busy=False)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def finish() -> None:
        while engine.background.has_work:
            engine.background.advance(busy=False)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish()
    report = engine.describe().compilation
    assert report.state is CompilationState.REFUSED
    assert (report.reason, report.generation) == ("it was interrupted.", 0)
    assert not engine.compilation.is_under_way
    engine.add(next(requests(1)))
    while engine.has_work:
        engine.step()


def test_a_turn_ends_when_its_time_is_over(checkpoint, monkeypatch):
    """The work goes on until the time of a turn is over, whether or not requests run, and then
    makes way at the next point where it can."""
    monkeypatch.setattr(background, "TURN", TURN)
    engine = start(checkpoint, None)
    now, done = [0.0], []
    runner, pool = engine.runner, engine.scheduler.block_pool
    compiler = FakeCompiler(process=Process([MADE]))

    def load(directory: Path, between: Callable[[], None]) -> Compiled:
        for number in range(9):
            done.append(number)
            now[0] += 0.4 * TURN
            between()
        raise CompilationError("that is enough.")

    compiler.load = load  # type: ignore[method-assign]
    turns = Background(clock=lambda: now[0])
    work = Compilation(turns, compiler, runner, pool, CPUTapeBackend)
    work.capture_graphs([], nothing)
    for turn, busy in enumerate((True, False, True), 1):
        assert work.is_under_way
        turns.advance(busy=busy)
        assert len(done) == 3 * turn
    turns.advance(busy=True)
    assert not work.is_under_way


def test_the_longest_turns_are_told_with_what_took_longest_of_them():
    now = [0.0]
    turns = Background(clock=lambda: now[0])

    def work() -> Generator[bool, None, None]:
        for part, seconds in (("a", 0.1), ("b", 0.3), ("a", 0.2), ("c", 0.05), ("d", 0.01)):
            now[0] += 0.001  # the part that the last turn was left in
            turns.turn.begin_part(part)
            now[0] += seconds
            yield False

    turns.add(work())
    assert turns.describe_longest() == ""
    for _ in range(5):
        turns.advance(busy=True)
    assert turns.describe_longest() == "301 ms (b), 201 ms (a), 51 ms (c)"
    assert turns.longest_turn == pytest.approx(0.301)


def test_what_the_longest_turns_of_a_swap_did_is_told(checkpoint, caplog):
    """It was once found by reading what had made requests wait for a quarter of a second. Behind
    the swap, kernels for other ladders are those of the program."""
    engine = start(checkpoint, FakeCompiler())
    assert engine.compilation.program is None
    with caplog.at_level(logging.INFO, logger="minisrv"):
        serve(engine)
    assert engine.compilation.program == MADE
    [line] = [record.message for record in caplog.records if "requests wait" in record.message]
    assert re.search(r"wait \d+ ms \((FULL|PIECEWISE|NONE|the) ", line), line


def test_an_engine_that_ends_leaves_the_work_where_it_is(checkpoint):
    """The thread in which a certification runs ends, and the blocks that it has borrowed are
    free."""
    engine = start(checkpoint, FakeCompiler())
    free, threads = engine.scheduler.block_pool.num_free, set(enumerate_threads())
    while engine.scheduler.block_pool.num_free == free:
        engine.background.advance(busy=True)
    [thread] = set(enumerate_threads()) - threads
    engine.background.close()
    assert engine.scheduler.block_pool.num_free == free
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("failing", "cached"),
    [
        ("times", False),  # a start-up times the graphs of what is in the cache behind this
        ("observer", False),
        ("observer", True),
        ("backend", False),
        ("backend", True),
    ],
)
def test_an_error_of_the_swap_itself_is_a_refusal(checkpoint, monkeypatch, failing, cached):
    """It once ended the engine, with the requests that ran. The model's own code serves on, whole,
    and batches are dispatched as before."""
    expected = tokens_without_compiled_code(checkpoint)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not now")

    compiler = FakeCompiler()
    engine = start(checkpoint, compiler, serve_slower=True)
    runner, pool, made = engine.runner, engine.scheduler.block_pool, CPUTapeBackend
    before = Generation.in_service(runner)
    if failing == "observer":
        monkeypatch.setattr(StepObserver, "swapped", fail)
        engine.observers.append(StepObserver())
    elif failing == "backend":
        made = fail
    use_times = fail if failing == "times" else lambda times: None
    engine.background.close()
    compiler.cached = cached
    engine.compilation = Compilation(
        engine.background,
        compiler,
        runner,
        pool,
        made,
        timed=lambda: timed_keys(runner.ladders),
        use_times=use_times,
        serve_slower=True,
    )
    engine.compilation.capture_graphs(runner.ladders.keys() if cached else [], nothing)
    found, ran = serve(engine, FEW)
    assert found == expected
    assert not [key for steps in ran.values() for key in steps if key.endswith("/compiled")]
    report = engine.stats().compilation
    assert (report.state, report.generation) == (CompilationState.REFUSED, 0)
    assert report.refusals == {"load" if failing == "backend" else "swap": 1}
    assert "not now" in report.reason
    now = Generation.in_service(runner)
    assert (now.program, now.backend) == (None, before.backend)
    assert all(a is b for a, b in zip(now.graphs, before.graphs, strict=True))


def test_a_start_up_that_is_interrupted_ends_the_process_that_compiles(checkpoint):
    """multiprocessing would wait for it before this process ends."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    compiler = FakeCompiler(process=Process([Progress()]))
    compilation = start(checkpoint, compiler).compilation
    compilation._turn.waits = True
    with pytest.raises(KeyboardInterrupt):
        compilation.wait(interrupt)
    assert compiler.process.closed
    assert not compilation.is_under_way

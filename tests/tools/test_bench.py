"""`minisrv bench`: what it measures, in which order, and how it reports it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from matplotlib import rc_context

from minisrv.cli import main
from minisrv.compile.decorator import Compiled, CompiledForward
from minisrv.compile.modes import CompilationMode
from minisrv.compile.worker import CompileJob
from minisrv.config import BenchConfig, EngineConfig
from minisrv.core.ladder import ladders_of
from minisrv.engine import builder
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.errors import ConfigError
from minisrv.nn.decoder import Decoder
from minisrv.tools.bench import measure
from minisrv.tools.bench.measure import STEPS_PER_BLOCK, Bench
from tests.checkpoints import make_checkpoint

LAYERS = 2
# On a GPU a step has other numbers of launches.
SMALL = (
    "--device",
    "cpu",
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "24",
    "--context",
    "40",
)
LAUNCHES = {"NONE": 11 * LAYERS + 7, "PIECEWISE": 2 * LAYERS + 2, "FULL": 1}
"""Launches of a step by mode, as in tests/runner/test_launches.py."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    return str(make_checkpoint(directory, "llama", num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def engine(checkpoint) -> EngineCore:
    return EngineCore(
        build_engine(
            EngineConfig(
                model=checkpoint,
                max_num_seqs=4,
                max_num_batched_tokens=24,
                cudagraph_capture="whole",
            )
        )
    )


class OwnForward:
    """A compiler whose cache has a program, which is the model's own forward."""

    def __init__(self, job: CompileJob, model: Decoder, *, again: bool) -> None:
        self.model = model

    def find(self) -> Path:
        return Path("program")

    def load(self, directory: Path, between: Callable[[], None]) -> Compiled:
        return CompiledForward(partial(Decoder.forward, self.model))

    def discard(self, directory: Path) -> None:
        raise AssertionError("the program passes")


class Clock:
    """A clock by which each of the engine's steps takes `cost[mode]` seconds, and each one `drift`
    seconds more than the one before; by compiled code it takes half of it."""

    def __init__(self, engine: EngineCore, drift: float, **cost: float) -> None:
        self.engine, self.drift, self.cost = engine, drift, cost
        self.now = self.steps = 0.0
        self.running = False

    def __call__(self) -> float:
        if self.running:
            mode = self.engine.dispatcher.ladders.mode.decode_mode.name
            compiled = self.engine.runner.model.compiled is not None
            self.now += self.cost[mode] / (1 + compiled) + self.drift * self.steps
            self.steps += 1
        self.running = not self.running
        return self.now


def measured(engine: EngineCore, drift: float, **cost: float):
    clock = Clock(engine, drift, **cost)
    bench = Bench(engine, BenchConfig(batch_sizes=(3,), context=40, rounds=2), clock)
    return bench.run(lambda phase, done, total: None)


def test_times_and_ratios_are_those_of_the_clock(engine):
    [size] = measured(engine, 0, NONE=0.012, PIECEWISE=0.006, FULL=0.003).decode
    assert {mode: result.ms for mode, result in size.modes.items()} == pytest.approx(
        {"NONE": 12, "PIECEWISE": 6, "FULL": 3}
    )
    assert size.modes["FULL"].tokens_per_s == pytest.approx(1000)
    assert {mode: ratio.median for mode, ratio in size.eager_over.items()} == pytest.approx(
        {"PIECEWISE": 2, "FULL": 4}
    )


def test_drift_cancels(engine):
    """Modes are measured in such an order that a machine that slows down, or contexts that grow,
    favour none of them."""
    [size] = measured(engine, 0.001, NONE=0.01, PIECEWISE=0.01, FULL=0.01).decode
    for ratio in size.eager_over.values():
        assert (ratio.least, ratio.greatest) == pytest.approx((1, 1))


def test_contexts_are_as_asked_for_in_the_middle_and_nothing_is_left(engine):
    [size] = measured(engine, 0, NONE=1, PIECEWISE=1, FULL=1).decode
    steps = 3 * (1 + 2 * 2 * STEPS_PER_BLOCK)
    first, last = size.context
    assert last - first == pytest.approx(steps)
    assert first == pytest.approx(40 - steps / 2, abs=3)
    assert not engine.has_work
    assert engine.scheduler.block_pool.num_used == 0
    assert engine.dispatcher.ladders == ladders_of(engine.config)


def test_compiled_and_own_code_are_measured_by_name(checkpoint, monkeypatch):
    monkeypatch.setattr(builder, "PieceCompiler", OwnForward)
    engine = EngineCore(
        build_engine(
            EngineConfig(
                model=checkpoint,
                max_num_seqs=4,
                max_num_batched_tokens=24,
                device="cpu",
                dtype="float32",
                compilation_mode=CompilationMode.MINISRV_COMPILE,
                cudagraph_capture="whole",
            )
        )
    )
    served = engine.runner.model.compiled
    assert served is not None
    [size] = measured(engine, 0, NONE=0.012, PIECEWISE=0.006, FULL=0.003).decode
    assert {name: result.ms for name, result in size.modes.items()} == pytest.approx(
        {
            "NONE": 12,
            "PIECEWISE": 6,
            "FULL": 3,
            "compiled NONE": 6,
            "compiled PIECEWISE": 3,
            "compiled FULL": 1.5,
        }
    )
    assert size.eager_over["compiled FULL"].median == pytest.approx(8)
    assert engine.runner.model.compiled is served


def test_nothing_is_compiled_unless_asked_for(checkpoint, monkeypatch):
    """What is called eager must not be code that an earlier start has compiled."""
    modes = []

    def build(config: EngineConfig, *_: object, **settings: object) -> None:
        modes.append(config.compilation_mode)
        raise ConfigError("that is enough.")

    monkeypatch.setattr(measure, "build_engine", build)
    for flags in ([], ["--compilation-mode", "3"], ["-O2"]):
        assert run(checkpoint, "--model-impl", "transformers", *flags) == 1
    assert modes == [CompilationMode.NONE, *2 * [CompilationMode.MINISRV_COMPILE]]


def run(checkpoint: str, *flags: str) -> int:
    return main(["bench", checkpoint, *SMALL, "--rounds", "1", *flags])


def test_the_command(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/minisrv", "bench", "--batch-sizes", "1 3"])
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    flags = ("--batch-sizes", "1", "3,4", "--json", str(out), "--plot", str(plot))
    assert run(checkpoint, *flags) == 0
    report = json.loads(out.read_text())
    assert [size["size"] for size in report["decode"]] == [1, 3, 4]
    for size in report["decode"]:
        modes = size["modes"]
        assert {mode: found["launches"] for mode, found in modes.items()} == LAUNCHES
        assert all(len(found["blocks_ms"]) == 2 for found in modes.values())
        assert list(size["eager_over"]) == ["PIECEWISE", "FULL"]
    runs_as = {mode: found["runs_as"] for mode, found in report["decode"][1]["modes"].items()}
    assert runs_as == {"NONE": 3, "PIECEWISE": 4, "FULL": 4}
    [prefill] = report["prefill"]  # Both chunks are cut to the 24 tokens of a step.
    assert prefill["size"] == 24
    assert list(prefill["modes"]) == ["NONE", "PIECEWISE"]
    assert report["simulated_launch_us"] == 0
    assert report["environment"]["command"] == "minisrv bench --batch-sizes '1 3'"
    assert report["environment"]["versions"].keys() >= {"minisrv", "torch"}
    assert report["config"]["max_num_seqs"] == 4
    shown = capsys.readouterr().out
    assert f"eager {LAUNCHES['NONE']}, PIECEWISE {LAUNCHES['PIECEWISE']}, FULL 1" in shown
    assert "eager/FULL" in shown
    assert "PIECEWISE runs 3 as 4" in shown
    assert "SIMULATED" not in shown
    assert "<svg" in plot.read_text()


def test_simulated_figures_say_so_wherever_they_are_kept(checkpoint, tmp_path, capsys):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    flags = ("--simulate-launch-us", "0.5", "--batch-sizes", "1")
    with rc_context({"svg.fonttype": "none"}):  # Text is kept as text in the SVG.
        assert run(checkpoint, *flags, "--json", str(out), "--plot", str(plot)) == 0
    label = "SIMULATED: every launch takes 0.5 us longer"
    assert label in capsys.readouterr().out
    assert label in plot.read_text()
    assert json.loads(out.read_text())["simulated_launch_us"] == 0.5


@pytest.mark.parametrize(
    ("mode", "decode", "prefill"),
    [
        ("piecewise", ["NONE", "PIECEWISE"], ["NONE", "PIECEWISE"]),
        ("full-decode-only", ["NONE", "FULL"], ["NONE"]),
        ("full", ["NONE", "FULL"], ["NONE", "FULL"]),
    ],
)
def test_modes_without_graphs_are_left_out(
    checkpoint, tmp_path, mode, decode, prefill, tape_holds_mixed_batches
):
    out = tmp_path / "bench.json"
    assert run(checkpoint, "--cudagraph-mode", mode, "--json", str(out)) == 0
    report = json.loads(out.read_text())
    assert [list(size["modes"]) for size in report["decode"]] == [decode] * 3
    assert [list(size["modes"]) for size in report["prefill"]] == [prefill]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--enforce-eager"], "leave out --enforce-eager"),
        (["--batch-sizes", "5"], "more than max_num_seqs=4"),
        (["--batch-sizes", "0"], "batch_sizes=0 is not allowed"),
        (["--context", "600"], "the context is 512"),
        (["--max-model-len", "1024"], "use at most 512"),
        (["--max-model-len", "128", "--context", "128"], "the context is 128"),
        (["--rounds", "100"], "lower one of them"),
        (["--num-kv-blocks", "10"], "raise --kv-cache-memory"),
        (["--kv-cache-memory", "100k", "--max-model-len", "256"], "--kv-cache-memory"),
        (["--kv-cache-memory", "1"], "give at least"),
        (["--cudagraph-mode", "full"], "full-decode-only"),
        (["--cudagraph-capture-sizes", "1"], "cudagraph"),
        (["--json", "nowhere/bench.json"], "there is no directory"),
        (["--plot", "bench.txt"], "ends in one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(checkpoint, flags, what, capsys, monkeypatch):
    """What cannot be measured is refused before weights are read."""
    monkeypatch.setattr("minisrv.engine.builder.load_model", None)
    assert run(checkpoint, *flags) == 1
    assert what in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_to_install(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert run(checkpoint, "--plot", "bench.png") == 1
    assert "pip install matplotlib" in capsys.readouterr().err

"""Measures what each pass over a model's code brings, when the code is compiled in pieces.

    python benchmarks/passes.py models/minisrv-default --engine-flags "--model-impl transformers" \
        --json passes.json

The code is compiled with no pass, and then with one more at a time. All programs are loaded into
one engine, beside the model's own code (mode 0) and the model as torch.compile compiles it as a
whole (modes 1 and 2). A step is run in each of these ways by turns, forwards and backwards: decode
steps of requests with `CONTEXT` tokens, and prompts that are computed in one step. Steps run by
graphs, each of which is certified, where the device's graphs hold the code; on a CPU they do not
hold models that are compiled as a whole.

The number of operations is that of an eager step, in which the call of a piece is one. The code of
modes 1 and 2 calls its kernels past torch, so that it has no such number. On a GPU the number of
kernels is given too, as torch's profiler sees them in that step.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from minisrv.certification.batches import Batch, BatchRow
from minisrv.certification.compare import certify
from minisrv.certification.trial import GREEDY, StepTrial, reserved_space
from minisrv.checkpoint import open_checkpoint
from minisrv.cli import engine_config
from minisrv.compile.artifacts import read_description
from minisrv.compile.decorator import CompiledForward
from minisrv.compile.modes import CompilationMode
from minisrv.compile.passes import PASSES
from minisrv.compile.program import Program
from minisrv.compile.values import Description
from minisrv.compile.whole import compile_whole
from minisrv.compile.worker import CompileJob, CompileProcess
from minisrv.config import EngineConfig
from minisrv.engine.builder import EngineParts, build_engine
from minisrv.engine.platforms import platform_of
from minisrv.errors import CompilationError, MinisrvError
from minisrv.graph.observer import observing
from minisrv.modes import GraphKey
from minisrv.nn.loader import load_model
from minisrv.runner.generation import Generation, serving
from minisrv.runner.launches import LaunchCounter
from minisrv.tools.environment import environment

CONTEXT = 128
"""Number of tokens in the context of each request of a decode step."""

POLL_S = 0.05


@dataclass(frozen=True)
class Way:
    """A way to run a step.

    generation: the code, with a graph for each step unless `eager`.
    matches: how often each pass has found its pattern, if the code is compiled in pieces.
    pieces: the number of distinct pieces.
    """

    generation: Generation
    eager: bool = False
    matches: dict[str, int] | None = None
    pieces: int | None = None


@dataclass(frozen=True)
class Step:
    """A step that is measured: its name, the graph that holds it, and its rows."""

    name: str
    key: GraphKey
    batch: Batch


def steps_of(parts: EngineParts, batches: list[int], prompts: list[int]) -> list[Step]:
    """Return the steps that are measured."""
    dispatch = parts.dispatcher.dispatch
    found = []
    for size in batches:
        row = BatchRow(CONTEXT - 1, 1, is_decode=True)
        found.append(Step(f"batch {size}", dispatch(size, size, query_len=1).key, size * (row,)))
    for size in prompts:
        batch = (BatchRow(0, size),)
        found.append(Step(f"prompt of {size}", dispatch(size, 1, query_len=None).key, batch))
    return found


def jobs_of(parts: EngineParts, config: EngineConfig) -> dict[str, CompileJob]:
    """Return the compilations, by the name of the pass that each has in addition to those before
    it."""
    checkpoint = open_checkpoint(config)
    buffers = parts.runner.buffers
    everything = CompileJob(
        model=parts.runner.model.config,
        directory=checkpoint.directory,
        dtype=parts.info.dtype,
        quantization=config.quantization,
        device=parts.config.device,
        threads=torch.get_num_threads(),
        max_num_tokens=buffers.sizes.max_num_tokens,
    )
    jobs = {"no passes": replace(everything, passes=())}
    passes = tuple(PASSES)
    for count, name in enumerate(passes, 1):
        jobs[name] = replace(everything, passes=passes[:count])
    return jobs


class Compilers:
    """Processes that compile beside this one, `at_once` at a time."""

    def __init__(self, jobs: dict[str, CompileJob], at_once: int) -> None:
        """Start the first of them."""
        self._jobs, self._at_once = jobs, at_once
        self._found = {name: kept for name, job in jobs.items() if (kept := job.kept_program())}
        self._left = [name for name in jobs if name not in self._found]
        self._running: dict[str, CompileProcess] = {}
        self._fill()

    def _fill(self) -> None:
        while self._left and len(self._running) < self._at_once:
            name = self._left.pop(0)
            self._running[name] = CompileProcess(self._jobs[name])

    def wait(self) -> dict[str, Path]:
        """Return the directory of each program when all are there. Raises MinisrvError."""
        try:
            while self._running:
                for name, process in list(self._running.items()):
                    answer = process.poll()
                    if isinstance(answer, MinisrvError):
                        raise answer
                    if isinstance(answer, Path):
                        process.close()
                        del self._running[name]
                        self._found[name] = answer
                        print(f"compiled: {name}", file=sys.stderr)
                self._fill()
                time.sleep(POLL_S)
        finally:
            for process in self._running.values():
                process.close()
        return {name: self._found[name] for name in self._jobs}


def whole(
    parts: EngineParts, config: EngineConfig, directory: Path, mode: CompilationMode
) -> CompiledForward:
    """Return the forward of a second model with the same weights, compiled as a whole. Raises
    CompilationError."""
    own = parts.runner.model
    model = load_model(
        own.config,
        directory,
        dtype=own.dtype,
        device=own.qkv.device,
        load_format=config.load_format,
        seed=config.seed,
    )
    model.prepare(quantization=config.quantization)
    model.allocate_buffers(len(own.qkv))
    compile_whole(model, mode, lambda done, total: None)
    return CompiledForward(model)


def capture(parts: EngineParts, generation: Generation, steps: list[Step]) -> None:
    """Capture the graphs of the steps for a generation, and certify each."""
    runner = parts.runner
    epilogue = runner.ladders.epilogue_key(1, needs_logits=False)
    row = BatchRow(CONTEXT - 1, 1, is_decode=True)
    with (
        reserved_space(runner, parts.scheduler.block_pool) as space,
        serving(runner, generation),
    ):
        for key, batch in [(epilogue, (row,)), *((step.key, step.batch) for step in steps)]:
            trial = StepTrial(runner, space, key, batch)
            graph = certify(trial, partial(runner.capture, key))
            runner.install(key, graph)
            trial.clear()


def make_ways(
    parts: EngineParts, config: EngineConfig, steps: list[Step], modes: list[int], compilers: int
) -> tuple[dict[str, Way], dict[str, float], dict[str, str]]:
    """Return the ways to run the steps, the seconds that compiling took, and why any way is
    missing. Raises MinisrvError if a program cannot be made.

    modes: the numbers of the modes in which the model is compiled as a whole.
    compilers: the number of processes that compile at once.
    """
    runner, make_backend = parts.runner, platform_of(config).make_backend
    own = Generation.in_service(runner)
    ways = {"mode 0": Way(own)}
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    jobs = jobs_of(parts, config)
    first = began = time.monotonic()
    running = Compilers(jobs, compilers)
    eager = not parts.config.kind.captures_compiled
    if eager:
        ways["mode 0, eager"] = Way(own, eager)
    for mode in map(CompilationMode, modes):
        name = f"mode {mode.value}{', eager' if eager else ''}"
        try:
            code = whole(parts, config, jobs["no passes"].directory, mode)
        except CompilationError as error:
            failures[name] = error.message
            continue
        finally:
            seconds[name], began = time.monotonic() - began, time.monotonic()
            print(f"{name}: {seconds[name]:.0f} s of compilation", file=sys.stderr)
        ways[name] = Way(Generation.empty(runner, make_backend(), code), eager)
    programs = running.wait()
    seconds["all programs"] = time.monotonic() - first
    for name, directory in programs.items():
        program = Program.load(directory, runner.model)
        assert program is not None, "it has just been made"
        described = msgspec.msgpack.decode(read_description(directory), type=Description)
        prefix = "mode 3, " if name == "no passes" else "+ "
        ways[f"{prefix}{name}"] = Way(
            Generation.empty(runner, make_backend(), program),
            matches=described.matches,
            pieces=len(described.pieces),
        )
    began = time.monotonic()
    for name, way in ways.items():
        if not way.eager and way.generation.program is not None:
            capture(parts, way.generation, steps)
            print(f"captured: {name}", file=sys.stderr)
    seconds["capture and certify"] = time.monotonic() - began
    return ways, seconds, failures


class Measurement:
    """Measures steps in every way."""

    def __init__(self, parts: EngineParts, ways: dict[str, Way], rounds: int) -> None:
        self._runner, self._pool = parts.runner, parts.scheduler.block_pool
        self._ways, self._rounds = ways, rounds

    def measure(self, step: Step) -> dict[str, Any]:
        """Return the operations of a step by each way, and its times by turns."""
        runner = self._runner
        times: dict[str, list[float]] = {name: [] for name in self._ways}
        with reserved_space(runner, self._pool) as space:
            trial = StepTrial(runner, space, step.key, step.batch, params=[GREEDY])
            counts = {name: self._count(trial, way) for name, way in self._ways.items()}
            for _ in range(self._rounds):
                for name in (*self._ways, *reversed(self._ways)):
                    times[name].append(self._time(trial, name))
            trial.clear()
        return {
            name: {**counts[name], "ms": median(found), "least_ms": min(found), "all_ms": found}
            for name, found in times.items()
        }

    def _time(self, trial: StepTrial, name: str) -> float:
        way = self._ways[name]
        with serving(self._runner, way.generation):
            return trial.time(None if way.eager else self._runner.graphs[trial.key])

    def _count(self, trial: StepTrial, way: Way) -> dict[str, int | None]:
        """Return the number of operations of an eager step, and of the kernels of a GPU."""
        counter = LaunchCounter()
        with serving(self._runner, way.generation):
            trial.time(None)  # kernels are compiled, and chosen, at the first run
            if isinstance(way.generation.program, CompiledForward):
                operations = None
            else:
                with observing(self._runner.observers, counter):
                    trial.run(None)
                operations = counter.count
            return {"operations": operations, "kernels": self._kernels(trial)}

    def _kernels(self, trial: StepTrial) -> int | None:
        if self._runner.buffers.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            trial.run(None)
            torch.cuda.synchronize()
        events = profiler.events()
        on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
        return sum(not event.name.startswith("Mem") for event in on_gpu)


def table(results: dict[str, dict[str, Any]], ways: dict[str, Way]) -> Table:
    """Return a table with a row for each way, and a column for each step."""
    first = next(iter(results.values()))
    shown = Table("", "operations", "kernels", *results, box=None)
    for name in ways:
        counts = [first[name][kind] for kind in ("operations", "kernels")]
        ms = [f"{result[name]['ms']:.3g}" for result in results.values()]
        shown.add_row(name, *("" if count is None else str(count) for count in counts), *ms)
    return shown


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas; none for an empty text."""
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    """Compile, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--engine-flags", default="")
    parser.add_argument("--batches", type=numbers, default="1,4,16,64")
    parser.add_argument("--prompts", type=numbers, default="512,2048")
    parser.add_argument("--modes", type=numbers, default="1,2", help="of models as a whole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compilers", type=int, default=1, help="processes that compile at once")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sizes = options.batches + options.prompts
    given = engine_config([options.model, *shlex.split(options.engine_flags)])
    most = max(options.batches, default=1)
    config = replace(
        given,
        compilation_mode=CompilationMode.NONE,
        max_num_seqs=most,
        max_num_batched_tokens=max(sizes),
        cudagraph_capture_sizes=tuple(sorted(set(sizes))),
        cudagraph_capture="whole",
    )
    where = environment("transformers")
    parts = build_engine(config)
    steps = steps_of(parts, options.batches, options.prompts)
    ways, seconds, failures = make_ways(parts, config, steps, options.modes, options.compilers)
    gc.collect()
    gc.disable()
    measurement = Measurement(parts, ways, options.rounds)
    results = {step.name: measurement.measure(step) for step in steps}
    # Without a terminal rich assumes a small width, at which rows would be broken.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table(results, ways))
    for name, why in failures.items():
        console.print(f"{name} is not measured: {why}", markup=False)
    if options.json is not None:
        report = {
            "environment": msgspec.to_builtins(where),
            "engine": msgspec.to_builtins(parts.info),
            "rounds": options.rounds,
            "seconds": seconds,
            "failures": failures,
            "ways": {
                name: {"eager": way.eager, "matches": way.matches, "pieces": way.pieces}
                for name, way in ways.items()
            },
            "steps": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

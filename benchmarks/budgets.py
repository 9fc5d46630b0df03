"""Budgets of prompt tokens beside each other, on one engine by turns, or without a device.

    python benchmarks/budgets.py run MODEL --loads 3584/64@8,32 --budgets model 2048 8192 --json F
    python benchmarks/budgets.py simulate F --loads 3584/64@8,32 --budgets model 512 2048 8192

A load "3584/64@8" keeps 8 requests in flight, each with 3,584 random prompt tokens and 64 tokens to
generate. A budget is a fixed number of tokens in a step, or "model": the number that follows from
the cost model. `run` serves the loads in the process of the engine, with every budget in turn, and
keeps the time of each step, and what the cost model was fitted to. `simulate` runs the same
scheduler and the same budgets through the same loads, where a step takes the time that a cost model
predicts which is fitted to those steps. The host takes no time there.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.cli import engine_config
from minisrv.core.attention_work import AttentionWork
from minisrv.core.budget import PrefillBudget
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.ladder import build_ladders
from minisrv.core.step import SchedulerOutput
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.modes import CUDAGraphMode, GraphKey
from minisrv.request import EngineOutput, EngineRequest, SamplingParams
from minisrv.tools.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.prompt_heavy import Load, loads
from benchmarks.simulation import (
    EngineShape,
    SimulatedEngine,
    model_budget,
    packed,
    unpacked,
)

NO_TARGET_MS = 1e9
"""A target that every step meets; only engines with one keep the time of each step."""


VOCABULARY = 256
"""Number of tokens from which those of prompts are drawn. Every model has as many."""


class Served(Protocol):
    """What serves requests: an engine, or a simulation of one."""

    @property
    def has_work(self) -> bool: ...
    @property
    def now_ms(self) -> float: ...
    def add(self, request: EngineRequest) -> None: ...
    def step(self) -> list[EngineOutput]: ...


def closed_loop(served: Served, load: Load, requests: int) -> dict[str, float]:
    """Serve a load, and return what clients see of it."""
    draw = random.Random(str(load))
    vocabulary = range(VOCABULARY)
    prompts = [draw.choices(vocabulary, k=load.input_tokens) for _ in range(requests)]
    params = SamplingParams(max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True)
    sent = open_now = tokens = 0
    begun: dict[str, float] = {}
    last: dict[str, float] = {}
    first_ms: list[float] = []
    gaps_ms: list[float] = []
    start = served.now_ms
    while sent < requests or served.has_work:
        while open_now < load.concurrency and sent < requests:
            name = f"{load}-{sent}"
            prompt = prompts[sent]
            served.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
            begun[name] = served.now_ms
            sent, open_now = sent + 1, open_now + 1
        for output in served.step():
            name, now = output.request_id, served.now_ms
            if output.token_ids:
                tokens += len(output.token_ids)
                if name in last:
                    gaps_ms.append(now - last[name])
                else:
                    first_ms.append(now - begun[name])
                last[name] = now
            open_now -= output.finish_reason is not None
    return {
        "tokens/s": 1000 * tokens / (served.now_ms - start),
        "TTFT p50 ms": median(first_ms),
        "ITL p99 ms": sorted(gaps_ms)[int(0.99 * (len(gaps_ms) - 1))],
    }


# ---- on a device ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Serve the loads by an engine, and return the report."""
    # A graph that is captured meanwhile would disturb what is measured.
    flags = ["--cudagraph-capture", "whole", *shlex.split(options.engine_flags)]
    config = engine_config([*options.model, *flags])
    parts = build_engine(replace(config, enable_prefix_caching=False))
    engine, info = Engine(parts), parts.info
    ladders = engine.dispatcher.ladders
    report: dict[str, Any] = {
        "environment": msgspec.to_builtins(environment("torch")),
        "mode": ladders.mode.value,
        "max_num_seqs": ladders.max_num_seqs,
        "max_num_batched_tokens": ladders.max_num_batched_tokens,
        "max_default_mixed": parts.config.kind.max_default_mixed,
        "max_model_len": info.max_model_len,
        "num_kv_blocks": info.num_kv_blocks,
        "block_size": info.block_size,
        "ahead": info.async_scheduling,
        "itl_target_ms": info.itl_target_ms,
        "samples": [packed(sample) for sample in parts.samples],
        "runs": [],
    }
    budgets = {name: PrefillBudget(int(name), itl_target_ms=NO_TARGET_MS) for name in options.fixed}
    budgets["model"] = engine.scheduler.budget
    kept = KeepsSteps(engine.cost_model)
    engine.counters.cost_model = kept
    # As in an engine that serves: a collection that went through all objects would take as long as
    # many steps.
    gc.collect()
    gc.freeze()
    for load in options.loads:
        for turn in range(options.rounds + 1):  # the first is a warm-up
            streams = options.requests_per_stream if turn else 1
            for name in options.budgets[:: 1 if turn % 2 else -1]:
                engine.scheduler.budget, kept.steps = budgets[name], []
                found = closed_loop(engine, load, streams * load.concurrency)
                steps = [packed(sample) for sample in kept.steps]
                entry = {"load": load._asdict(), "budget": name, **found, "steps": steps}
                report["runs"] += [entry] if turn else []
    return report


class Engine(EngineCore):
    """An engine with a clock."""

    @property
    def now_ms(self) -> float:
        """The time in milliseconds."""
        return 1000 * time.perf_counter()


class KeepsSteps(CostModel):
    """A cost model that is one with another, and keeps what it is told."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self.steps: list[StepSample] = []

    def predict(self, key: GraphKey, work: AttentionWork) -> float:
        """See `CostModel`."""
        return self._model.predict(key, work)

    def observe(self, sample: StepSample) -> None:
        """See `CostModel`."""
        self.steps.append(sample)
        self._model.observe(sample)


# ---- without a device ----------------------------------------------------------------------------


class Simulation(SimulatedEngine):
    """The engine of a report, with one of the budgets.

    steps: the steps that have run, with their numbers of prompt tokens and the times.
    """

    def __init__(self, report: dict[str, Any], device: CostModel, budget: str) -> None:
        self.steps: list[tuple[int, float]] = []
        self._learns = CostModel(map(unpacked, report["samples"]))
        ladders = build_ladders(
            CUDAGraphMode(report["mode"]),
            report["max_num_seqs"],
            report["max_num_batched_tokens"],
            max_default_mixed=report["max_default_mixed"],
        )
        shape = EngineShape(
            ladders=ladders,
            num_kv_blocks=report["num_kv_blocks"],
            block_size=report["block_size"],
            max_model_len=report["max_model_len"],
            ahead=report["ahead"],
        )
        by_model = model_budget(shape, self._learns, report["itl_target_ms"])
        super().__init__(
            shape,
            device,
            by_model if budget == "model" else PrefillBudget(int(budget)),
            enable_prefix_caching=False,
        )

    def ran(self, output: SchedulerOutput, key: GraphKey, ms: float) -> None:
        """See `SimulatedEngine`."""
        self._learns.observe(StepSample(key, output.work, ms))
        self.steps.append((output.num_tokens - output.num_decodes, ms))


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Serve the loads without a device, and return the report."""
    report = json.loads(options.file.read_text())
    measured = [step for entry in report["runs"] for step in entry["steps"]]
    device = CostModel(map(unpacked, measured))
    runs = []
    for load in options.loads:
        for budget in options.budgets:
            served = Simulation(report, device, budget)
            requests = options.requests_per_stream * load.concurrency
            found = closed_loop(served, load, requests)
            prefills = [tokens for tokens, _ in served.steps if tokens]
            found["prompt tokens a step"] = sum(prefills) / len(prefills)
            runs.append({"load": load._asdict(), "budget": budget, **found})
    return {"runs": runs}


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the medians of each load and budget."""
    names = [name for name, value in runs[0].items() if isinstance(value, float)]
    found = Table("load", "budget", *names, box=None)
    for column in found.columns[2:]:
        column.justify = "right"
    by_row: dict[tuple[Load, str], list[dict[str, Any]]] = {}
    for entry in runs:
        by_row.setdefault((Load(**entry["load"]), entry["budget"]), []).append(entry)
    for (load, budget), some in by_row.items():
        cells = [f"{median(entry[name] for entry in some):,.1f}" for name in names]
        found.add_row(str(load), budget, *cells)
    return found


def budget(text: str) -> str:
    """Check the name of a budget: "model", or a number of tokens. Raises ArgumentTypeError."""
    if text != "model" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget; give model, or a number of tokens"
        )
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    on_device = commands.add_parser("run", help="measure one engine")
    on_device.add_argument("model", nargs="*", help="at most one; by default that of minisrv")
    on_device.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    on_device.add_argument("--rounds", type=int, default=2)
    without = commands.add_parser("simulate", help="predict what `run` would measure")
    without.add_argument("file", type=Path, help="of `run --json`")
    for command in (on_device, without):
        command.add_argument("--loads", nargs="+", type=loads, required=True, metavar="IN/OUT@N,N")
        command.add_argument(
            "--budgets", nargs="+", type=budget, default=["model", "512", "2048", "8192"]
        )
        command.add_argument("--requests-per-stream", type=int, default=6, metavar="N")
        command.add_argument("--json", type=Path, metavar="FILE", help="a file for all results")
    options = parser.parse_args(argv)
    options.loads = [load for group in options.loads for load in group]
    options.fixed = [name for name in options.budgets if name != "model"]
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure or simulate, print the table, and write the JSON."""
    options = parse(argv)
    report = run(options) if options.command == "run" else simulate(options)
    Console(highlight=False, soft_wrap=True).print(table(report["runs"]))
    if options.json is not None:
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()

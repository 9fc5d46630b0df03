"""What an ITL target costs in throughput, and how well the times of steps are predicted.

    python benchmarks/step_costs.py [MODEL] --target-ms 60 --concurrency 1,4,16 --rounds 2 --json F

Two engines in one process, one with a target and one without, serve the same closed loops by turns,
A B B A: requests with prompts and outputs of random lengths, a given number of them at any time.
The table has tokens per second (prompt tokens included) and the p99 of the time between two tokens
of a request. The error of a prediction is what `minisrv:step_time_error_ratio` counts. Beside it is
the error *in hindsight*, of a model that was fitted to all these steps before it predicts them: if
it is about the same, the rest is the machine's. And there is the *noise* of the machine, by how
much the time of a decode step differs from the median of the nine steps of its size around it.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.cli import engine_config
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.step import SchedulerOutput
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import Histogram
from minisrv.graph.observer import StepObserver
from minisrv.modes import GraphKey, Stage
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.budgets import KeepsSteps

PROMPTS, OUTPUTS = (20, 100, 300, 700, 1500), (8, 32, 128)
"""Lengths of prompts and outputs in tokens, each as likely as the others."""


class DecodeTimes(StepObserver):
    """Collects the times of the stages of decode steps on a CPU by size, in milliseconds."""

    def __init__(self) -> None:
        self.by_size: defaultdict[int, list[float]] = defaultdict(list)

    def stage(self, key: GraphKey, output: SchedulerOutput) -> Any:
        """See `StepObserver`."""
        shape = key[1]
        if shape.stage is Stage.MODEL and shape.uniform_decode:
            return _Timed(self.by_size[shape.num_tokens])
        return None


class _Timed:
    def __init__(self, times: list[float]) -> None:
        self._times = times

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._times.append(1000 * (time.perf_counter() - self._began))


def closed_loop(engine: EngineCore, concurrency: int, requests: int, seed: int) -> dict[str, float]:
    """Serve requests, and return tokens per second and the p99 of the time between two tokens."""
    draw = random.Random(seed)
    sent, open_now, tokens = 0, 0, 0
    last: dict[str, float] = {}
    gaps: list[float] = []
    began = time.perf_counter()
    while sent < requests or engine.has_work:
        while open_now < concurrency and sent < requests:
            name, vocab = f"{seed}-{sent}", range(engine.info.vocab_size)
            prompt = draw.choices(vocab, k=draw.choice(PROMPTS))
            params = SamplingParams(
                max_tokens=draw.choice(OUTPUTS), temperature=0.0, ignore_eos=True
            )
            engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
            sent, open_now, tokens = sent + 1, open_now + 1, tokens + len(prompt)
        for output in engine.step():
            now = time.perf_counter()
            if output.token_ids:
                tokens += len(output.token_ids)
                if output.request_id in last:
                    gaps.append(1000 * (now - last[output.request_id]))
                last[output.request_id] = now
            open_now -= output.finish_reason is not None
    seconds = time.perf_counter() - began
    return {"tokens_per_s": tokens / seconds, "itl_p99_ms": quantile(gaps, 0.99)}


def quantile(values: list[float], share: float) -> float:
    """Return the value below which a share of all values lies."""
    return sorted(values)[int(share * (len(values) - 1))]


def error_quantile(errors: Histogram, share: float) -> float:
    """Return the error below which a share of all errors lies; within a bucket they are taken to be
    spread evenly."""
    bounds = (0.0, *errors.bounds, 2 * errors.bounds[-1])
    wanted, before = share * sum(errors.counts), 0
    for index, up_to in enumerate(accumulate(errors.counts)):
        if up_to >= wanted and up_to > before:
            inside = (wanted - before) / (up_to - before)
            return bounds[index] + inside * (bounds[index + 1] - bounds[index])
        before = up_to
    return bounds[-1]


def noise(times: DecodeTimes) -> list[float]:
    """Return by how much each decode step differs from the median of those around it."""
    return [
        abs(median(some[max(0, place - 4) : place + 5]) / ms - 1)
        for some in times.by_size.values()
        for place, ms in enumerate(some)
    ]


def hindsight(steps: list[StepSample]) -> list[float]:
    """Return the errors of a cost model that has been fitted to the steps which it predicts."""
    model, errors = CostModel(steps), []
    for step in steps:
        errors.append(abs(model.predict(step.key, step.work) / step.ms - 1))
        model.observe(step)  # it follows the pace of the machine
    return errors


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="*", help="at most one; by default that of minisrv")
    parser.add_argument("--target-ms", type=float, default=60.0)
    parser.add_argument("--concurrency", default="1,4,16", help="separated by commas")
    parser.add_argument("--requests", type=int, default=24, help="of each closed loop")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    config = engine_config(
        ["--cudagraph-capture", "whole", *options.model, *shlex.split(options.engine_flags)]
    )
    config = replace(config, enable_prefix_caching=False)
    engines = {
        name: EngineCore(build_engine(replace(config, itl_target_ms=target_ms)))
        for name, target_ms in (("target", options.target_ms), ("no target", 0.0))
    }
    for engine in engines.values():
        closed_loop(engine, 2, 3, seed=-1)  # the first steps of a process are slow
    times = DecodeTimes()
    engines["target"].observers.append(times)
    kept = KeepsSteps(engines["target"].cost_model)
    engines["target"].counters.cost_model = kept
    runs: list[dict[str, Any]] = []
    for concurrency in map(int, options.concurrency.split(",")):
        requests = max(8, min(options.requests, 6 * concurrency))
        for turn in range(options.rounds):
            names = list(engines)[:: 1 if turn % 2 == 0 else -1]
            for name in names:
                found = closed_loop(engines[name], concurrency, requests, seed=turn)
                runs.append({"engine": name, "concurrency": concurrency, **found})
    errors = engines["target"].stats().step_time_errors
    shares = {"median": 0.5, "p95": 0.95}
    summary = {
        "steps": sum(errors.counts),
        "error": {name: error_quantile(errors, share) for name, share in shares.items()},
        "hindsight": {
            name: quantile(hindsight(kept.steps), share) for name, share in shares.items()
        },
        "noise": {name: quantile(noise(times), share) for name, share in shares.items()},
    }
    table = Table("concurrency", "engine", "tokens/s", "ITL p99 ms", box=None)
    for concurrency in dict.fromkeys(run["concurrency"] for run in runs):
        for name in engines:
            some = [
                run for run in runs if (run["engine"], run["concurrency"]) == (name, concurrency)
            ]
            cells = [median(run[key] for run in some) for key in ("tokens_per_s", "itl_p99_ms")]
            table.add_row(str(concurrency), name, f"{cells[0]:.0f}", f"{cells[1]:.1f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "{steps} steps; error {error[median]:.1%} (median), {error[p95]:.1%} (p95); "
        "in hindsight {hindsight[median]:.1%}, {hindsight[p95]:.1%}; "
        "noise of decode steps {noise[median]:.1%}, {noise[p95]:.1%}".format(**summary)
    )
    if options.json is not None:
        report = {
            "environment": environment("torch"),
            "options": vars(options),
            "runs": runs,
            "predictions": {**summary, "histogram": errors},
        }
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

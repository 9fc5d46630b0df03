"""Measures the host's time in a step of steady decode, by batch, and the time of the step.

    python benchmarks/host_step.py MODEL --batch 1,8,64,256 --json F \
        --engine-flags "--load-format dummy --async-scheduling"

The host's time is that of an engine step minus the time in which it waits for tokens. To compare
two versions, run the script of each with the directory of that version in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.graph.observer import StepObserver, StepPart, observing
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment

WARM_UP = 40


def measure(engine: EngineCore, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Measure decode steps of `batch` requests, whose contexts grow from `context` tokens on."""
    draw, vocab = random.Random(batch), engine.info.vocab_size
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    names = [f"{batch}-{index}" for index in range(batch)]
    fresh = set(names)
    for name in names:
        prompt = draw.choices(range(vocab), k=context)
        engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    while fresh:
        fresh -= {output.request_id for output in engine.step()}
    for _ in range(WARM_UP):
        engine.step()
    waited = _Waiting()
    step_us, host_us = [], []
    with observing(engine.observers, waited):
        for _ in range(steps):
            waited.seconds, begin = 0.0, time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - begin
            step_us.append(1e6 * seconds)
            host_us.append(1e6 * (seconds - waited.seconds))
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return {"batch": batch, "step_us": median(step_us), "host_us": median(host_us)}


class _Waiting(StepObserver):
    """Adds up the seconds in which the engine waits for the results of steps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.perf_counter()

    def lap(self, part: StepPart) -> None:
        """See `StepObserver`."""
        now = time.perf_counter()
        if part is StepPart.WAIT:
            self.seconds += now - self._last
        self._last = now


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--batch", default="1,8,64,256", help="sizes, separated by commas")
    parser.add_argument("--context", type=int, default=100, help="tokens of a prompt (100)")
    parser.add_argument("--steps", type=int, default=200, help="measured steps (200)")
    parser.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sizes = [int(size) for size in options.batch.split(",")]
    engine = EngineCore(
        build_engine(
            engine_config(
                ["--cudagraph-capture", "whole", options.model, *shlex.split(options.engine_flags)]
            )
        )
    )
    results = [measure(engine, size, options.context, options.steps) for size in sizes]
    table = Table("batch", "step us", "host us", box=None)
    for found in results:
        table.add_row(str(found["batch"]), f"{found['step_us']:.0f}", f"{found['host_us']:.0f}")
    Console(highlight=False, soft_wrap=True).print(table)
    if options.json is not None:
        report = {"environment": environment(), "options": vars(options), "results": results}
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

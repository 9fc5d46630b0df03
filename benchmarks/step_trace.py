"""What the step trace costs a step: the same steps of two engines with it and of two without it.

    python benchmarks/step_trace.py --json out.json

They run blocks of steps by turns in this process, in an order that cancels drift, and are made in
one that cancels what an engine's place in memory does to its steps, which is more than the trace
does. The cost of a reader is that of one answer to it, with its encoding: a reader that follows
asks four times a second, and gets the steps that have been retired meanwhile.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import encode
from minisrv.engine.trace_format import AskSteps
from minisrv.request import EngineRequest, SamplingParams
from minisrv.server.step_trace import POLL_SECONDS
from minisrv.tools.environment import environment

STREAMS = 8
BLOCK = 25
"""Number of steps in a block."""
PROMPT = 16


def submit(engine: EngineCore, streams: int, tokens: int) -> None:
    """Queue requests, and compute their prompts."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for stream in range(streams):
        prompt = [10 + stream + place for place in range(PROMPT)]
        name = f"cmpl-{stream:032x}-0"
        engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    engine.step()


def block_us(engine: EngineCore) -> float:
    """Return the median microseconds of a step of a block."""
    times = []
    for _ in range(BLOCK):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return 1e6 * median(times)


def measure(engines: Sequence[EngineCore], rounds: int) -> tuple[list[float], list[float]]:
    """Return the median microseconds of a step of each block of the engines with a trace, and of
    those without one."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for engine in engines[:: 1 if number % 2 else -1]:
            found[engine.step_trace is not None].append(block_us(engine))
    return found[True], found[False]


def answer_us(engine: EngineCore, steps: int) -> float:
    """Return the median microseconds of an answer with the last steps, encoded."""
    assert engine.step_trace is not None
    times = []
    for _ in range(50):
        began = time.perf_counter()
        encode(engine.step_trace.read(AskSteps(None, -1, steps)))
        times.append(time.perf_counter() - began)
    return 1e6 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint; the default model if left out")
    parser.add_argument("--engine-flags", default="", help="flags of `minisrv serve` in one text")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--rounds", type=int, default=15, help="of two blocks each way")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens = BLOCK * options.rounds + 3
    model = [] if options.model is None else [options.model]
    config = replace(
        engine_config([*model, *shlex.split(options.engine_flags)]),
        max_num_seqs=options.streams,
        max_model_len=PROMPT + tokens,
        cudagraph_capture="whole",
    )
    kept = config.step_trace
    engines = [
        EngineCore(build_engine(replace(config, step_trace=size))) for size in (kept, 0, 0, kept)
    ]
    for engine in engines:
        submit(engine, options.streams, tokens)
        block_us(engine)  # the processor's caches, and the first steps of the run
    on, off = measure(engines, options.rounds - 1)
    differences = [a - b for a, b in zip(on, off, strict=True)]
    step, cost = median(off), median(differences)
    number = round(1e6 * POLL_SECONDS / step)
    answer = answer_us(engines[0], min(number, 128))
    share = 100 * answer / (1e6 * POLL_SECONDS)
    print(f"{options.streams} streams, {len(on)} blocks of {BLOCK} steps each way")
    print(f"a step without the trace: {step:.0f} us (median of the blocks)")
    print(f"with it: {cost:+.1f} us, {100 * cost / step:+.2f} % (median of paired differences)")
    print(f"an answer with {number} steps: {answer:.0f} us, {share:.2f} % of the time of a reader")
    if options.json:
        result: dict[str, Any] = {
            "environment": environment(),
            "streams": options.streams,
            "block": BLOCK,
            "on_us": on,
            "off_us": off,
            "cost_us": cost,
            "step_us": step,
            "answer_steps": number,
            "answer_us": answer,
        }
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))


if __name__ == "__main__":
    main()

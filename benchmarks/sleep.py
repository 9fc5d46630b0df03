"""Measures how long an engine takes to fall asleep and to wake up, and what memory is free between.

    python benchmarks/sleep.py MODEL --levels 1,1,2 --json F \
        --engine-flags "--load-format dummy --max-num-seqs 64"

Engines run in process, each in a process of its own: first one that never sleeps, then one with
`--enable-sleep-mode`, whose decode steps should take no longer. The second sleeps and wakes up once
for each of the levels. "In use" is the memory of the GPU that any process uses, or that of this
process on a CPU; the rest is free for others. The first token is that of one request that is sent
as soon as the engine is awake. Its tokens must be those from before the first sleep.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import SleepTag
from minisrv.engine.platforms import platform_of
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment


def generate(engine: EngineCore, requests: int, tokens: int) -> tuple[list[list[int]], list[float]]:
    """Serve requests with prompts of 32 tokens, all at once, and return their tokens, and the time
    of each step in seconds."""
    draw = random.Random(0)
    found: dict[str, list[int]] = {}
    for number in range(requests):
        request = EngineRequest(
            request_id=str(number),
            prompt_token_ids=draw.choices(range(engine.info.vocab_size), k=32),
            params=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        )
        engine.add(request)
        found[request.request_id] = []
    seconds = []
    while engine.has_work:
        began = time.perf_counter()
        for output in engine.step():
            found[output.request_id] += output.token_ids
        seconds.append(time.perf_counter() - began)
    return list(found.values()), seconds


def measure(arguments: list[str], levels: list[int], requests: int, tokens: int) -> dict[str, Any]:
    """Make an engine, and measure its steps, and its sleep if there are levels."""
    config = engine_config(arguments)
    began = time.perf_counter()
    engine = EngineCore(build_engine(config))
    started = time.perf_counter() - began
    used = platform_of(config).held_bytes
    generate(engine, requests, tokens)
    steps = [median(generate(engine, requests, tokens)[1]) for _ in range(3)]
    expected, _ = generate(engine, 1, 16)
    sleeps = []
    for level in levels:
        before = used()
        began = time.perf_counter()
        engine.sleeper.sleep(level)
        slept = time.perf_counter()
        asleep = used()
        woken = time.perf_counter()
        engine.sleeper.wake_up(tuple(SleepTag))
        awake = time.perf_counter()
        first, _ = generate(engine, 1, 1)
        told = time.perf_counter()
        found, _ = generate(engine, 1, 16)
        sleeps.append(
            {
                "level": level,
                "sleep_s": slept - began,
                "wake_up_s": awake - woken,
                "first_token_ms": 1e3 * (told - awake),
                "in_use_before": before,
                "in_use_asleep": asleep,
                "in_use_awake": used(),
                "tokens_are_equal": found == expected and first[0] == expected[0][:1],
            }
        )
    return {
        "flags": shlex.join(arguments),
        "start_s": started,
        "step_ms": [1e3 * seconds for seconds in steps],
        "sleeps": sleeps,
        "environment": environment("torch"),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--levels", default="1,1,2", help="separated by commas")
    parser.add_argument("--requests", type=int, default=8, help="that decode at a time")
    parser.add_argument("--tokens", type=int, default=128, help="of each request")
    parser.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    flags = [options.model, *shlex.split(options.engine_flags)]
    levels = [int(level) for level in options.levels.split(",")]
    engines = []
    for arguments, chosen in ((flags, []), ([*flags, "--enable-sleep-mode"], levels)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            job = pool.submit(measure, arguments, chosen, options.requests, options.tokens)
            engines.append(job.result())
    table = Table(
        "level", "sleep s", "wake s", "first token", "in use", "asleep", "equal", box=None
    )
    for sleep in engines[1]["sleeps"]:
        table.add_row(
            str(sleep["level"]),
            f"{sleep['sleep_s']:.3f}",
            f"{sleep['wake_up_s']:.3f}",
            f"{sleep['first_token_ms']:.1f} ms",
            *(f"{sleep[key] / 2**20:.0f} MiB" for key in ("in_use_before", "in_use_asleep")),
            str(sleep["tokens_are_equal"]),
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    without, with_arena = (median(engine["step_ms"]) for engine in engines)
    console.print(f"a step takes {without:.3f} ms, and {with_arena:.3f} ms with sleep mode")
    if options.json is not None:
        report = {"options": vars(options), "engines": engines}
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Measures what it costs to verify a share of the steps while requests run.

    python benchmarks/verification.py --rounds 6 --json verification.json

One process has an engine for each rate of --rates, with the same flags. They serve the same greedy
requests by turns, so many streams at a time, in the order A B B A and again. Compared within a
round are the tokens per second of each with those of the first. The exit status is 1 if a step
disagreed with its eager run.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment


def run(
    engine: EngineCore, *, streams: int, requests: int, input_tokens: int, output_tokens: int
) -> tuple[float, dict[str, list[int]]]:
    """Serve requests with so many open at a time, and return the tokens per second and the tokens
    of each request."""
    draw, found = random.Random(0), {}
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    waiting = (
        EngineRequest(
            request_id=str(number),
            prompt_token_ids=draw.choices(range(engine.info.vocab_size), k=input_tokens),
            params=params,
        )
        for number in range(requests)
    )
    began = time.perf_counter()
    for request in islice(waiting, streams):
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                for request in islice(waiting, 1):
                    engine.add(request)
        engine.advance_background()
    seconds = time.perf_counter() - began
    return sum(map(len, found.values())) / seconds, found


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the JSON; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", default="0,0.001,0.01", help="separated by commas")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="of one run")
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=6, help="of two runs of each engine")
    parser.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    flags = ["--cudagraph-capture", "whole", *shlex.split(options.engine_flags)]
    engines = {
        rate: EngineCore(build_engine(engine_config([*flags, "--verify-graphs", rate])))
        for rate in options.rates.split(",")
    }
    load = {name: getattr(options, name) for name in ("streams", "requests", "input_tokens")}
    load["output_tokens"] = options.output_tokens
    answers = {rate: run(engine, **load)[1] for rate, engine in engines.items()}  # the warm-up
    speeds: dict[str, list[list[float]]] = {rate: [] for rate in engines}
    for _ in range(options.rounds):
        for times in speeds.values():
            times.append([])
        for rate in (*engines, *reversed(engines)):
            speed, found = run(engines[rate], **load)
            speeds[rate][-1].append(speed)
            answers[rate] |= found
    first, *_ = speeds
    table = Table("rate", "tok/s", "of those of the first", "lowest", "highest", "steps", box=None)
    ratios = {
        rate: [sum(own) / sum(other) for own, other in zip(times, speeds[first], strict=True)]
        for rate, times in speeds.items()
    }
    for rate, times in speeds.items():
        counts = engines[rate].verification.counts
        share = [median(ratios[rate]), min(ratios[rate]), max(ratios[rate])]
        speed = median(sum(pair) / 2 for pair in times)
        table.add_row(rate, f"{speed:.0f}", *(f"{each:.4f}" for each in share), str(counts))
    Console(highlight=False, soft_wrap=True).print(table)
    if options.json is not None:
        report = {
            "environment": environment("torch"),
            "options": vars(options),
            "tokens_per_s": speeds,
            "ratios": ratios,
            "same_answers": {rate: found == answers[first] for rate, found in answers.items()},
            "verified": {rate: engine.verification.counts for rate, engine in engines.items()},
        }
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")
    return int(any(engine.describe().ladder.quarantined for engine in engines.values()))


if __name__ == "__main__":
    sys.exit(main())

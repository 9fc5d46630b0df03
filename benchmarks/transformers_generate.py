"""Compares decode steps of minisrv's engine and of transformers' `generate`, in one process.

    python benchmarks/transformers_generate.py MODEL --batch 1,16 --threads 1 --json out.json
    python benchmarks/transformers_generate.py MODEL --engine-flags=--enforce-eager

Both get the same random prompts, with greedy sampling and end-of-sequence tokens ignored, and have
the same weights, dtype and threads; `generate` has its default cache. A round is generate, minisrv,
minisrv, generate, so that drift cancels. The time of a step is that between two tokens of the whole
batch; the prefill is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import disable_progress_bar

from minisrv.checkpoint import resolve_checkpoint
from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment

Prompts = list[list[int]]
Run = Callable[[Prompts, int], tuple[list[float], Prompts]]
"""A function that is called with (prompts, number of tokens to generate) and returns (milliseconds
of every step but the first, the generated tokens)."""


class Clock(StoppingCriteria):
    """A stopping criterion that never stops, but records the time at which `generate` has another
    token for the whole batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def with_transformers(directory: Path, dtype: torch.dtype) -> Run:
    """Return a function that runs `generate` with the checkpoint in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: Prompts, tokens: int) -> tuple[list[float], Prompts]:
        clock, ids = Clock(), torch.tensor(prompts)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return gaps(clock.times), found[:, ids.shape[1] :].tolist()

    return run


def with_minisrv(engine: EngineCore) -> Run:
    """Return a function that runs steps of the engine; all prompts are computed in the first
    step."""
    params = {"temperature": 0.0, "ignore_eos": True}

    def run(prompts: Prompts, tokens: int) -> tuple[list[float], Prompts]:
        for index, prompt in enumerate(prompts):
            given = SamplingParams(max_tokens=tokens, **params)  # type: ignore[arg-type]
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=given))
        found: Prompts = [[] for _ in prompts]
        times = []
        while engine.has_work:
            for output in engine.step():
                found[int(output.request_id)] += output.token_ids
            times.append(time.perf_counter())
        assert len(times) == tokens, "one prefill, then only decode"
        return gaps(times), found

    return run


def gaps(times: list[float]) -> list[float]:
    """Return the milliseconds between neighbouring times, which are in seconds."""
    return [1000 * (b - a) for a, b in pairwise(times)]


def compare(theirs: Run, ours: Run, prompts: list[Prompts], tokens: int) -> dict[str, Any]:
    """Run both by turns, after one run of each that is not counted.

    theirs, ours: the functions of transformers and of minisrv.
    prompts: the prompts of each round.
    tokens: number of tokens to generate for each prompt.
    """
    for run in (theirs, ours):
        run(prompts[0], tokens)
    blocks: dict[str, list[float]] = {"transformers": [], "minisrv": []}
    ratios, same, total = [], 0, 0
    for batch in prompts:
        found = {}
        for name, run in (("transformers", theirs), ("minisrv", ours), ("minisrv", ours),
                          ("transformers", theirs)):  # fmt: skip
            steps, found[name] = run(batch, tokens)
            blocks[name].append(median(steps))
        ratios.append(mean(blocks["transformers"][-2:]) / mean(blocks["minisrv"][-2:]))
        for a, b in zip(found["transformers"], found["minisrv"], strict=True):
            same += sum(x == y for x, y in zip(a, b, strict=True))
            total += len(a)
    return {
        "batch": len(prompts[0]),
        "ms": {name: median(times) for name, times in blocks.items()},
        "transformers_over_minisrv": [median(ratios), min(ratios), max(ratios)],
        "same_tokens": same / total,
        "blocks_ms": blocks,
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="directory or hub id (default: the default model)")
    parser.add_argument("--batch", default="1,16", help="sizes, separated by commas (1,16)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both (1)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of four runs (5)")
    parser.add_argument("--engine-flags", default="", help="more flags for minisrv's engine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    where = environment("transformers")
    sizes = [int(size) for size in options.batch.split(",")]
    directory = resolve_checkpoint(options.model)
    config = engine_config(
        [
            str(directory),
            *("--cudagraph-capture", "whole"),
            *("--dtype", options.dtype, "--max-num-seqs", str(max(sizes))),
            *("--max-num-batched-tokens", str(max(sizes) * options.context)),
            *shlex.split(options.engine_flags),
        ]
    )
    engine = EngineCore(build_engine(config))
    ours = with_minisrv(engine)
    theirs = with_transformers(directory, getattr(torch, options.dtype))

    draw = random.Random(0)
    results = []
    for size in sizes:
        rounds = [
            [draw.choices(range(engine.info.vocab_size), k=options.context) for _ in range(size)]
            for _ in range(options.rounds)
        ]
        results.append(compare(theirs, ours, rounds, options.tokens))

    table = Table("batch", "transformers ms", "minisrv ms", "ratio", "same tokens", box=None)
    for result in results:
        ms, (middle, least, most) = result["ms"], result["transformers_over_minisrv"]
        table.add_row(
            str(result["batch"]),
            *(f"{ms[name]:.2f}" for name in ("transformers", "minisrv")),
            f"{middle:.2f} {least:.2f}-{most:.2f}",
            f"{result['same_tokens']:.2%}",
        )
    console = Console(highlight=False, soft_wrap=True)
    simulated = engine.info.simulated_launch_us
    if simulated:
        console.print(f"SIMULATED: every launch of minisrv takes {simulated:g} us longer")
    console.print(
        f"{options.dtype}, threads: {options.threads}, {options.context} tokens of prompt, "
        f"{options.tokens} generated; ms: median over runs of the median step; "
        "ratio: transformers over minisrv, median over rounds, least-greatest"
    )
    console.print(table)
    if options.json is not None:
        report = {
            "environment": where,
            "options": vars(options),
            "engine": engine.info,
            "simulated_launch_us": simulated,
            "results": results,
        }
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Runs the closed loop of `loadgen run` in process: the engine's throughput without HTTP.

    python benchmarks/in_process.py MODEL --concurrency 1,64,256 --requests 768 --json F \
        --engine-flags "--load-format dummy --max-num-seqs 256 --max-model-len 2048"

The given number of requests is open at any time, and each is replaced when it ends; their prompts
are random and share no prefix. As in the figures of loadgen, the time includes prefills: tokens per
second over HTTP, divided by tokens per second here, is the share that HTTP leaves of the engine's
throughput.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment


def run(
    engine: EngineCore,
    draw: random.Random,
    *,
    concurrency: int,
    requests: int,
    input_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """Serve `requests` requests, `concurrency` of them at a time.

    Returns generated tokens per second from the first request to the last token, and the part of
    the time in which the GPU had nothing to do while requests were open (0 on a CPU).
    """
    vocab = range(engine.info.vocab_size)
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    waiting = iter(
        [
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=draw.choices(vocab, k=input_tokens),
                params=params,
            )
            for number in range(requests)
        ]
    )
    before = engine.stats()
    began = time.perf_counter()
    for request in islice(waiting, concurrency):
        engine.add(request)
    while engine.has_work:
        ended = sum(output.finish_reason is not None for output in engine.step())
        for request in islice(waiting, ended):
            engine.add(request)
        engine.advance_background()
    seconds = time.perf_counter() - began
    after = engine.stats()
    tokens = after.generated_tokens - before.generated_tokens
    assert tokens == requests * output_tokens
    idle = after.gpu_idle_ms - before.gpu_idle_ms
    return {
        "concurrency": concurrency,
        "requests": requests,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "cached_tokens": after.prefix_cache_hits - before.prefix_cache_hits,
        "gpu_idle_share": idle / 1e3 / seconds,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--concurrency", default="1,64,256", help="separated by commas")
    parser.add_argument("--requests", type=int, default=768, help="at each, but 24 at 1")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    engine = EngineCore(
        build_engine(
            engine_config(
                ["--cudagraph-capture", "whole", options.model, *shlex.split(options.engine_flags)]
            )
        )
    )
    draw = random.Random(0)
    lengths = {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
    results = []
    for concurrency in map(int, options.concurrency.split(",")):
        requests = options.requests if concurrency > 1 else min(options.requests, 24)
        for number in min(requests, 2 * concurrency), requests:  # the first run is a warm-up
            found = run(engine, draw, concurrency=concurrency, requests=number, **lengths)
        results.append(found)
    table = Table("concurrency", "requests", "tok/s", "GPU idle", box=None)
    for row in results:
        table.add_row(
            str(row["concurrency"]),
            str(row["requests"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['gpu_idle_share']:.1%}",
        )
    Console(highlight=False, soft_wrap=True).print(table)
    if options.json is not None:
        report = {"environment": environment("torch"), "options": vars(options), "runs": results}
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

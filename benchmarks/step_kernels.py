"""Lists the kernels of a decode step on a GPU, with the time that each takes.

    python benchmarks/step_kernels.py benchmarks/configs/qwen3-0.6b --batch 1,8,32 --context 128 \
        --engine-flags "--load-format dummy --max-num-seqs 32 --max-model-len 2048" --json F

With programmatic dependent launch, a kernel begins before the previous one has ended. So the time
of a kernel is counted from the end of the previous kernel to its own end, and includes waiting and
gaps. The steps are those of an engine in steady decode, in which contexts grow by one token per
step; halfway through the measured steps they have the given length.

The time of a step is modelled as bytes / bandwidth + kernels * boundary, where bytes are those of
the weights and the KV cache, bandwidth is that of a large copy, and boundary is what each kernel
costs beyond that. The model is solved for the boundary, which is reported in microseconds.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from minisrv.cli import engine_config
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.bench.measure import copy_bandwidth
from minisrv.tools.environment import environment

WARM_UP = 4
STEPS = 12
FIRST = "_gather"
"""Beginning of the name of the kernel with which a decode step begins."""


def kernels_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the kernels of a profiler's trace in the order of their ends, without the first. `us`
    of a kernel are the microseconds since the end of the kernel before it."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    found = sorted(
        (
            {
                "name": event["name"],
                "grid": tuple(event["args"]["grid"]),
                "end": event["ts"] + event["dur"],
            }
            for event in events
        ),
        key=lambda kernel: kernel["end"],
    )
    for before, kernel in pairwise(found):
        kernel["us"] = kernel["end"] - before["end"]
    return found[1:]


def steps_of(kernels: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the kernels of each complete step among `kernels`, without the step's first kernel."""
    begins = [at for at, kernel in enumerate(kernels) if kernel["name"].startswith(FIRST)]
    return [kernels[begin + 1 : end] for begin, end in pairwise(begins)]


def measure(engine: EngineCore, batch: int, context: int, bandwidth_gb_s: float) -> dict[str, Any]:
    """Measure decode steps of `batch` requests, whose contexts are about `context` tokens long.

    bandwidth_gb_s: bandwidth of the GPU's memory, as a large copy reaches it.
    """
    draw, vocab = random.Random(batch), engine.info.vocab_size
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    names = [f"{batch}-{index}" for index in range(batch)]
    fresh = set(names)
    for name in names:
        prompt = draw.choices(range(vocab), k=context - WARM_UP - STEPS // 2)
        engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
    while fresh:
        fresh -= {output.request_id for output in engine.step()}
    for _ in range(WARM_UP):
        engine.step()
    before = engine.stats()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    for _ in range(STEPS):
        engine.step()
    after = engine.stats()
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    with TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(path))
        steps = steps_of(kernels_of(json.loads(path.read_text())))
    groups: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    for step in steps:
        for kernel in step:
            groups[kernel["name"], kernel["grid"]].append(kernel["us"])
    launches = median(len(step) for step in steps)
    entry = sum(layer[0, 0].nbytes for layer in engine.runner.kv_caches)
    nbytes = engine.runner.model.bytes_read + batch * context * entry
    step_us = median(sum(kernel["us"] for kernel in step) for step in steps)
    floor_us = nbytes / bandwidth_gb_s / 1e3
    return {
        "batch": batch,
        "context": context,
        "step_us": step_us,
        "gpu_us": 1e3 * (after.gpu_busy_ms - before.gpu_busy_ms) / (2 * STEPS),
        "launches": launches,
        "bytes": nbytes,
        "floor_us": floor_us,
        "boundary_us": (step_us - floor_us) / launches,
        "kernels": [
            {
                "name": name,
                "grid": list(grid),
                "launches": len(times) / len(steps),
                "us": median(times),
                "us_a_step": sum(times) / len(steps),
            }
            for (name, grid), times in groups.items()
        ],
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the table of one batch size."""
    title = (
        f"batch {found['batch']}, context {found['context']}: {found['step_us']:.0f} us in "
        f"{found['launches']:.0f} kernels, floor {found['floor_us']:.0f}, "
        f"boundary {found['boundary_us']:.2f}"
    )
    table = Table("kernel", "grid", "launches", "us each", "us a step", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for kernel in sorted(found["kernels"], key=lambda kernel: -kernel["us_a_step"]):
        table.add_row(
            kernel["name"][:48],
            "x".join(map(str, kernel["grid"])),
            f"{kernel['launches']:.0f}",
            f"{kernel['us']:.2f}",
            f"{kernel['us_a_step']:.1f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--engine-flags", default="")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    engine = EngineCore(
        build_engine(
            engine_config(
                ["--cudagraph-capture", "whole", options.model, *shlex.split(options.engine_flags)]
            )
        )
    )
    bandwidth = copy_bandwidth(engine.runner.buffers.device)
    console = Console()
    batches = []
    for batch in map(int, options.batch.split(",")):
        batches.append(measure(engine, batch, options.context, bandwidth))
        show(batches[-1], console)
    if options.json is not None:
        report = {
            "environment": msgspec.to_builtins(environment()),
            "model": options.model,
            "engine_flags": options.engine_flags,
            "bandwidth_gb_s": bandwidth,
            "batches": batches,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

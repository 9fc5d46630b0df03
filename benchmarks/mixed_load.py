"""Measures ITL and TTFT of streams while long prompts keep arriving, by chunk size and mode.

    python benchmarks/mixed_load.py MODEL --chunks 128,256,512,1024,2048 --json F --plot F.svg \
        --engine-flags "--load-format dummy --max-model-len 4096"

This runs in one process, without HTTP. Some streams decode, and prompts arrive one after another,
the next when the last one has its first token, so that every step except the last of a prompt is a
full chunk. The chunk size is `--max-num-batched-tokens`, which includes the tokens of the streams.
PIECEWISE has graphs up to the chunk size; FULL (`--cudagraph-mode full`, on a GPU) runs the model
of such a step in one graph; eager mixed steps are those of `--cudagraph-mode full-decode-only`.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shlex
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.clients.needs import needs
from minisrv.cli import engine_config
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, SamplingParams
from minisrv.tools.environment import environment

MODES = {
    "FULL": CUDAGraphMode.FULL,
    "PIECEWISE": CUDAGraphMode.FULL_AND_PIECEWISE,
    "eager": CUDAGraphMode.FULL_DECODE_ONLY,
}
"""The graph modes by the way in which mixed steps run; pure decode steps run as FULL graphs in all
of them."""


@dataclass(frozen=True)
class Load:
    """The load: the number of streams that decode, the number of prompts that arrive, and the
    number of tokens in each prompt."""

    streams: int
    prompts: int
    prompt_tokens: int


def configure(config: EngineConfig, mode: str, chunk: int) -> EngineConfig:
    """Return the settings for one mode and chunk size. Capture sizes are the powers of two up to
    the chunk size, and the chunk size."""
    sizes = {2**n for n in range(chunk.bit_length())} | {chunk}
    return replace(
        config,
        cudagraph_mode=MODES[mode],
        max_num_batched_tokens=chunk,
        itl_target_ms=0.0,
        max_num_seqs=min(config.max_num_seqs, chunk),
        cudagraph_capture_sizes=tuple(sorted(sizes)),
        enable_prefix_caching=False,
    )


def run(engine: EngineCore, load: Load) -> dict[str, Any]:
    """Run a load, and return its results: latencies in ms, `tokens_per_s` of prompts and streams
    together, and the number of steps by mode and reason, all while prompts were arriving."""
    draw = random.Random(0)
    vocab = engine.info.vocab_size

    def add(name: str, length: int, max_tokens: int) -> None:
        engine.add(
            EngineRequest(
                request_id=name,
                prompt_token_ids=draw.choices(range(vocab), k=length),
                params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            )
        )

    times: dict[str, list[float]] = {f"stream {n}": [] for n in range(load.streams)}
    longest = engine.info.max_model_len - 128
    for name in times:
        add(name, 128, longest)
    while not all(len(seen) >= 16 for seen in times.values()):
        for output in engine.step():
            times[output.request_id].append(time.perf_counter())
    for seen in times.values():
        del seen[:-1]
    before = engine.stats()
    first = time.perf_counter()
    ttft: list[float] = []
    for number in range(load.prompts):
        name, asked = f"prompt {number}", time.perf_counter()
        add(name, load.prompt_tokens, 1)
        arrived = False
        while not arrived:
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.request_id == name:
                    ttft.append(now - asked)
                    arrived = True
                else:
                    if output.finish_reason is not None:
                        raise SystemExit("a stream has ended; let --max-model-len be larger.")
                    times[output.request_id].append(now)
    seconds = time.perf_counter() - first
    for name in times:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    gaps = [1e3 * (b - a) for seen in times.values() for a, b in pairwise(seen)]
    tokens = load.prompts * load.prompt_tokens + len(gaps)
    counted = {(step.mode, step.reason): step.steps for step in before.steps}
    return {
        "itl_ms": _percentiles(gaps),
        "ttft_ms": _percentiles([1e3 * value for value in ttft]),
        "tokens_per_s": tokens / seconds,
        "steps": {
            f"{step.mode}/{step.reason}": step.steps - counted.get((step.mode, step.reason), 0)
            for step in engine.stats().steps
        },
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    found = np.percentile(values, [50, 99, 100])
    return dict(zip(("p50", "p99", "max"), (round(float(v), 3) for v in found), strict=True))


def save_plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot ITL and TTFT by chunk size, with a line for each mode."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    lines = (("itl_ms", "p50", "-"), ("itl_ms", "p99", "--")), (("ttft_ms", "p50", "-"),)
    for panel, kinds, name in zip(panels, lines, ("ITL", "TTFT"), strict=True):
        for color, mode in enumerate(MODES):
            rows = [row for row in results if row["mode"] == mode]
            for key, share, style in kinds:
                panel.plot(
                    [row["chunk"] for row in rows],
                    [row[key][share] for row in rows],
                    style,
                    marker="o",
                    color=f"C{color}",
                    label=f"{mode} {share}",
                )
        panel.set(xscale="log", yscale="log", xlabel="tokens in a step", ylabel=f"{name}, ms")
        panel.set_xticks(ticks := sorted({row["chunk"] for row in results}), map(str, ticks))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--modes", default="PIECEWISE,eager", help=f"of {', '.join(MODES)}")
    parser.add_argument("--chunks", default="128,256,512,1024,2048", help="tokens in a step")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--engine-flags", default="", help="as minisrv serve takes them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    options = parser.parse_args(argv)
    if options.plot is not None:
        with needs("pip install matplotlib"):
            import matplotlib  # noqa: F401  (fails here, before anything is measured)
    config = engine_config(
        ["--cudagraph-capture", "whole", options.model, *shlex.split(options.engine_flags)]
    )
    load = Load(options.streams, options.prompts, options.prompt_tokens)
    results = []
    for chunk in map(int, options.chunks.split(",")):
        for mode in options.modes.split(","):
            print(f"{mode}, {chunk} tokens in a step", file=sys.stderr, flush=True)
            engine = EngineCore(build_engine(configure(config, mode, chunk)))
            run(engine, replace(load, prompts=2))  # loads the kernels for these shapes
            results.append({"mode": mode, "chunk": chunk, **run(engine, load)})
            device = engine.info.device
            del engine
            gc.collect()
    table = Table("mixed steps", "chunk", "ITL p50", "p99", "TTFT p50", "tok/s", box=None)
    for row in results:
        table.add_row(
            row["mode"],
            str(row["chunk"]),
            *(f"{row['itl_ms'][share]:.2f}" for share in ("p50", "p99")),
            f"{row['ttft_ms']['p50']:.1f}",
            f"{row['tokens_per_s']:.0f}",
        )
    title = (
        f"{Path(options.model).name}, {device}: {load.streams} streams decode while prompts of "
        f"{load.prompt_tokens} tokens arrive"
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(title)
    console.print(table)
    if options.json is not None:
        report = {"environment": environment("torch"), "options": vars(options), "runs": results}
        text = json.dumps(msgspec.to_builtins(report, enc_hook=str), indent=1)
        options.json.write_text(text + "\n")
    if options.plot is not None:
        save_plot(results, options.plot, title)


if __name__ == "__main__":
    main()

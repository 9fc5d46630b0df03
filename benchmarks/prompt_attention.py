"""Measures the attention of prompts, beside torch's own.

    python -m benchmarks.prompt_attention benchmarks/configs/qwen3-0.6b --json F

A step is so many prompts, or chunks of prompts, of equal length behind a history of equal length.
TFLOP/s counts the products of queries with the keys that they see, and with their values. `op` is
the whole attention op, which also norms and rotates, writes the cache and reads it by blocks;
`alone` is its kernel for tiles of queries; `triton` is that kernel on GPUs for which there is no
other. torch's scaled_dot_product_attention gets contiguous K and V. It is the faster of its two
kernels for the purpose, cuDNN's and FlashAttention, with one exception: behind a history torch
gives a causal mask to FlashAttention only, so there cuDNN is timed without a mask and its TFLOP/s
count the products that it computes.

All are captured as CUDA graphs which are replayed by turns, so that a GPU that slows down under
load slows down all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from minisrv.checkpoint import describe_model
from minisrv.kernels import AttentionLayer, AttentionMetadata, attention
from minisrv.model_config import ModelConfig
from minisrv.nn.rope import cos_sin_table
from minisrv.tools.environment import environment

STEPS = "1x2048,1x8192,4x2048,1x512+2048,1x512+8192,1x512+30720"
STEPS += ",1x2048+2048,1x2048+8192,1x2048+30720"
BLOCK_SIZE = 16
SETS = 3
"""Number of caches that launches take by turns, as the layers of a model do."""

LAUNCHES, REPLAYS = 6, 10


class Step(NamedTuple):
    """A step of `rows` rows with `tokens` tokens each behind `history` tokens."""

    rows: int
    tokens: int
    history: int

    @classmethod
    def parse(cls, text: str) -> Step:
        rows, _, rest = text.partition("x")
        tokens, _, history = rest.partition("+")
        return cls(int(rows), int(tokens), int(history or 0))

    def flops(self, model: ModelConfig, masked: bool = True) -> float:
        """Return the operations of the products, with the keys that the queries see or with all."""
        length = self.history + self.tokens
        seen = self.tokens * length
        if masked:
            seen -= self.tokens * (self.tokens - 1) // 2
        return 4.0 * self.rows * seen * model.num_heads * model.head_dim


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


class Prompts:
    """The arguments of attention for a step."""

    def __init__(self, model: ModelConfig, step: Step) -> None:
        length = step.history + step.tokens
        each = -(-length // BLOCK_SIZE)
        blocks = torch.randperm(step.rows * each, device="cuda").to(torch.int32) + 1
        table = blocks.view(step.rows, each)
        places = torch.arange(step.history, length, device="cuda")
        slots = table[:, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
        starts = torch.arange(step.rows + 1, dtype=torch.int32, device="cuda") * step.tokens
        self.metadata = AttentionMetadata(
            slot_mapping=slots.flatten(),
            block_table=table,
            seq_lens=torch.full((step.rows,), length, dtype=torch.int32, device="cuda"),
            query_start_loc=starts,
            max_query_len=step.tokens,
        )
        self.positions = places.repeat(step.rows)
        norm = draw(model.head_dim) if model.qk_norm else None
        shape = (step.rows * each + 1, BLOCK_SIZE, 2, model.num_kv_heads, model.head_dim)
        self.layer = AttentionLayer(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            scale=model.head_dim**-0.5,
            q_norm=norm,
            k_norm=norm,
            eps=model.rms_norm_eps,
            cos_sin=cos_sin_table(model.rope, model.head_dim, length, torch.bfloat16).cuda(),
            kv_cache=draw(*shape),
        )
        tokens = step.rows * step.tokens
        self.qkv, self.out = draw(tokens, model.qkv_size), draw(tokens, model.q_size)
        group = model.num_heads // model.num_kv_heads
        self.queries = draw(model.num_kv_heads, tokens, group, model.head_dim)
        self.next_tile = torch.zeros(LAUNCHES, 4, dtype=torch.int32, device="cuda")

    def op(self, _: int) -> None:
        attention(self.layer, self.qkv, self.positions, self.metadata, self.out)

    def alone(self, launch: int) -> None:
        from minisrv.kernels import gluon_attention

        if launch < SETS:  # The first launch of a graph with these counters.
            self.next_tile.zero_()
        gluon_attention.attend(
            self.layer, self.queries, self.metadata, self.next_tile[launch], 1.0, 1, self.out
        )


def captured(launches: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph


def by_turns(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Return the median microseconds of a launch in each graph."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(REPLAYS + 1):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay:
                times[name].append(1e3 * begin.elapsed_time(end) / LAUNCHES)
    return {name: median(found) for name, found in times.items()}


def library(model: ModelConfig, step: Step) -> dict[str, list[Callable[[], object]]]:
    """Return the launches of torch's own kernels."""
    length = step.history + step.tokens
    kv = (step.rows, model.num_kv_heads, length, model.head_dim)
    tensors = [
        (draw(step.rows, model.num_heads, step.tokens, model.head_dim), draw(*kv), draw(*kv))
        for _ in range(SETS)
    ]
    masks: dict[str, dict[str, Any]] = {
        "cudnn": {"is_causal": step.history == 0},
        "flash": {"attn_mask": causal_lower_right(step.tokens, length)},
    }
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def launch(name: str, at: int) -> None:
        with sdpa_kernel([backends[name]]):
            scaled_dot_product_attention(*tensors[at % SETS], **masks[name], enable_gqa=True)

    return {name: [partial(launch, name, at) for at in range(LAUNCHES)] for name in masks}


def host_us(sets: list[Prompts]) -> float:
    """Return the median microseconds that the host takes to launch the op."""
    times = []
    for _ in range(REPLAYS):
        for one in sets:
            begin = perf_counter()
            one.op(0)
            times.append(1e6 * (perf_counter() - begin))
        torch.cuda.synchronize()
    return median(times)


@contextmanager
def triton_only() -> Iterator[None]:
    """Have Triton's kernel attend, as on GPUs for which there is no other."""
    from minisrv.kernels import gluon_attention

    supports = gluon_attention.supports
    gluon_attention.supports = lambda *_: False
    try:
        yield
    finally:
        gluon_attention.supports = supports


def measure(model: ModelConfig, step: Step) -> dict[str, Any]:
    """Measure the microseconds of each kernel, and those of the host for the op."""
    sets = [Prompts(model, step) for _ in range(SETS)]
    ops = [partial(sets[at % SETS].op, at) for at in range(LAUNCHES)]
    graphs, host = {"op": captured(ops)}, {"op": host_us(sets)}
    graphs["alone"] = captured([partial(sets[at % SETS].alone, at) for at in range(LAUNCHES)])
    with triton_only():
        graphs["triton"], host["triton"] = captured(ops), host_us(sets)
    for name, launches in library(model, step).items():
        with suppress(RuntimeError):  # torch has not got the kernel for every GPU.
            graphs[name] = captured(launches)
    flops = dict.fromkeys(graphs, step.flops(model))
    if step.history:
        flops["cudnn"] = step.flops(model, masked=False)
    us = by_turns(graphs)
    rates = {name: flops[name] / us[name] / 1e6 for name in us}
    return {"step": step._asdict(), "us": us, "tflop_s": rates, "host_us": host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--steps", default=STEPS, help=f"ROWSxTOKENS[+HISTORY],... ({STEPS})")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    if torch.cuda.get_device_capability()[0] != 9:
        parser.error("needs a Hopper GPU; on others there is nothing to compare")
    model = describe_model(options.model).model
    names = ("op", "alone", "triton", "cudnn", "flash")
    table = Table("step", *(f"{name}, us (TFLOP/s)" for name in names), "alone / torch", "host, us")
    results = []
    for text in options.steps.split(","):
        results.append(found := measure(model, Step.parse(text)))
        us, rates = found["us"], found["tflop_s"]
        cells = [f"{us[name]:.0f} ({rates[name]:.0f})" if name in us else "" for name in names]
        best = max((rates[name] for name in ("cudnn", "flash") if name in rates), default=None)
        share = f"{rates['alone'] / best:.0%}" if best else ""
        table.add_row(
            text, *cells, share, " / ".join(f"{one:.0f}" for one in found["host_us"].values())
        )
        torch.cuda.empty_cache()
    Console(width=160).print(table)
    if options.json is not None:
        report = {
            "environment": msgspec.to_builtins(environment()),
            "model": options.model.name,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

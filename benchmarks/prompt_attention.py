"""Measures the attention of prompts, beside torch's own.

    python -m benchmarks.prompt_attention benchmarks/configs/qwen3-0.6b --json F

A step is so many prompts, or chunks of prompts, of equal length behind a history of equal length.
TFLOP/s counts the products of queries with the keys that they see, and with their values. `op` is
the whole attention op, which also norms and rotates, writes the cache and reads it by blocks;
`alone` is its kernel for tiles of queries; `triton` is the op as it is on GPUs for which there is
no other kernel than Triton's. torch's scaled_dot_product_attention gets contiguous K and V. It is
the faster of its two kernels for the purpose, cuDNN's and FlashAttention, with one exception:
behind a history torch gives a causal mask to FlashAttention only, so there cuDNN is timed without a
mask and its TFLOP/s count the products that it computes.

A step "1x512+2048@8x3584" has 8 more rows, which decode with a context of 3,584 tokens each, and
empty rows beside them, as many as make 128, as in a graph for any batch of 128 requests. Of such a
step only the op is timed, and TFLOP/s counts its prompts alone.

All are captured as CUDA graphs which are replayed by turns, so that a GPU that slows down under
load slows down all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
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
STEPS += ",1x2048+2048,1x2048+8192,1x2048+30720,1x512+2048@8x3584,1x2048+2048@32x3584"
BLOCK_SIZE = 16
SETS = 3
"""Number of caches that launches take by turns, as the layers of a model do."""

LAUNCHES, REPLAYS = 6, 10
GRAPH_ROWS = 128
"""Number of rows of a step in which some rows decode, with the empty ones."""


class Step(NamedTuple):
    """A step of `rows` rows with `tokens` tokens each behind `history` tokens, beside `decodes`
    rows with one token each, which see `context` tokens."""

    rows: int
    tokens: int
    history: int

    decodes: int = 0
    context: int = 0

    @classmethod
    def parse(cls, text: str) -> Step:
        prompts, _, decodes = text.partition("@")
        rows, _, rest = prompts.partition("x")
        tokens, _, history = rest.partition("+")
        beside = map(int, decodes.split("x")) if decodes else ()
        return cls(int(rows), int(tokens), int(history or 0), *beside)

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
        # Decode rows come first, as in the scheduler's steps.
        lengths = [step.context] * step.decodes + [step.history + step.tokens] * step.rows
        counts = [1] * step.decodes + [step.tokens] * step.rows
        empty = max(0, GRAPH_ROWS - len(counts)) if step.decodes else 0
        longest = max(lengths)
        each = -(-longest // BLOCK_SIZE)
        blocks = torch.randperm(len(lengths) * each, device="cuda").to(torch.int32) + 1
        table = blocks.view(len(lengths), each)
        places = [
            torch.arange(length - count, length, device="cuda")
            for length, count in zip(lengths, counts, strict=True)
        ]
        slots = [
            row[at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE
            for row, at in zip(table, places, strict=True)
        ]
        ends = torch.tensor([0, *accumulate(counts), *[sum(counts)] * empty], dtype=torch.int32)
        self.metadata = AttentionMetadata(
            slot_mapping=torch.cat(slots),
            block_table=torch.cat((table, table.new_zeros(empty, each))),
            seq_lens=torch.tensor([*lengths, *[0] * empty], dtype=torch.int32, device="cuda"),
            query_start_loc=ends.cuda(),
            max_query_len=step.tokens,
        )
        self.positions = torch.cat(places)
        norm = draw(model.head_dim) if model.qk_norm else None
        shape = (len(lengths) * each + 1, BLOCK_SIZE, 2, model.num_kv_heads, model.head_dim)
        self.layer = AttentionLayer(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            scale=model.head_dim**-0.5,
            q_norm=norm,
            k_norm=norm,
            eps=model.rms_norm_eps,
            cos_sin=cos_sin_table(model.rope, model.head_dim, longest, torch.bfloat16).cuda(),
            kv_cache=draw(*shape),
        )
        tokens = sum(counts)
        self.qkv, self.out = draw(tokens, model.qkv_size), draw(tokens, model.q_size)
        group = model.num_heads // model.num_kv_heads
        self.queries = draw(model.num_kv_heads, tokens, group, model.head_dim)

    def op(self, _: int) -> None:
        attention(self.layer, self.qkv, self.positions, self.metadata, self.out)

    def alone(self, launch: int) -> None:
        from minisrv.kernels import gluon_attention
        from minisrv.kernels.triton_ragged import END_ROW, END_TILE, SURVEY, num_tiles

        if launch < SETS:  # The first launch of a graph with these surveys.
            rows, tokens = len(self.metadata.seq_lens), len(self.positions)
            block_q = gluon_attention.block_q(self.layer, tokens, self.qkv.device)
            self.surveys = torch.zeros(LAUNCHES, SURVEY, dtype=torch.int32, device="cuda")
            self.surveys[:, END_ROW.value] = rows
            self.surveys[:, END_TILE.value] = num_tiles(tokens, rows, block_q)
        gluon_attention.attend(
            self.layer, self.queries, self.metadata, self.surveys[launch], 1.0, 1, self.out
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
    with triton_only():
        graphs["triton"], host["triton"] = captured(ops), host_us(sets)
    others = {} if step.decodes else library(model, step)
    if not step.decodes:
        graphs["alone"] = captured([partial(sets[at % SETS].alone, at) for at in range(LAUNCHES)])
    for name, launches in others.items():
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

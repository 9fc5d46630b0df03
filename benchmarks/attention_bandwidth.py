"""Measures how fast the attention of a decode step reads its KV cache, by batch and context.

    python -m benchmarks.attention_bandwidth benchmarks/configs/qwen3-0.6b \
        --batch 8,32,64,256 --context 128,1024,8192 --json F --plot F.svg

One CUDA graph contains the attention of so many layers that the GPU's caches cannot hold data
from one replay to the next; the time of a layer is that of the graph divided by the number of
layers. GB/s counts the bytes of K and V of all contexts. It is compared with the bytes that a large
copy reads and writes per second, and the time with that of torch's scaled_dot_product_attention,
which does less: its K and V are contiguous, without blocks, and it neither applies norms and rotary
embeddings nor writes to the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.clients.needs import needs
from benchmarks.layers import Paged, median_us
from minisrv.checkpoint import describe_model
from minisrv.kernels import AttentionLayer, AttentionMetadata, attention
from minisrv.model_config import ModelConfig
from minisrv.nn.rope import cos_sin_table
from minisrv.tools.bench.measure import copy_bandwidth
from minisrv.tools.environment import environment

LARGE = 400 << 20
"""Number of bytes that is more than any cache of a GPU holds."""


def time_of(run: Callable[[], object]) -> float:
    """Capture `run` in a graph, and return the microseconds of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_us(graph.replay)


def library_us(model: ModelConfig, batch: int, context: int, layers: int) -> float:
    """Return the microseconds of one layer's attention by torch's own op."""

    def draw(heads: int, length: int) -> torch.Tensor:
        shape = (batch, heads, length, model.head_dim)
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    q, heads = draw(model.num_heads, 1), model.num_kv_heads
    entries = [(draw(heads, context), draw(heads, context)) for _ in range(layers)]

    def run() -> None:
        for k, v in entries:
            scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return time_of(run) / layers


def measure(model: ModelConfig, batch: int, context: int) -> dict[str, Any]:
    """Measure the microseconds and GB/s of one layer's attention."""
    nbytes = 2 * batch * context * 2 * model.kv_size
    layers = max(2, LARGE // nbytes + 1)
    library = library_us(model, batch, context, layers)
    torch.cuda.empty_cache()
    paged = Paged(batch, context)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    qkv, out = draw(batch, model.qkv_size), draw(batch, model.q_size)
    angles = cos_sin_table(model.rope, model.head_dim, context, torch.bfloat16).cuda()
    norm = draw(model.head_dim) if model.qk_norm else None
    metadata = AttentionMetadata(
        slot_mapping=paged.slots,
        block_table=paged.table,
        seq_lens=paged.lengths,
        query_start_loc=paged.starts,
        max_query_len=1,
    )
    described = [
        AttentionLayer(
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            scale=model.head_dim**-0.5,
            q_norm=norm,
            k_norm=norm,
            eps=model.rms_norm_eps,
            cos_sin=angles,
            kv_cache=paged.cache(model),
        )
        for _ in range(layers)
    ]

    def run() -> None:
        for layer in described:
            attention(layer, qkv, paged.positions, metadata, out)

    us = time_of(run) / layers
    return {
        "batch": batch,
        "context": context,
        "us": us,
        "gb_s": nbytes / us / 1e3,
        "torch_us": library,
    }


def draw_plot(path: Path, title: str, results: list[dict[str, Any]], copy_gb_s: float) -> None:
    """Plot GB/s by context, with a line for each batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for batch in sorted({result["batch"] for result in results}):
        line = [result for result in results if result["batch"] == batch]
        contexts = [result["context"] for result in line]
        axes.plot(contexts, [result["gb_s"] for result in line], "o-", label=f"batch {batch}")
    axes.axhline(copy_gb_s, color="black", linestyle=":", label="a large copy")
    axes.axhline(0.8 * copy_gb_s, color="grey", linestyle=":", label="80% of it")
    axes.set(xscale="log", xlabel="tokens of context", ylabel="GB/s of K and V", title=title)
    axes.set_ylim(0)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with a config.json")
    parser.add_argument("--batch", default="8,32,64,256")
    parser.add_argument("--context", default="128,1024,8192")
    parser.add_argument("--most-gib", type=float, default=12, help="of K and V in a layer (12)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and torch finds none")
    if options.plot is not None:
        with needs("pip install matplotlib"):
            import matplotlib  # noqa: F401  (before anything is measured)
    model, copy_gb_s = describe_model(options.model).model, copy_bandwidth(torch.device("cuda"))
    table = Table("batch", "context", "us a layer", "GB/s", "of a copy", "torch, us")
    results = []
    for batch in map(int, options.batch.split(",")):
        for context in map(int, options.context.split(",")):
            if 4 * batch * context * model.kv_size > options.most_gib * 2**30:
                continue
            results.append(found := measure(model, batch, context))
            share = f"{found['gb_s'] / copy_gb_s:.0%}"
            row = (batch, context, f"{found['us']:.1f}", f"{found['gb_s']:.0f}", share)
            table.add_row(*map(str, row), f"{found['torch_us']:.1f}")
            torch.cuda.empty_cache()
    Console().print(table)
    if options.plot is not None:
        draw_plot(options.plot, options.model.name, results, copy_gb_s)
    if options.json is not None:
        report = {
            "environment": msgspec.to_builtins(environment()),
            "model": options.model.name,
            "copy_gb_s": copy_gb_s,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

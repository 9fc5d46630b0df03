"""A decoder's layers by one CUDA graph, without an engine: what kernels are compared in.

`Layers` is a model of random weights with a KV cache of random entries; `capture` records its
forward pass and output projection for a decode batch of one context. Kernels that are timed alone,
over and over, look better than they are: here each is behind the one that it is behind in a step,
and reads weights that nobody has read since the step before.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from minisrv.checkpoint import describe_model
from minisrv.graph.forward_context import AttentionMetadata, ForwardContext, set_forward_context
from minisrv.model_config import ModelConfig
from minisrv.modes import BatchDescriptor, CUDAGraphMode
from minisrv.nn.loader import load_model

BLOCK_SIZE = 16
WARM_UP = 3
REPLAYS = 10


def median_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay on the GPU."""
    times = []
    for replay in range(WARM_UP + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= WARM_UP:
            times.append(1e3 * begin.elapsed_time(end))
    return median(times)


class Paged:
    """Block table, lengths and positions of `rows` requests with `context` tokens each, in blocks
    that lie anywhere."""

    def __init__(self, rows: int, context: int) -> None:
        device = "cuda"
        each = -(-context // BLOCK_SIZE)
        self.num_blocks = rows * each + 1
        blocks = torch.randperm(rows * each, device=device).to(torch.int32) + 1
        self.table = torch.zeros(rows, max(each, 128), dtype=torch.int32, device=device)
        self.table[:, :each] = blocks.view(rows, each)
        self.positions = torch.full((rows,), context - 1, device=device)
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        last = self.table[:, (context - 1) // BLOCK_SIZE].long()
        self.slots = last * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def cache(self, config: ModelConfig) -> Tensor:
        """One layer's, of random entries."""
        shape = (self.num_blocks, BLOCK_SIZE, 2, config.num_kv_heads, config.head_dim)
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.table.device)


class Layers:
    """A model, bfloat16, of the config in a directory."""

    def __init__(self, directory: Path) -> None:
        self.config = config = describe_model(directory).model
        with torch.no_grad():
            self.model = load_model(
                config, None, dtype=torch.bfloat16, device="cuda", load_format="dummy"
            )
            self.model.prepare()

    @torch.no_grad()
    def capture(self, rows: int, context: int) -> torch.cuda.CUDAGraph:
        """A decode step's layers and logits. What it reads lives until the next capture."""
        config, paged = self.config, Paged(rows, context)
        self.model.bind_kv_cache([paged.cache(config) for _ in range(config.num_layers)])

        def buffer(width: int) -> Tensor:
            return torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")

        attn = AttentionMetadata(
            qkv=buffer(config.qkv_size),
            out=buffer(config.q_size),
            slot_mapping=paged.slots,
            block_table=paged.table,
            seq_lens=paged.lengths,
            query_start_loc=paged.starts,
            max_query_len=1,
        )
        ids = torch.randint(0, config.vocab_size, (rows,), device="cuda")
        hidden = buffer(config.hidden_size)
        step = ForwardContext(CUDAGraphMode.FULL, BatchDescriptor(rows, True), attn)

        def run() -> None:
            with set_forward_context(step):
                self.model(ids, paged.positions, hidden)
                self.model.compute_logits(hidden)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        self._read = attn, ids, hidden, paged
        return graph

"""The layers of a decoder in one CUDA graph, without an engine, to compare kernels in.

`Layers` is a model of random weights with a KV cache of random entries; `capture` records its
forward pass and output projection for a decode batch whose contexts have the same length. Kernels
that are timed alone, again and again, look faster than they are: here each runs after the same
kernel as in a step, and reads weights that no kernel has read since the step before.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from minisrv.checkpoint import describe_model
from minisrv.graph.forward_context import ForwardContext, set_forward_context
from minisrv.kernels import AttentionMetadata
from minisrv.model_config import ModelConfig
from minisrv.modes import BatchDescriptor, CUDAGraphMode
from minisrv.nn.loader import load_model

BLOCK_SIZE = 16
WARM_UP = 3
REPLAYS = 10


def median_us(graph: torch.cuda.CUDAGraph) -> float:
    """Return the median of the microseconds that replays of `graph` take on the GPU."""
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
    """Block table, lengths and positions of `rows` requests with `context` tokens each. Their
    blocks are in random order, as in an engine that has run for a while."""

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
        """Return a KV cache of one layer, with random entries."""
        shape = (self.num_blocks, BLOCK_SIZE, 2, config.num_kv_heads, config.head_dim)
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.table.device)


class Layers:
    """A model with random bfloat16 weights, of the shape in the config.json of a directory."""

    def __init__(self, directory: Path) -> None:
        self.config = config = describe_model(directory).model
        with torch.no_grad():
            self.model = load_model(
                config, None, dtype=torch.bfloat16, device="cuda", load_format="dummy"
            )
            self.model.prepare()

    @torch.no_grad()
    def capture(self, rows: int, context: int) -> torch.cuda.CUDAGraph:
        """Capture the layers and logits of a decode step of `rows` requests. The tensors that the
        graph reads are kept until the next capture, so only the last graph may be replayed."""
        config, paged = self.config, Paged(rows, context)
        self.model.allocate_buffers(rows)
        self.model.bind_kv_cache([paged.cache(config) for _ in range(config.num_layers)])

        attn = AttentionMetadata(
            slot_mapping=paged.slots,
            block_table=paged.table,
            seq_lens=paged.lengths,
            query_start_loc=paged.starts,
            max_query_len=1,
        )
        ids = torch.randint(0, config.vocab_size, (rows,), device="cuda")
        hidden = torch.randn(rows, config.hidden_size, dtype=torch.bfloat16, device="cuda")
        layers = self.model.attention_layers
        step = ForwardContext(CUDAGraphMode.FULL, BatchDescriptor(rows, rows, 1), attn, layers)

        def run() -> None:
            with set_forward_context(step):
                self.model(ids, paged.positions, hidden)
                self.model.compute_logits(hidden)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        self._read = ids, hidden, paged
        return graph

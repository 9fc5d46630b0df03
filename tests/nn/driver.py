"""Runs a decoder step by step with attention metadata built by hand, without a scheduler or a model
runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minisrv.graph.forward_context import ForwardContext, set_forward_context
from minisrv.kernels import AttentionMetadata
from minisrv.modes import BatchDescriptor, CUDAGraphMode
from minisrv.nn.model import Model


@dataclass
class Row:
    """A request: its blocks, shuffled so that no test passes by luck, its number of computed
    tokens, and the logits of each step."""

    blocks: list[int]
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)


class Driver:
    """A decoder with a cache that is filled with NaN, for up to `rows` requests."""

    def __init__(
        self, model: Model, *, rows: int = 4, max_len: int = 128, block_size: int = 8
    ) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        self.max_blocks = -(-max_len // block_size)
        blocks = 1 + rows * self.max_blocks
        shape = (blocks, block_size, 2, config.num_kv_heads, config.head_dim)
        model.allocate_buffers(rows * max_len)
        self.device = model.qkv.device
        with self.device:
            caches = [
                torch.full(shape, torch.nan, dtype=model.dtype) for _ in range(config.num_layers)
            ]
        model.bind_kv_cache(caches)
        self.caches = caches
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.rows = [Row(part.tolist()) for part in order.split(self.max_blocks)]

    def context(
        self, batch: list[tuple[int, list[int]]], *, pad_tokens: int = 0, pad_rows: int = 0
    ) -> tuple[Tensor, Tensor, ForwardContext]:
        """Return input_ids, positions and the forward context of a step, and fill the model's
        buffers with NaN.

        batch: for each row of the step, its number and its new tokens.
        """
        ids, positions, slots, starts, lengths, tables = [], [], [], [0], [], []
        for index, tokens in batch:
            row = self.rows[index]
            for position in range(row.computed, row.computed + len(tokens)):
                block = row.blocks[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
                positions.append(position)
            ids += tokens
            starts.append(len(ids))
            lengths.append(row.computed + len(tokens))
            used = -(-lengths[-1] // self.block_size)
            tables.append(row.blocks[:used] + [0] * (self.max_blocks - used))
        for _ in range(pad_rows):
            ids, positions, slots = [*ids, 0], [*positions, 0], [*slots, 0]
            starts.append(len(ids))
            lengths.append(1)
            tables.append([0] * self.max_blocks)
        ids, positions, slots = (x + [0] * pad_tokens for x in (ids, positions, slots))
        self.model.qkv.fill_(torch.nan)
        self.model.attn_out.fill_(torch.nan)
        with self.device:
            attn = AttentionMetadata(
                slot_mapping=torch.tensor(slots),
                block_table=torch.tensor(tables, dtype=torch.int32),
                seq_lens=torch.tensor(lengths, dtype=torch.int32),
                query_start_loc=torch.tensor(starts, dtype=torch.int32),
                max_query_len=1 if len(ids) == len(lengths) else len(ids),
            )
            inputs = torch.tensor(ids), torch.tensor(positions)
        layers = self.model.attention_layers
        context = ForwardContext(CUDAGraphMode.NONE, BatchDescriptor(len(ids)), attn, layers)
        return (*inputs, context)

    def step(
        self, batch: list[tuple[int, list[int]]], *, pad_tokens: int = 0, pad_rows: int = 0
    ) -> Tensor:
        """Run one step and return the logits of all tokens, padding included; each row's own are
        kept in it too."""
        ids, positions, context = self.context(batch, pad_tokens=pad_tokens, pad_rows=pad_rows)
        with torch.inference_mode(), set_forward_context(context):
            logits = self.model.compute_logits(forward(self.model, ids, positions))
        begin = 0
        for index, tokens in batch:
            row = self.rows[index]
            row.logits.append(logits[begin : begin + len(tokens)])
            row.computed += len(tokens)
            begin += len(tokens)
        return logits

    def logits(self, index: int) -> Tensor:
        """Return the logits of all tokens so far of one row, [tokens, vocab], on the CPU."""
        return torch.cat(self.rows[index].logits).cpu()


def forward(model: Model, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the model's hidden states for these tokens, [T, hidden]."""
    hidden = torch.empty(len(ids), model.config.hidden_size, dtype=model.dtype, device=ids.device)
    model(ids, positions, hidden)
    return hidden


def broken_run(
    model: Model, ids: Tensor, positions: Tensor, context: ForwardContext
) -> list[Callable[[], None]]:
    """Run the model with `graph_break` set, and return the attention calls that the op handed
    over."""
    handed: list[Callable[[], None]] = []
    with torch.inference_mode(), set_forward_context(replace(context, graph_break=handed.append)):
        forward(model, ids, positions)
    return handed

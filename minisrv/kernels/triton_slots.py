"""A decode step's bookkeeping on CUDA, in Triton: one launch in front of the model, one behind it.
`kernels.slots` imports this when it first meets a CUDA tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels.triton_launch import follow, pdl

WIDTH = 1024
"""Entries of a block table that a program copies at once."""


def gather_decode(
    slots: Tensor,
    last_token: Tensor,
    next_position: Tensor,
    slot_blocks: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    *,
    block_size: int,
) -> None:
    """As `kernels.slots.gather_decode`; of a block table as much as the row has filled."""
    _gather[(len(slots),)](
        slots,
        last_token,
        next_position,
        slot_blocks,
        input_ids,
        positions,
        seq_lens,
        slot_mapping,
        block_table,
        slot_blocks.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        WIDTH=WIDTH,
        **pdl(),
    )


def scatter(
    slots: Tensor, tokens: Tensor, seq_lens: Tensor, last_token: Tensor, next_position: Tensor
) -> None:
    """As `kernels.slots.scatter`."""
    rows = len(slots)
    block = triton.next_power_of_2(rows)
    _scatter[(1,)](slots, tokens, seq_lens, last_token, next_position, rows, BLOCK=block, **pdl())


@triton.jit
def _gather(
    slots,
    last_token,
    next_position,
    slot_blocks,
    input_ids,
    positions,
    seq_lens,
    slot_mapping,
    block_table,
    slot_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    position = tl.load(next_position + slot)
    source = slot_blocks + slot * slot_stride
    block = tl.load(source + position // BLOCK_SIZE).to(tl.int64)
    tl.store(input_ids + row, tl.load(last_token + slot))
    tl.store(positions + row, position)
    tl.store(seq_lens + row, (position + 1).to(tl.int32))
    tl.store(slot_mapping + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
    used = position // BLOCK_SIZE + 1
    for first in range(0, used, WIDTH):
        at = first + tl.arange(0, WIDTH)
        there = at < used
        tl.store(block_table + row * table_stride + at, tl.load(source + at, there), there)


@triton.jit(do_not_specialize=["rows"])
def _scatter(
    slots, tokens, seq_lens, last_token, next_position, rows, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    follow(PDL)
    row = tl.arange(0, BLOCK)
    there = row < rows
    slot = tl.load(slots + row, there, other=0)
    real = there & (slot != 0)
    tl.store(last_token + slot, tl.load(tokens + row, there), real)
    tl.store(next_position + slot, tl.load(seq_lens + row, there).to(tl.int64), real)

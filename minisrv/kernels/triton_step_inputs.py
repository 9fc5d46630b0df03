"""A step's bookkeeping on CUDA, in Triton, with one launch for each function.

`kernels.step_inputs` imports this when it first meets a CUDA tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from minisrv.kernels.step_inputs import Write
from minisrv.kernels.triton_launch import pdl, wait_and_launch_dependents

WIDTH = 1024
"""Number of entries of a block table that a program copies at once."""


def gather_decode(
    req_indices: Tensor,
    last_token: Tensor,
    next_position: Tensor,
    req_block_tables: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    *,
    block_size: int,
) -> None:
    """See `kernels.step_inputs.gather_decode`. Only that part of a block table is copied which the
    row has filled."""
    _gather[(len(req_indices),)](
        req_indices,
        last_token,
        next_position,
        req_block_tables,
        input_ids,
        positions,
        seq_lens,
        slot_mapping,
        block_table,
        req_block_tables.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        WIDTH=WIDTH,
        **pdl(),
    )


TOKENS = 256
"""Number of tokens, or of values to be written, that one program handles."""

FIELDS = 5
"""Number of fields that describe each write to `_write`: address, kind, places, values, number."""

KINDS = {torch.int64: 0, torch.int32: 1, torch.float32: 2}


def gather_mixed(
    req_indices: Tensor,
    last_token: Tensor,
    req_block_tables: Tensor,
    positions: Tensor,
    token_rows: Tensor,
    seq_lens: Tensor,
    input_ids: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    *,
    num_decodes: int,
    num_tokens: int,
    block_size: int,
) -> None:
    """See `kernels.step_inputs.gather_mixed`. Only that part of a block table is copied which the
    row has filled."""
    rows, padded = len(req_indices), len(positions)
    _gather_mixed[(rows + triton.cdiv(padded, TOKENS),)](
        req_indices,
        last_token,
        req_block_tables,
        positions,
        token_rows,
        seq_lens,
        input_ids,
        slot_mapping,
        block_table,
        rows,
        padded,
        num_decodes,
        num_tokens,
        req_block_tables.stride(0),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        WIDTH=WIDTH,
        TOKENS=TOKENS,
    )


def write_values(writes: Sequence[Write], to_device: Callable[[NDArray[np.int64]], Tensor]) -> None:
    """See `kernels.step_inputs.write_values`. The description of the writes is sent with the
    values, so that everything is one copy and one launch."""
    table = np.empty((len(writes), FIELDS), np.int64)
    parts, end, most = [table.ravel()], table.size, 0
    for line, (target, values, at) in zip(table, writes, strict=True):
        places = 0  # the index of the table, which stands for "in order"
        if at is not None:
            places, end = end, end + len(at)
            parts.append(at)
        line[:] = target.data_ptr(), KINDS[target.dtype], places, end, len(values)
        end += len(values)
        most = max(most, len(values))
        parts.append(values.view(np.int64))
    packed = to_device(np.concatenate(parts))
    _write[(len(writes), triton.cdiv(most, TOKENS))](packed, FIELDS=FIELDS, BLOCK=TOKENS)


def scatter(
    req_indices: Tensor, tokens: Tensor, seq_lens: Tensor, last_token: Tensor, next_position: Tensor
) -> None:
    """See `kernels.step_inputs.scatter`."""
    rows = len(req_indices)
    block = triton.next_power_of_2(rows)
    _scatter[(1,)](
        req_indices, tokens, seq_lens, last_token, next_position, rows, BLOCK=block, **pdl()
    )


@triton.jit
def _gather(
    req_indices,
    last_token,
    next_position,
    req_block_tables,
    input_ids,
    positions,
    seq_lens,
    slot_mapping,
    block_table,
    req_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    req_index = tl.load(req_indices + row)
    position = tl.load(next_position + req_index)
    source = req_block_tables + req_index * req_stride
    block = tl.load(source + position // BLOCK_SIZE).to(tl.int64)
    tl.store(input_ids + row, tl.load(last_token + req_index))
    tl.store(positions + row, position)
    tl.store(seq_lens + row, (position + 1).to(tl.int32))
    tl.store(slot_mapping + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
    used = position // BLOCK_SIZE + 1
    for first in range(0, used, WIDTH):
        at = first + tl.arange(0, WIDTH)
        there = at < used
        tl.store(block_table + row * table_stride + at, tl.load(source + at, there), there)


@triton.jit(do_not_specialize=["rows", "padded", "num_decodes", "num_tokens"])
def _gather_mixed(
    req_indices,
    last_token,
    req_block_tables,
    positions,
    token_rows,
    seq_lens,
    input_ids,
    slot_mapping,
    block_table,
    rows,
    padded,
    num_decodes,
    num_tokens,
    req_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Copy block tables and find the inputs of tokens: the first programs copy the block table of
    one row each, the others handle some tokens each."""
    program = tl.program_id(0)
    if program < rows:
        row = program.to(tl.int64)
        source = req_block_tables + tl.load(req_indices + row) * req_stride
        used = tl.cdiv(tl.load(seq_lens + row), BLOCK_SIZE)
        for first in range(0, used, WIDTH):
            at = first + tl.arange(0, WIDTH)
            there = at < used
            tl.store(block_table + row * table_stride + at, tl.load(source + at, there), there)
    else:
        token = (program - rows) * TOKENS + tl.arange(0, TOKENS)
        real = token < num_tokens
        req_index = tl.load(req_indices + tl.load(token_rows + token, real, other=0), real, other=0)
        position = tl.load(positions + token, real, other=0)
        block = tl.load(
            req_block_tables + req_index * req_stride + position // BLOCK_SIZE, real, other=0
        )
        place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slot_mapping + token, tl.where(real, place, 0), token < padded)
        decodes = token < num_decodes
        tl.store(input_ids + token, tl.load(last_token + req_index, decodes), decodes)


@triton.jit
def _write(packed, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """Write some values of one write."""
    line = packed + tl.program_id(0) * FIELDS
    address = tl.load(line)
    kind = tl.load(line + 1)
    places = tl.load(line + 2)
    values = tl.load(line + 3)
    number = tl.load(line + 4)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = lane < number
    value = tl.load(packed + values + lane, there, other=0)
    at = lane.to(tl.int64)
    if places > 0:
        at = tl.load(packed + places + lane, there, other=0)
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.int64)) + at, value, there)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.int32)) + at, value.to(tl.int32), there)
    else:
        single = value.to(tl.float64, bitcast=True).to(tl.float32)
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, single, there)


@triton.jit(do_not_specialize=["rows"])
def _scatter(
    req_indices,
    tokens,
    seq_lens,
    last_token,
    next_position,
    rows,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_and_launch_dependents(PDL)
    row = tl.arange(0, BLOCK)
    there = row < rows
    req_index = tl.load(req_indices + row, there, other=0)
    real = there & (req_index != 0)
    tl.store(last_token + req_index, tl.load(tokens + row, there), real)
    tl.store(next_position + req_index, tl.load(seq_lens + row, there).to(tl.int64), real)

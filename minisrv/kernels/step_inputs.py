"""A step's bookkeeping: writes the host's values, gathers inputs by request index, and scatters
results.

A request owns a request index, the index of its row in persistent tensors, so that the device finds
the inputs of a step without the host. Each function is one launch on CUDA, because a step waits for
it: torch's operations, about twenty of them, took a slow host 0.7 ms before the first step of a
prompt. Knows nothing of requests.

Request index 0, the null index, belongs to padding: whatever is scattered to it, it remains 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisrv.kernels.registration import imported_at_first_call, register_op


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
    """Gather the inputs of R rows with one token each.

    req_indices: [R] int64, the request index of each row.
    last_token, next_position: [S] int64, by request index.
    req_block_tables: [S, width] int32, block tables by request index.
    input_ids, positions: [R] int64, written.
    seq_lens: [R] int32, written: the length including the token at the position.
    slot_mapping: [R] int64, written: where the cache keeps the token.
    block_table: [R, width] int32, written.
    """
    torch.index_select(last_token, 0, req_indices, out=input_ids)
    torch.index_select(next_position, 0, req_indices, out=positions)
    torch.index_select(req_block_tables, 0, req_indices, out=block_table)
    seq_lens.copy_(positions + 1)
    index = (positions // block_size)[:, None]
    blocks = block_table.gather(1, index).squeeze(1)
    torch.add(positions % block_size, blocks, alpha=block_size, out=slot_mapping)


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
    """Gather those inputs of R rows with T tokens that are stored by request index.

    req_indices: [R] int64, the request index of each row.
    last_token: [S] int64, by request index.
    req_block_tables: [S, width] int32, block tables by request index.
    positions, token_rows: [T] int64, the position and the row of each token.
    seq_lens: [R] int32, the number of tokens in the cache once the step has written its own.
    input_ids: [T] int64; the first num_decodes tokens, which are those of the first rows, are
        written.
    slot_mapping: [T] int64, written: where the cache keeps a token, 0 from num_tokens on.
    block_table: [R, width] int32; at least as much of it is written as seq_lens says.
    """
    torch.index_select(last_token, 0, req_indices[:num_decodes], out=input_ids[:num_decodes])
    torch.index_select(req_block_tables, 0, req_indices, out=block_table)
    position = positions[:num_tokens]
    blocks = block_table[token_rows[:num_tokens], position // block_size]
    torch.add(position % block_size, blocks, alpha=block_size, out=slot_mapping[:num_tokens])
    slot_mapping[num_tokens:] = 0


class Write(NamedTuple):
    """Values for a contiguous tensor: int64 values for an int64 or int32 tensor, float64 values for
    a float32 tensor.

    indices: the index of each value in the flattened tensor; with None the values go to its
        beginning.
    """

    target: Tensor
    values: NDArray[np.int64] | NDArray[np.float64]
    indices: NDArray[np.int64] | None


def write_values(writes: Sequence[Write], to_device: Callable[[NDArray[np.int64]], Tensor]) -> None:
    """Write the new values of a step. No two values may go to the same place.

    to_device: a function that copies an array to the device of the targets.
    """
    if not writes[0].target.is_cpu:
        _write_values_on_cuda(writes, to_device)
        return
    for target, values, at in writes:
        flat, new = target.view(-1), torch.from_numpy(values).to(target.dtype)
        if at is None:
            flat[: len(new)] = new
        else:
            flat.index_copy_(0, torch.from_numpy(at), new)


_write_values_on_cuda = imported_at_first_call("minisrv.kernels.triton_step_inputs:write_values")


def scatter(
    req_indices: Tensor, tokens: Tensor, seq_lens: Tensor, last_token: Tensor, next_position: Tensor
) -> None:
    """Write R sampled tokens and their positions as the next inputs of their requests.

    req_indices, tokens: [R] int64.
    seq_lens: [R] int32, which is the position of the new tokens.
    last_token, next_position: [S] int64, written.
    """
    last_token.index_copy_(0, req_indices, tokens)
    next_position.index_copy_(0, req_indices, seq_lens.to(torch.int64))
    last_token[:1].zero_()
    next_position[:1].zero_()


gather_decode_op = register_op(
    "gather_decode",
    "(Tensor req_indices, Tensor last_token, Tensor next_position, Tensor req_block_tables, "
    "Tensor(a!) input_ids, Tensor(b!) positions, Tensor(c!) seq_lens, Tensor(d!) slot_mapping, "
    "Tensor(e!) block_table, *, int block_size) -> ()",
    cpu=gather_decode,
    cuda="minisrv.kernels.triton_step_inputs:gather_decode",
)
gather_mixed_op = register_op(
    "gather_mixed",
    "(Tensor req_indices, Tensor last_token, Tensor req_block_tables, Tensor positions, "
    "Tensor token_rows, Tensor seq_lens, Tensor(a!) input_ids, Tensor(b!) slot_mapping, "
    "Tensor(c!) block_table, *, int num_decodes, int num_tokens, int block_size) -> ()",
    cpu=gather_mixed,
    cuda="minisrv.kernels.triton_step_inputs:gather_mixed",
)
scatter_op = register_op(
    "scatter",
    "(Tensor req_indices, Tensor tokens, Tensor seq_lens, Tensor(a!) last_token, "
    "Tensor(b!) next_position) -> ()",
    cpu=scatter,
    cuda="minisrv.kernels.triton_step_inputs:scatter",
)

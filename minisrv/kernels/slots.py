"""A step's bookkeeping: what the host sends is written, what goes in is gathered by slot, what
comes out is scattered.

A request owns a slot, a row of persistent tensors, so that the device finds a step's inputs without
the host. Each of these is one launch on CUDA, as a step waits for them: torch's operations, some
twenty, took a slow host 0.7 ms in front of a prompt's first step. Knows nothing of requests.

Slot 0, the null slot, belongs to padding: whatever is scattered to it, it stays as it is, 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    """The inputs of R rows with one token each.

    slots: [R] int64. last_token, next_position: [S] int64 and slot_blocks: [S, width] int32, by
        slot.
    Written: input_ids, positions [R] int64; seq_lens [R] int32, the position's token included;
        slot_mapping [R] int64, where the cache keeps the token; block_table [R, width] int32.
    """
    torch.index_select(last_token, 0, slots, out=input_ids)
    torch.index_select(next_position, 0, slots, out=positions)
    torch.index_select(slot_blocks, 0, slots, out=block_table)
    seq_lens.copy_(positions + 1)
    index = (positions // block_size)[:, None]
    blocks = block_table.gather(1, index).squeeze(1)
    torch.add(positions % block_size, blocks, alpha=block_size, out=slot_mapping)


def gather_mixed(
    slots: Tensor,
    last_token: Tensor,
    slot_blocks: Tensor,
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
    """What of the inputs of R rows with T tokens lies by slot.

    slots: [R] int64. last_token: [S] int64, slot_blocks: [S, width] int32, by slot.
    positions, token_rows: [T] int64, a token's position and row. seq_lens: [R] int32, tokens in the
        cache once the step has written its own.
    Written: input_ids [T] int64 of the first num_decodes tokens, which are the first rows';
        slot_mapping [T] int64, where the cache keeps a token, 0 from num_tokens on; block_table
        [R, width] int32, as much of it as seq_lens says at least.
    """
    torch.index_select(last_token, 0, slots[:num_decodes], out=input_ids[:num_decodes])
    torch.index_select(slot_blocks, 0, slots, out=block_table)
    position = positions[:num_tokens]
    blocks = block_table[token_rows[:num_tokens], position // block_size]
    torch.add(position % block_size, blocks, alpha=block_size, out=slot_mapping[:num_tokens])
    slot_mapping[num_tokens:] = 0


class Write(NamedTuple):
    """Values for a contiguous tensor: int64 for one of int64 or int32, float64 for float32.

    at: the place of each in the flattened tensor; None: from its beginning on.
    """

    target: Tensor
    values: NDArray[np.int64] | NDArray[np.float64]
    at: NDArray[np.int64] | None


def write_values(writes: Sequence[Write], to_device: Callable[[NDArray[np.int64]], Tensor]) -> None:
    """Write what a step has new. No two values go to one place.

    to_device: copies an array to where the targets are.
    """
    if writes[0].target.is_cuda:
        _by_triton("write_values")(writes, to_device)
        return
    for target, values, at in writes:
        flat, new = target.view(-1), torch.from_numpy(values).to(target.dtype)
        if at is None:
            flat[: len(new)] = new
        else:
            flat.index_copy_(0, torch.from_numpy(at), new)


def scatter(
    slots: Tensor, tokens: Tensor, seq_lens: Tensor, last_token: Tensor, next_position: Tensor
) -> None:
    """Make R sampled tokens, and where they stand, the next inputs of their slots.

    slots, tokens: [R] int64. seq_lens: [R] int32, which is the new tokens' position.
    last_token, next_position: [S] int64, written.
    """
    last_token.index_copy_(0, slots, tokens)
    next_position.index_copy_(0, slots, seq_lens.to(torch.int64))
    last_token[:1].zero_()
    next_position[:1].zero_()


@cache
def _by_triton(name: str) -> Callable[..., None]:
    """CUDA's version. Where there is no GPU there may be no Triton, and it takes long to import."""
    from minisrv.kernels import triton_slots

    return cast(Callable[..., None], getattr(triton_slots, name))


torch.library.define(
    "minisrv::gather_decode",
    "(Tensor slots, Tensor last_token, Tensor next_position, Tensor slot_blocks, "
    "Tensor(a!) input_ids, Tensor(b!) positions, Tensor(c!) seq_lens, Tensor(d!) slot_mapping, "
    "Tensor(e!) block_table, *, int block_size) -> ()",
)
torch.library.define(
    "minisrv::gather_mixed",
    "(Tensor slots, Tensor last_token, Tensor slot_blocks, Tensor positions, Tensor token_rows, "
    "Tensor seq_lens, Tensor(a!) input_ids, Tensor(b!) slot_mapping, Tensor(c!) block_table, *, "
    "int num_decodes, int num_tokens, int block_size) -> ()",
)
torch.library.define(
    "minisrv::scatter",
    "(Tensor slots, Tensor tokens, Tensor seq_lens, Tensor(a!) last_token, "
    "Tensor(b!) next_position) -> ()",
)
torch.library.impl("minisrv::gather_decode", "cpu", gather_decode)
torch.library.impl("minisrv::gather_mixed", "cpu", gather_mixed)
torch.library.impl("minisrv::scatter", "cpu", scatter)
torch.library.impl(
    "minisrv::gather_decode",
    "cuda",
    lambda *args, **kwargs: _by_triton("gather_decode")(*args, **kwargs),
)
torch.library.impl(
    "minisrv::gather_mixed",
    "cuda",
    lambda *args, **kwargs: _by_triton("gather_mixed")(*args, **kwargs),
)
torch.library.impl("minisrv::scatter", "cuda", lambda *args: _by_triton("scatter")(*args))
torch.library.register_fake("minisrv::gather_decode", lambda *args, **kwargs: None)
torch.library.register_fake("minisrv::gather_mixed", lambda *args, **kwargs: None)
torch.library.register_fake("minisrv::scatter", lambda *args: None)

gather_decode_op = torch.ops.minisrv.gather_decode.default
gather_mixed_op = torch.ops.minisrv.gather_mixed.default
scatter_op = torch.ops.minisrv.scatter.default

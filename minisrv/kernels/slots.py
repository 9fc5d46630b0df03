"""A decode step's bookkeeping by slot: what goes in is gathered, what comes out is scattered.

A request owns a slot, a row of persistent tensors, so that the device finds a step's inputs without
the host. Both are one op each, and on CUDA one launch. Knows nothing of requests.

Slot 0, the null slot, belongs to padding: whatever is scattered to it, it stays as it is, 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
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
    "minisrv::scatter",
    "(Tensor slots, Tensor tokens, Tensor seq_lens, Tensor(a!) last_token, "
    "Tensor(b!) next_position) -> ()",
)
torch.library.impl("minisrv::gather_decode", "cpu", gather_decode)
torch.library.impl("minisrv::scatter", "cpu", scatter)
torch.library.impl(
    "minisrv::gather_decode",
    "cuda",
    lambda *args, **kwargs: _by_triton("gather_decode")(*args, **kwargs),
)
torch.library.impl("minisrv::scatter", "cuda", lambda *args: _by_triton("scatter")(*args))
torch.library.register_fake("minisrv::gather_decode", lambda *args, **kwargs: None)
torch.library.register_fake("minisrv::scatter", lambda *args: None)

gather_decode_op = torch.ops.minisrv.gather_decode.default
scatter_op = torch.ops.minisrv.scatter.default

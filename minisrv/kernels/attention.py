"""The attention op: q/k-norm, rotation, cache write and paged attention in one.

It takes packed q, k, v as the projection leaves them and tensors only, so that a graph may break
at it and a fused kernel may take its place. This is the CPU's version.
Knows: the layout of the paged cache, and how a step's tokens belong to its rows (requests).
Knows nothing of requests, graphs or the forward context.

Whatever the cache holds beyond a row's length, NaN included, is never read for a real row: masking
it would not do, as 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GATHER_BYTES = 1 << 21
"""Decode rows are gathered in groups of about so many bytes of K and V, which a CPU's inner caches
hold until they are used: 64 rows of 1000 tokens take a quarter of the time of one gather."""

_SCHEMA = (
    "(Tensor qkv, Tensor positions, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor(b!) out, *, "
    "Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, float eps, int num_heads, "
    "int num_kv_heads, int head_dim) -> ()"
)


def attention(
    qkv: Tensor,
    positions: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    *,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Causal attention of T tokens in R rows over a paged cache; writes `kv_cache` and `out`.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], before norm and rotation; left as it is.
    positions: [T] int64.
    kv_cache: [num_blocks, block_size, 2 (k, v), num_kv_heads, head_dim].
    slot_mapping: [T] int64; every token writes, also those of padding (to the null block), and all
        write before any reads.
    block_table: [R, max_blocks] int32.
    seq_lens: [R] int32, each row's tokens in the cache, those of this step included.
    query_start_loc: [R + 1] int32, monotone; a row's tokens are the last of its sequence.
    out: [T, num_heads * head_dim]; zero beyond query_start_loc[R].
    cos_sin: [max_positions, head_dim], of `nn.rope`.
    q_norm, k_norm: [head_dim] RMSNorm weights, both or neither.
    Floating point tensors have one dtype. Grouped queries share their key head without copies of
    it: query head h uses key head h // (num_heads // num_kv_heads).
    """
    tokens, group = qkv.shape[0], num_heads // num_kv_heads
    heads = qkv.view(tokens, -1, head_dim)
    packed = torch.empty_like(heads)
    queries, _, values = packed.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    values.copy_(heads[:, -num_kv_heads:])
    heads = heads[:, :-num_kv_heads]
    if q_norm is not None and k_norm is not None:
        heads = torch.rms_norm(heads, (head_dim,), eps=eps)
        heads[:, :num_heads] *= q_norm
        heads[:, num_heads:] *= k_norm
    _rotate(heads, cos_sin.index_select(0, positions), packed[:, :-num_kv_heads])

    # A token's k and v are neighbours in `packed` as they are in the cache.
    cache = kv_cache.view(-1, 2 * num_kv_heads * head_dim)
    cache.index_copy_(0, slot_mapping, packed[:, num_heads:].reshape(tokens, -1))

    queries = queries.view(tokens, num_kv_heads, group, head_dim)
    results = out.view(tokens, num_kv_heads, group, head_dim)
    pages = _Pages(kv_cache, block_table, seq_lens.tolist())
    starts = query_start_loc.tolist()
    decode = [row for row, (a, b) in enumerate(pairwise(starts)) if b - a == 1]
    if decode:
        _decode(queries, results, pages, decode, starts)
    if len(decode) < len(starts) - 1:
        for row, (begin, end) in enumerate(pairwise(starts)):
            if end - begin > 1:
                _prefill(queries[begin:end], results[begin:end], pages, row)
    if starts[-1] < tokens:
        out[starts[-1] :].zero_()


torch.library.define("minisrv::attention", _SCHEMA)
torch.library.impl("minisrv::attention", "cpu", attention)
torch.library.register_fake("minisrv::attention", lambda *args, **kwargs: None)

attention_op = torch.ops.minisrv.attention.default
"""What a layer calls, so that whoever records or traces operations sees one."""


def _rotate(heads: Tensor, cos_sin: Tensor, into: Tensor) -> None:
    """Turn each of `heads` [T, n, head_dim] by its token's angles [T, head_dim]."""
    tokens, n, head_dim = heads.shape
    halves = heads.view(tokens, n, 2, head_dim // 2)
    into = into.view(tokens, n, 2, head_dim // 2)
    cos, sin = cos_sin.view(tokens, 1, 2, head_dim // 2).split(1, dim=2)
    torch.mul(halves, cos, out=into)
    sin = sin.squeeze(2)
    into[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)
    into[:, :, 1].addcmul_(halves[:, :, 0], sin)


class _Pages:
    """One layer's cache as its rows see it."""

    def __init__(self, kv_cache: Tensor, block_table: Tensor, lengths: list[int]) -> None:
        blocks, self.block_size, _, num_kv_heads, head_dim = kv_cache.shape
        self.shape = (2, num_kv_heads, head_dim)
        self.token_bytes = 2 * num_kv_heads * head_dim * kv_cache.element_size()
        self.blocks = kv_cache.view(blocks, -1)
        self.tokens = kv_cache.view(blocks * self.block_size, -1)
        self.block_table = block_table
        self.lengths = lengths

    def gather(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """K and V of `rows` as far as the longest of them reaches, and the additive mask of what
        lies beyond a row's length (None if nothing does).

        k, v: [rows, num_kv_heads, longest, head_dim], views of one copy.
        mask: [rows, 1, 1, longest].
        """
        lengths = [self.lengths[row] for row in rows]
        longest, mask = max(lengths), None
        table = _take(self.block_table, rows)[:, : -(-longest // self.block_size)]
        if min(lengths) == longest:
            kv = self.blocks.index_select(0, table.reshape(-1))
        else:
            # What lies beyond a row's end is not read: its own first token stands there.
            place = np.arange(table.shape[1] * self.block_size)
            beyond = place >= np.array(lengths)[:, None]
            slots = table.numpy().repeat(self.block_size, axis=1) * self.block_size
            slots += (place % self.block_size).astype(np.int32)
            slots = np.where(beyond, slots[:, :1], slots)
            kv = self.tokens.index_select(0, torch.from_numpy(slots.reshape(-1)))
            mask = kv.new_zeros(len(rows), 1, 1, longest)
            mask.masked_fill_(torch.from_numpy(beyond[:, None, None, :longest]), -torch.inf)
        kv = kv.view(len(rows), -1, *self.shape)[:, :longest]
        k, v = kv.transpose(1, 3).unbind(2)
        return k, v, mask


def _decode(
    queries: Tensor, results: Tensor, pages: _Pages, rows: list[int], starts: list[int]
) -> None:
    """Rows of one query each. queries, results: [T, num_kv_heads, group, head_dim]."""
    longest = max([pages.lengths[row] for row in rows])
    size = max(1, GATHER_BYTES // (pages.token_bytes * longest))
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        tokens = [starts[row] for row in some]
        k, v, mask = pages.gather(some)
        value = scaled_dot_product_attention(_take(queries, tokens), k, v, mask)
        if _consecutive(tokens):
            results[tokens[0] : tokens[-1] + 1] = value
        else:
            results.index_copy_(0, torch.tensor(tokens), value)


def _prefill(queries: Tensor, results: Tensor, pages: _Pages, row: int) -> None:
    """One row of several queries, [n, num_kv_heads, group, head_dim]."""
    k, v, _ = pages.gather([row])
    n, length, group = queries.shape[0], k.shape[2], queries.shape[2]
    mask = None
    if n < length:
        mask = torch.ones(n, length, dtype=torch.bool).tril_(length - n)
    # The group takes the batch's place: one copy of k and v serves all of it.
    value = scaled_dot_product_attention(
        queries.permute(2, 1, 0, 3),
        k.expand(group, -1, -1, -1),
        v.expand(group, -1, -1, -1),
        mask,
        is_causal=mask is None,
    )
    results.copy_(value.permute(2, 1, 0, 3))


def _consecutive(rising: Sequence[int]) -> bool:
    return rising[-1] - rising[0] == len(rising) - 1


def _take(tensor: Tensor, rising: Sequence[int]) -> Tensor:
    """Rows of `tensor`: a view where they are neighbours."""
    if _consecutive(rising):
        return tensor[rising[0] : rising[-1] + 1]
    return tensor.index_select(0, torch.tensor(rising))

"""The attention op: q/k-norm, rotation, cache write and paged attention in one.

It takes packed q, k, v as the projection leaves them and tensors only, so that a graph may break
at it and a fused kernel may take its place. This is the CPU's version.
Knows: the layout of the paged cache, and how a step's tokens belong to its rows (requests).
Knows nothing of requests, graphs or the forward context.

Whatever the cache holds beyond a row's length, NaN included, is never read for a real row: masking
it would not do, as 0 * NaN is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
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
    cos_sin: [max_positions, 2 * head_dim], of `nn.rope`.
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
    lengths = seq_lens.numpy()
    block_size = kv_cache.shape[1]
    used = -(-int(lengths.max(initial=0)) // block_size)
    # All layers of a step have the same plan.
    plan = _plan(
        lengths.tobytes(),
        query_start_loc.numpy().tobytes(),
        block_table.numpy()[:, :used].tobytes(),
        block_size,
        max(1, GATHER_BYTES // (2 * num_kv_heads * head_dim * 4)),
    )
    for rows in plan.decode:
        k, v = rows.gather(cache, num_kv_heads)
        value = scaled_dot_product_attention(queries[rows.tokens].float(), k, v, rows.mask)
        results[rows.tokens] = value.to(out.dtype)
    for row in plan.prefill:
        k, v = row.gather(cache, num_kv_heads)
        _prefill(queries[row.tokens], results[row.tokens], k, v)
    if plan.tokens < tokens:
        out[plan.tokens :].zero_()


torch.library.define("minisrv::attention", _SCHEMA)
torch.library.impl("minisrv::attention", "cpu", attention)
torch.library.register_fake("minisrv::attention", lambda *args, **kwargs: None)

attention_op = torch.ops.minisrv.attention.default
"""What a layer calls, so that whoever records or traces operations sees one."""


def _rotate(heads: Tensor, cos_sin: Tensor, into: Tensor) -> None:
    """Turn each of `heads` [T, n, head_dim] by its token's angles [T, 2 * head_dim]."""
    tokens, n, head_dim = heads.shape
    halves = heads.view(tokens, n, 2, head_dim // 2)
    into = into.view(tokens, n, 2, head_dim // 2)
    cos, sin = cos_sin.view(tokens, 2, 1, 2, head_dim // 2).unbind(1)
    torch.mul(halves, cos, out=into)
    into.addcmul_(halves.flip(2), sin)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a step whose K and V are gathered together, as far as the longest reaches.

    tokens: of the step, n in all. places: [rows * longest] int64, positions in the cache; beyond a
        row's end stands its own first token, so that nothing is read that it has not written.
    mask: [rows, 1, 1, longest] float32, -inf beyond a row's end; None if they are equally long.
    """

    tokens: slice | Tensor
    places: Tensor
    longest: int
    mask: Tensor | None

    def gather(self, cache: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """k and v [rows, num_kv_heads, longest, head_dim] float32, views of one copy.

        float32 because torch's attention for a single query takes three times as long in
        bfloat16, conversion included.
        """
        kv = cache.index_select(0, self.places).float()
        k, v = (
            kv.view(-1, self.longest, 2, num_kv_heads, kv.shape[1] // (2 * num_kv_heads))
            .transpose(1, 3)
            .unbind(2)
        )
        return k, v


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a step's tokens are attended to: groups of decode rows, then prefill row by row.

    tokens: how many belong to rows.
    """

    decode: list[_Rows]
    prefill: list[_Rows]
    tokens: int


@lru_cache(maxsize=1)
def _plan(
    seq_lens: bytes, query_start_loc: bytes, block_table: bytes, block_size: int, group_tokens: int
) -> _Plan:
    """The plan for the op's metadata, int32 as bytes; `block_table` as far as it is used.

    group_tokens: K and V of so many tokens are gathered at once in decode.
    """
    lengths = np.frombuffer(seq_lens, np.int32)
    starts = np.frombuffer(query_start_loc, np.int32)
    table = np.frombuffer(block_table, np.int32).reshape(len(lengths), -1)
    offsets = np.arange(block_size)
    is_decode = np.diff(starts) == 1
    decode, longest = np.flatnonzero(is_decode), int(lengths.max(initial=0, where=is_decode))

    def rows(some: NDArray[np.intp], tokens: slice | Tensor) -> _Rows:
        """Some rows, together."""
        reach = int(lengths[some].max())
        places = table[some, : -(-reach // block_size), None].astype(np.int64) * block_size
        places = (places + offsets).reshape(len(some), -1)[:, :reach]
        beyond = np.arange(reach) >= lengths[some, None]
        mask = None
        if beyond.any():
            places = np.where(beyond, places[:, :1], places)
            mask = torch.from_numpy(np.where(beyond, -np.inf, 0.0).astype(np.float32))
            mask = mask[:, None, None, :]
        return _Rows(tokens, torch.from_numpy(places.reshape(-1)), reach, mask)

    def tokens_of(some: NDArray[np.intp]) -> slice | Tensor:
        """The tokens of decode rows: a slice where they are neighbours."""
        first, last = int(starts[some[0]]), int(starts[some[-1]])
        if last - first == len(some) - 1:
            return slice(first, last + 1)
        return torch.from_numpy(starts[some].astype(np.int64))

    size = max(1, group_tokens // max(1, longest))
    groups = [decode[first : first + size] for first in range(0, len(decode), size)]
    return _Plan(
        decode=[rows(some, tokens_of(some)) for some in groups],
        prefill=[
            rows(np.array([row]), slice(int(starts[row]), int(starts[row + 1])))
            for row in np.flatnonzero(np.diff(starts) > 1)
        ],
        tokens=int(starts[-1]),
    )


def _prefill(queries: Tensor, results: Tensor, k: Tensor, v: Tensor) -> None:
    """One row of several queries, [n, num_kv_heads, group, head_dim]."""
    n, length, group = queries.shape[0], k.shape[2], queries.shape[2]
    mask = None
    if n < length:
        mask = torch.ones(n, length, dtype=torch.bool).tril_(length - n)
    # The group takes the batch's place: one copy of k and v serves all of it.
    value = scaled_dot_product_attention(
        queries.float().permute(2, 1, 0, 3),
        k.expand(group, -1, -1, -1),
        v.expand(group, -1, -1, -1),
        mask,
        is_causal=mask is None,
    )
    results.copy_(value.permute(2, 1, 0, 3))

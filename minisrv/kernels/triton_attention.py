"""Attention on CUDA, in Triton.

A row of one token is the work of `_decode`: each program takes a key head of a row and a share of
its history, norms and rotates the queries, writes the new entry to the cache and attends
(FlashDecoding, Dao et al. 2023). Where a row has several shares, the program that ends last
combines them. A batch with one token in each row (`max_query_len` 1) needs no other launch. In any
other batch three launches follow each other: one prepares the tokens (q/k-norm, rotation, cache
write) and surveys the rows, `_decode` takes the rows of one token, and one attends in tiles of
queries (FlashAttention-2, Dao 2023) to the rest; a tile finds its row on the device, as in vLLM's
unified Triton attention. On Hopper GPUs `gluon_attention` does the last part where it supports the
layer.

A decode batch must read K and V once: batch * context * 2 * num_kv_heads * head_dim elements a
layer. On an H100 it does so at 90% of a copy's speed or more, from 32 requests with 1,024 tokens on
(heads of 128; of 64: 84%). A single request takes 3.9 us a layer, where its bytes alone would take
0.2.

Knows: the arguments and layouts of `kernels.attention`. Grids and allocations follow from shapes
and `max_query_len` alone, and all lengths, those of rows too, are read on the device. So a graph
captured on some rows replays on any others, even empty ones, and the host never waits. A graph for
any batch has as many rows as a batch can have, so there the number of splits follows from the
survey: a few long rows are split as if they were alone.

Cache entries beyond a row's length are not loaded, nor are those before the sliding window of all
queries of a program, and stale entries of the block table are not followed. A program works for one
row, so no value in a row, NaN included, reaches another.

This module imports Triton; `kernels.attention` imports it for the first CUDA tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels import gluon_attention
from minisrv.kernels.attention_arguments import AttentionLayer, AttentionMetadata
from minisrv.kernels.triton_launch import arrivals, multiprocessors, pdl, wait_and_launch_dependents
from minisrv.kernels.triton_ragged import SINGLES, SURVEY, locate, num_tiles, survey_rows


class DecodeShape(NamedTuple):
    """The division of the work of `_decode`.

    tile_bytes: the number of bytes of K, and of V, that a program takes at once; it loads all of
        its first tile while the kernel before it runs.
    warp_keys: the maximum number of the tile's keys that a warp takes.
    programs_per_sm: the number of programs for each SM that rows are split into, where there are
        few rows.
    """

    tile_bytes: int
    warp_keys: int
    programs_per_sm: int


TILE_BYTES = 16 * 1024
MAX_TILE = 128
"""Number of bytes of K, and of V, in a tile for prompts, and the maximum number of its keys: 16 KiB
are 64 keys of 128 bfloat16."""

MAX_KEYS = 256
"""Maximum number of keys in a tile of a decode step, however small a head is."""

WARP_BYTES = {2: 8 * 1024, 4: 4 * 1024}
"""Number of bytes of a decode step's tile that a warp has registers for, by the size of an element:
float32 is multiplied without tensor cores."""

WARP_SUMS = 2048
"""Number of output elements of a decode step's queries that a warp has registers for."""

MAX_QUERIES = {2: 64, 4: 16}
"""Number of rows in a tile of queries, by the size of an element: the number that the tensor cores
of a warp group multiply at once; float32, which they do not multiply, runs out of registers beyond
16."""

PREFILL = {"num_warps": 4, "num_stages": 3}
"""Launch options of `_attend`. A tile waits for its blocks of the block table: one stage is for the
table, one for K and V, one for the product. A program takes 80 KiB of an SM's 228 KiB of shared
memory, because its tensor cores read their tile from there while the next one is loaded."""

DECODE_WIDE = DecodeShape(64 * 1024, warp_keys=32, programs_per_sm=2)
DECODE_FEW = DecodeShape(32 * 1024, warp_keys=32, programs_per_sm=2)
DECODE_MANY = DecodeShape(8 * 1024, warp_keys=64, programs_per_sm=8)
"""Shapes for few and for many programs. With programs for half of the SMs or fewer, time is
latency: a tile is large, so that a context of 128 tokens is one, for heads of 256 too where there
are very few programs. With more programs, each fills the gaps of the others, and a program of one
warp does not wait for another warp."""

WIDE_HEAD = 256
"""Minimum number of elements, of 16 bits, of a head for which `DECODE_WIDE` is used."""

MIN_SHARE = 128
MAX_SPLITS = 64
"""Minimum number of keys in a share, below which a split is not worth it, and maximum number of
splits of a row. Rows are split until all SMs are full."""

MAX_SPLITS_BESIDE = 32
"""Maximum number of splits of a row beside rows of more tokens. The program that combines them has
the registers of few warps there, because its shape is that of many rows."""

PREPARED = 512
"""Number of elements of queries that a warp prepares."""

COMBINED = 2048
"""Number of elements of shares that a warp combines at once."""

FEW_SHARES = 8
"""A row that is split into at most so many shares is combined by code with room for so many. Code
with room for as many shares as a row may have is slower: most of its loads are masked."""


def attention(
    layer: AttentionLayer,
    qkv: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
) -> None:
    """Compute `kernels.attention.attention` for CUDA tensors, which are contiguous except for the
    rows of `block_table`.

    The dtypes are float32, bfloat16 and float16. Products have the tensors' dtype (float32 is not
    shortened to TF32); sums, norms, rotation and softmax are float32. No row reads a cache slot
    that another row writes, because the slots of one step belong to one row or to padding.
    """
    tokens, rows = qkv.shape[0], metadata.seq_lens.shape[0]
    if metadata.max_query_len == 1:
        assert tokens == rows, "one token a row and no padding behind them"
        _attend_single(layer, qkv, positions, metadata, None, out)
        return

    # One row alone needs no launch for rows of one token; the tiles do for it.
    fewest = 1 if rows == 1 else 2
    num_kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
    group = layer.num_heads // num_kv_heads
    queries = qkv.new_empty(num_kv_heads, tokens, group, head_dim)
    survey = torch.empty(SURVEY, dtype=torch.int32, device=qkv.device)
    heads, element_size = _heads(layer), qkv.element_size()
    on_hopper = gluon_attention.supports(layer, qkv.device)
    if on_hopper:
        block_q = gluon_attention.block_q(layer, tokens, qkv.device)
    else:
        block_m = max(MAX_QUERIES[element_size], _block_g(group))
        block_q = block_m // group
    block_h = triton.next_power_of_2(layer.num_heads)
    _prepare[(tokens,)](
        qkv,
        positions,
        layer.kv_cache,
        metadata.slot_mapping,
        metadata.query_start_loc,
        queries,
        survey,
        out,
        layer.cos_sin,
        layer.q_norm,
        layer.k_norm,
        rows,
        fewest,
        layer.eps,
        **heads,
        BLOCK_H=block_h,
        BLOCK_K=triton.next_power_of_2(num_kv_heads),
        BLOCK_Q=block_q,
        num_warps=min(16, max(1, block_h * heads["BLOCK_D"] // PREPARED)),
    )
    if rows > 1:
        _attend_single(layer, qkv, positions, metadata, survey, out)
    scale, cap = _scale_and_cap(layer)
    if on_hopper:
        gluon_attention.attend(layer, queries, metadata, survey, scale, fewest, out)
        return
    tile = min(MAX_TILE, max(16, TILE_BYTES // (heads["BLOCK_D"] * element_size)))
    _attend[(num_tiles(tokens, rows, block_q), num_kv_heads)](
        queries,
        layer.kv_cache,
        metadata.block_table,
        metadata.seq_lens,
        metadata.query_start_loc,
        out,
        layer.sinks,
        metadata.block_table.stride(0),
        tokens,
        rows,
        fewest,
        scale,
        cap,
        **heads,
        WINDOW=layer.sliding_window,
        BLOCK_SIZE=layer.kv_cache.shape[1],
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        TILE=tile,
        **PREFILL,
    )


def _heads(layer: AttentionLayer) -> dict[str, int]:
    """Return the constants by which all kernels know the layer's heads."""
    return {
        "GROUP": layer.num_heads // layer.num_kv_heads,
        "NUM_KV_HEADS": layer.num_kv_heads,
        "HEAD_DIM": layer.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(layer.head_dim)),
    }


def _block_g(group: int) -> int:
    """Return the number of rows for a group of queries; tl.dot multiplies at least 16."""
    return max(16, int(triton.next_power_of_2(group)))


def _scale_and_cap(layer: AttentionLayer) -> tuple[float, float | None]:
    """Return the factor of scores and their soft cap for a softmax to base 2, whose tanh is
    (e^2x - 1) / (e^2x + 1)."""
    scale, cap = layer.scale * math.log2(math.e), layer.logit_soft_cap
    if cap is None:
        return scale, None
    return 2.0 * scale / cap, cap * math.log2(math.e)


def _attend_single(
    layer: AttentionLayer,
    qkv: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    survey: Tensor | None,
    out: Tensor,
) -> None:
    """Compute the rows that have one token, from `qkv` to `out` and the cache.

    survey: the step's survey; None where every row has one token.
    """
    kv_cache, block_table = layer.kv_cache, metadata.block_table
    rows, num_kv_heads = metadata.seq_lens.shape[0], layer.num_kv_heads
    heads, element_size = _heads(layer), qkv.element_size()
    group, block_d = heads["GROUP"], heads["BLOCK_D"]
    block_g, block_size = _block_g(group), kv_cache.shape[1]
    scale, cap = _scale_and_cap(layer)
    sms = multiprocessors(qkv.device)
    programs = rows * num_kv_heads
    wide = block_d >= WIDE_HEAD and element_size == 2
    shape = decode_shape(programs, sms, wide=wide)
    keys = max(16, min(MAX_KEYS, shape.tile_bytes // (block_d * element_size)))
    warps = max(
        keys // shape.warp_keys,
        shape.tile_bytes // WARP_BYTES[element_size],
        block_g * block_d // WARP_SUMS,
    )
    most = block_table.shape[1] * block_size
    if layer.sliding_window is not None:
        most = min(most, layer.sliding_window)
    wanted, max_splits = shape.programs_per_sm * sms, most // max(MIN_SHARE, keys)
    if survey is None:
        splits = num_splits(programs, max_splits, wanted)
        grid: tuple[int, ...] = (rows, num_kv_heads, splits)
        programs *= splits
    else:  # The survey says how many rows share the programs.
        splits = num_splits(num_kv_heads, min(max_splits, MAX_SPLITS_BESIDE), wanted)
        programs = max(programs, wanted)
        grid = (programs,)
    block_s = triton.next_power_of_2(splits)
    few = min(FEW_SHARES, block_s)
    queries, few_queries = (
        max(1, min(triton.next_power_of_2(group), COMBINED * warps // (shares * block_d)))
        for shares in (block_s, few)
    )
    partial = sums = arrived = None
    if splits > 1:
        parts = programs * group
        partial = torch.empty(parts, layer.head_dim, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(parts, 2, dtype=torch.float32, device=qkv.device)
        arrived = arrivals(qkv.device)
    _decode[grid](
        qkv,
        positions,
        kv_cache,
        metadata.slot_mapping,
        block_table,
        metadata.seq_lens,
        metadata.query_start_loc if survey is not None else None,
        survey,
        out,
        partial,
        sums,
        arrived,
        layer.cos_sin,
        layer.q_norm,
        layer.k_norm,
        layer.sinks,
        block_table.stride(0),
        splits,
        wanted,
        layer.eps,
        scale,
        cap,
        **heads,
        WINDOW=layer.sliding_window,
        BLOCK_SIZE=block_size,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        QUERIES=queries,
        FEW_S=few,
        FEW_QUERIES=few_queries,
        TILE=keys,
        num_warps=warps,
        num_stages=1,
        **(pdl() if survey is None else {"PDL": False}),
    )


def decode_shape(programs: int, multiprocessors: int, *, wide: bool) -> DecodeShape:
    """Return the shape for `programs`, the number of rows times key heads.

    wide: whether the heads are as wide as `DECODE_WIDE` is for.
    """
    if wide and 16 * programs <= multiprocessors:
        return DECODE_WIDE
    return DECODE_FEW if 2 * programs <= multiprocessors else DECODE_MANY


def num_splits(programs: int, max_splits: int, wanted: int) -> int:
    """Return the number of shares into which each row's history is split to get `wanted` programs;
    it is a power of two and at most `max_splits`.

    It depends on shapes alone, so that capture and replay agree.
    """
    splits = max(1, min(wanted // programs, max_splits, MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


@triton.jit
def _rotation_factors(angles, weight, d, HEAD_DIM: tl.constexpr):
    """Return what rotates a head, float32 [1, BLOCK_D]: the factor of each element, and the factor
    of its partner, including the weights of the RMSNorm if there are any.

    angles: the pointer to the token's row of `cos_sin`; None if heads are not rotated, which then
        have no use for their partners.
    """
    there = d < HEAD_DIM
    if angles is None:
        own = tl.where(there, 1.0, 0.0)
        if weight is not None:
            own = tl.load(weight + d, there, other=0.0).to(tl.float32)
        partner = own
    else:
        own = tl.load(angles + d, there, other=0.0).to(tl.float32)
        partner = tl.load(angles + HEAD_DIM + d, there, other=0.0).to(tl.float32)
        if weight is not None:
            swapped = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
            own *= tl.load(weight + d, there, other=0.0).to(tl.float32)
            partner *= tl.load(weight + swapped, there, other=0.0).to(tl.float32)
    return own, partner


@triton.jit
def _load_with_partners(heads, mask, d, ROTATE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return [N, BLOCK_D] float32, twice: the elements of `heads`, and the partners that they are
    rotated with if ROTATE.

    heads: the pointers to the first elements of the heads.
    """
    swapped = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
    x = tl.load(heads + d, mask, other=0.0).to(tl.float32)
    y = tl.load(heads + swapped, mask, other=0.0).to(tl.float32) if ROTATE else x
    return x, y


@triton.jit
def _norm_and_rotate(
    x, y, own, partner, eps, NORM: tl.constexpr, ROTATE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Return [N, BLOCK_D] float32: the heads of `_load_with_partners`, normed if NORM, and rotated
    by the factors of `_rotation_factors` if ROTATE."""
    turned = x * own
    if ROTATE:
        turned += y * partner
    if NORM:
        turned *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
    return turned


@triton.jit
def _write_entry(kv_cache, slot, k, v, head, d, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write a token's k and v of one key head, [1, BLOCK_D], to the cache."""
    there = d < HEAD_DIM
    entry = kv_cache + (slot * 2 * NUM_KV_HEADS + head) * HEAD_DIM
    tl.store(entry + d, k, there)
    tl.store(entry + NUM_KV_HEADS * HEAD_DIM + d, v, there)


@triton.jit
def _cache_slots(table, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return the cache positions of the keys from `start` on, int64 [TILE]; they are meaningless
    from `end` on.

    table: the pointer to the row's blocks.
    end: the number of keys that may be loaded.
    """
    keys = start + tl.arange(0, TILE)
    block = tl.load(table + keys // BLOCK_SIZE, keys < end, other=0).to(tl.int64)
    return block * BLOCK_SIZE + keys % BLOCK_SIZE


@triton.jit
def _load_kv(
    kv_cache,
    slots,
    start,
    end,
    head,
    d,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return k and v [TILE, BLOCK_D] of the keys from `start` on, whose cache positions are
    `slots`; they are zero from `end` on."""
    inside = start + tl.arange(0, TILE) < end
    entry = kv_cache + (slots * 2 * NUM_KV_HEADS + head)[:, None] * HEAD_DIM + d
    mask = inside[:, None] & (d < HEAD_DIM)
    k = tl.load(entry, mask, other=0.0)
    v = tl.load(entry + NUM_KV_HEADS * HEAD_DIM, mask, other=0.0)
    return k, v


@triton.jit
def _bounded(scores, cap):
    """Return the scores of a softmax to base 2 under the soft cap, if there is one: cap * tanh.

    scores: scaled so that 2^score is e^2x for the x whose tanh is taken.
    """
    if cap is not None:
        scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))
    return scores


@triton.jit
def _accumulate_tile(
    acc,
    peak,
    total,
    q,
    k,
    v,
    start,
    end,
    last,
    scale,
    cap,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add a tile to an online softmax (Milakov and Gimelshein 2018), and return the new acc [M,
    BLOCK_D], peak and total [M], float32.

    q: [M, BLOCK_D].
    k, v: [TILE, BLOCK_D], the keys and values from `start` on, of which those before `end` exist.
    last: the last key that each query sees, [M, 1] or one for all.
    scale, cap: the scale of scores and their soft cap, for softmax to base 2 (`_bounded`).
    WINDOW: the number of keys up to `last` that a query sees; None if it sees all.
    """
    keys = start + tl.arange(0, TILE)
    scores = _bounded(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, cap)
    seen = (keys < end)[None, :] & (keys[None, :] <= last)
    if WINDOW is not None:
        seen &= keys[None, :] > last - WINDOW
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    base = higher
    if WINDOW is not None:  # A query need not have seen a key yet.
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr):
    """Return the first key that the query at a position sees."""
    return 0 if WINDOW is None else tl.maximum(position - WINDOW + 1, 0)


@triton.jit
def _load_sinks(sinks, head, there):
    """Return the sinks of query heads, float32, as scores of a softmax to base 2."""
    log2e: tl.constexpr = 1.4426950408889634
    return tl.load(sinks + head, there, other=0.0).to(tl.float32) * log2e


@triton.jit
def _keys_per_split(history, splits, TILE: tl.constexpr):
    """Return the number of keys that each split of a row takes: whole tiles, at least one."""
    return tl.maximum(tl.cdiv(tl.cdiv(history, splits), TILE), 1) * TILE


@triton.jit
def _splits_of(singles, splits, wanted, NUM_KV_HEADS: tl.constexpr):
    """Return the number of splits of each row, as `num_splits` has it for `singles` rows."""
    most = tl.minimum(wanted // (singles * NUM_KV_HEADS), splits)
    found = 1
    while 2 * found <= most:
        found *= 2
    return found


@triton.jit(do_not_specialize=["table_stride", "splits", "wanted"])
def _decode(
    qkv,
    positions,
    kv_cache,
    slot_mapping,
    block_table,
    seq_lens,
    query_start_loc,
    survey,
    out,
    partial,
    sums,
    arrived,
    cos_sin,
    q_norm,
    k_norm,
    sinks,
    table_stride,
    splits,
    wanted,
    eps,
    scale,
    cap,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    QUERIES: tl.constexpr,
    FEW_S: tl.constexpr,
    FEW_QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute one row, key head and split. The row's new token belongs to split 0, which has it in
    registers: no program reads an entry that this launch writes.

    query_start_loc, survey: None where every row has one token, and then the grid is [rows,
        num_kv_heads, splits]. Otherwise the programs of a grid of one dimension share the rows that
        the survey counts, in at most `splits` splits of each, and in as many as make `wanted`
        programs; rows of several tokens or none are passed over.
    partial: [rows, num_heads, splits, head_dim] float32, the products before they are divided.
    sums: [rows, num_heads, splits, 2] float32, the highest score and the sum of weights.
    arrived: int32 counters, zero before and after.

    The last three are None where rows are not split. A split beyond the row's history writes
    nothing.
    """
    if survey is None:
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        split = tl.program_id(2)
        token = row
    else:
        singles = tl.load(survey + SINGLES)
        if singles == 0:
            return
        splits = _splits_of(singles, splits, wanted, NUM_KV_HEADS)
        row = (tl.program_id(0) % singles).to(tl.int64)
        head = tl.program_id(0) // singles % NUM_KV_HEADS
        split = tl.program_id(0) // singles // NUM_KV_HEADS
        token = tl.load(query_start_loc + row).to(tl.int64)
        if (split >= splits) | (tl.load(query_start_loc + row + 1) - token != 1):
            return
    history = tl.load(seq_lens + row) - 1
    oldest = _first_seen(history, WINDOW)
    share = _keys_per_split(history - oldest, splits, TILE)
    begin = oldest + split * share
    if (split > 0) & (begin >= history):
        return
    end = tl.minimum(begin + share, history)

    d = tl.arange(0, BLOCK_D)[None, :]
    member = tl.arange(0, BLOCK_G)
    mask = (member[:, None] < GROUP) & (d < HEAD_DIM)
    source = qkv + token * ((GROUP + 2) * NUM_KV_HEADS * HEAD_DIM)
    rotated: tl.constexpr = cos_sin is not None
    angles = cos_sin + tl.load(positions + token) * (2 * HEAD_DIM) if rotated else None
    slot = tl.load(slot_mapping + token)
    table = block_table + row * table_stride
    normed: tl.constexpr = q_norm is not None
    q_own, q_partner = _rotation_factors(angles, q_norm, d, HEAD_DIM)
    k_own, k_partner = _rotation_factors(angles, k_norm, d, HEAD_DIM)
    if sinks is not None:
        sink = _load_sinks(sinks, head * GROUP + member, member < GROUP)
    # These entries were written by earlier steps, and the lengths and the table by a kernel that
    # has ended: between it and this one there is a kernel that calls `wait_and_launch_dependents`,
    # the attention of the layer before or the embedding.
    slots = _cache_slots(table, begin, end, BLOCK_SIZE, TILE)
    keys, values = _load_kv(kv_cache, slots, begin, end, head, d, NUM_KV_HEADS, HEAD_DIM, TILE)
    slots = _cache_slots(table, begin + TILE, end, BLOCK_SIZE, TILE)
    wait_and_launch_dependents(PDL)
    # All loads are issued before anything waits for one of them: each takes as long as a small
    # kernel.
    heads = source + (head * GROUP + member)[:, None] * HEAD_DIM
    key = source + (GROUP * NUM_KV_HEADS + head) * HEAD_DIM
    own_key = (d < HEAD_DIM) & (split == 0)
    q, q_partners = _load_with_partners(heads, mask, d, rotated, HEAD_DIM)
    k, k_partners = _load_with_partners(key, own_key, d, rotated, HEAD_DIM)
    v = tl.load(key + NUM_KV_HEADS * HEAD_DIM + d, own_key, other=0.0)
    q = _norm_and_rotate(q, q_partners, q_own, q_partner, eps, normed, rotated, HEAD_DIM)
    q = q.to(kv_cache.dtype.element_ty)

    if split == 0:
        turned = _norm_and_rotate(k, k_partners, k_own, k_partner, eps, normed, rotated, HEAD_DIM)
        entry = turned.to(kv_cache.dtype.element_ty)
        _write_entry(kv_cache, slot, entry, v, head, d, NUM_KV_HEADS, HEAD_DIM)
        peak = _bounded(tl.sum(q.to(tl.float32) * entry.to(tl.float32), axis=1) * scale, cap)
        total = tl.full([BLOCK_G], 1.0, tl.float32)
        acc = tl.broadcast_to(v.to(tl.float32), [BLOCK_G, BLOCK_D])
        if sinks is not None:
            own = peak
            peak = tl.maximum(own, sink)
            weight = tl.exp2(own - peak)
            total = weight + tl.exp2(sink - peak)
            acc *= weight[:, None]
    else:
        peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    if begin < end:
        acc, peak, total = _accumulate_tile(
            acc, peak, total, q, keys, values, begin, end, end, scale, cap, None, TILE
        )
    for start in range(begin + TILE, end, TILE):
        keys, values = _load_kv(kv_cache, slots, start, end, head, d, NUM_KV_HEADS, HEAD_DIM, TILE)
        slots = _cache_slots(table, start + TILE, end, BLOCK_SIZE, TILE)
        acc, peak, total = _accumulate_tile(
            acc, peak, total, q, keys, values, start, end, end, scale, cap, None, TILE
        )

    # Shares lie in the order of rows, results in that of tokens.
    first = row * (GROUP * NUM_KV_HEADS) + head * GROUP
    out += (token - row) * (GROUP * NUM_KV_HEADS * HEAD_DIM)
    used = tl.maximum(tl.cdiv(history - oldest, share), 1)
    if (partial is None) | (used == 1):
        value = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (first + member)[:, None] * HEAD_DIM + d, value, mask)
    if partial is not None:
        if used > 1:
            place = (first + member) * splits + split
            tl.store(partial + place[:, None] * HEAD_DIM + d, acc, mask)
            tl.store(sums + place * 2, peak, member < GROUP)
            tl.store(sums + place * 2 + 1, total, member < GROUP)
            tl.debug_barrier()  # all stores of this program come before its arrival
            arrival = arrived + row * NUM_KV_HEADS + head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == used - 1:
                tl.store(arrival, 0)
                if used <= FEW_S:
                    _combine(
                        partial,
                        sums,
                        out,
                        first,
                        splits,
                        used,
                        GROUP,
                        HEAD_DIM,
                        BLOCK_D,
                        FEW_S,
                        FEW_QUERIES,
                    )
                else:
                    _combine(
                        partial,
                        sums,
                        out,
                        first,
                        splits,
                        used,
                        GROUP,
                        HEAD_DIM,
                        BLOCK_D,
                        BLOCK_S,
                        QUERIES,
                    )


@triton.jit
def _combine(
    partial,
    sums,
    out,
    first,
    splits,
    used,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Combine the results of the splits, BLOCK_S of them at most, for the GROUP query heads of a
    row from `first` on, QUERIES at a time. They are loaded past the L1 cache, because other
    programs have written them."""
    for begin in range(0, GROUP, QUERIES):
        query = begin + tl.arange(0, QUERIES)[:, None, None]
        split = tl.arange(0, BLOCK_S)[None, :, None]
        d = tl.arange(0, BLOCK_D)[None, None, :]
        place = (first + query) * splits + split
        there = (split < used) & (query < GROUP)
        source = partial + place * HEAD_DIM + d
        acc = tl.load(source, there & (d < HEAD_DIM), other=0.0, cache_modifier=".cg")
        peak = tl.load(sums + place * 2, there, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(sums + place * 2 + 1, there, other=0.0, cache_modifier=".cg")
        highest = tl.max(peak, axis=1, keep_dims=True)
        weight = tl.where(split < used, tl.exp2(peak - highest), 0.0)
        value = tl.sum(acc * weight, axis=1, keep_dims=True)
        value /= tl.sum(total * weight, axis=1, keep_dims=True)
        place = out + (first + query) * HEAD_DIM + d
        tl.store(place, value.to(out.dtype.element_ty), (query < GROUP) & (d < HEAD_DIM))


@triton.jit(do_not_specialize=["rows", "fewest"])
def _prepare(
    qkv,
    positions,
    kv_cache,
    slot_mapping,
    query_start_loc,
    queries,
    survey,
    out,
    cos_sin,
    q_norm,
    k_norm,
    rows,
    fewest,
    eps,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Prepare one token: write its entries to the cache and its queries to `queries` [num_kv_heads,
    T, group, head_dim], in the model's dtype; write zeros to `out` if it is padding. One program
    surveys the rows for the kernels behind this one."""
    token = tl.program_id(0).to(tl.int64)
    if token == 0:
        survey_rows(query_start_loc, survey, rows, fewest, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)[None, :]
    num_heads: tl.constexpr = GROUP * NUM_KV_HEADS
    source = qkv + token * ((GROUP + 2) * NUM_KV_HEADS * HEAD_DIM)
    rotated: tl.constexpr = cos_sin is not None
    angles = cos_sin + tl.load(positions + token) * (2 * HEAD_DIM) if rotated else None
    slot = tl.load(slot_mapping + token)
    normed: tl.constexpr = q_norm is not None
    head = tl.arange(0, BLOCK_K)[:, None]
    mask = (head < NUM_KV_HEADS) & (d < HEAD_DIM)
    key = source + (num_heads + head) * HEAD_DIM
    own, partner = _rotation_factors(angles, k_norm, d, HEAD_DIM)
    k, partners = _load_with_partners(key, mask, d, rotated, HEAD_DIM)
    k = _norm_and_rotate(k, partners, own, partner, eps, normed, rotated, HEAD_DIM).to(
        kv_cache.dtype.element_ty
    )
    v = tl.load(key + NUM_KV_HEADS * HEAD_DIM + d, mask, other=0.0)
    entry = kv_cache + (slot * 2 * NUM_KV_HEADS + head) * HEAD_DIM + d
    tl.store(entry, k, mask)
    tl.store(entry + NUM_KV_HEADS * HEAD_DIM, v, mask)
    head = tl.arange(0, BLOCK_H)[:, None]
    mask = (head < num_heads) & (d < HEAD_DIM)
    own, partner = _rotation_factors(angles, q_norm, d, HEAD_DIM)
    q, partners = _load_with_partners(source + head * HEAD_DIM, mask, d, rotated, HEAD_DIM)
    q = _norm_and_rotate(q, partners, own, partner, eps, normed, rotated, HEAD_DIM).to(
        queries.dtype.element_ty
    )
    place = (head // GROUP * tl.num_programs(0) + token) * GROUP + head % GROUP
    tl.store(queries + place * HEAD_DIM + d, q, mask)
    if token >= tl.load(query_start_loc + rows):
        padding = out + (token * num_heads + head) * HEAD_DIM + d
        tl.store(padding, tl.zeros([BLOCK_H, BLOCK_D], out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["table_stride", "tokens", "rows", "fewest"])
def _attend(
    queries,
    kv_cache,
    block_table,
    seq_lens,
    query_start_loc,
    out,
    sinks,
    table_stride,
    tokens,
    rows,
    fewest,
    scale,
    cap,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute one key head and tile: BLOCK_Q tokens of a row, and for each the head's group of
    queries. Rows of fewer than `fewest` tokens are left out.

    queries: [num_kv_heads, T, group, head_dim].
    """
    head = tl.program_id(1)
    row, first, count, begin = locate(tl.program_id(0), 0, rows, query_start_loc, BLOCK_Q)
    if (begin >= count) | (count < fewest):
        return
    history = tl.load(seq_lens + row) - count
    end = history + tl.minimum(begin + BLOCK_Q, count)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    query = begin + m // GROUP
    there = (m < BLOCK_Q * GROUP) & (query < count)
    mask = there[:, None] & (d < HEAD_DIM)
    token = (first + query).to(tl.int64)
    place = ((head * tokens + token) * GROUP + m % GROUP)[:, None] * HEAD_DIM + d
    q = tl.load(queries + place, mask, other=0.0)
    last = (history + query)[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        peak = _load_sinks(sinks, head * GROUP + m % GROUP, there)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    table = block_table + row.to(tl.int64) * table_stride
    for start in range(_first_seen(history + begin, WINDOW), end, TILE):
        slots = _cache_slots(table, start, end, BLOCK_SIZE, TILE)
        k, v = _load_kv(kv_cache, slots, start, end, head, d, NUM_KV_HEADS, HEAD_DIM, TILE)
        acc, peak, total = _accumulate_tile(
            acc, peak, total, q, k, v, start, end, last, scale, cap, WINDOW, TILE
        )
    place = (token * (GROUP * NUM_KV_HEADS) + head * GROUP + m % GROUP)[:, None] * HEAD_DIM + d
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask)

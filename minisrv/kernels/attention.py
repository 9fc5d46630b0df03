"""Attention: q/k-norm, rotation, cache write and paged attention in one function.

It takes q, k and v packed as the projection leaves them. This is the version for CPUs, and the
choice between it and the version for CUDA, `triton_attention.py`. Rows of one query, where the work
is to read K and V rather than to multiply, are done by `cpu.c`. Rows of several queries are matrix
products and are done by torch, which does everything, row by row, if there is no compiler. Knows:
the layout of the paged cache, and how a step's tokens belong to its rows (requests). Knows nothing
of requests, graphs or the forward context.

Cache entries beyond a row's length, which may be NaN, are never read for a real row: masking them
would not be enough, because 0 * NaN is NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from struct import Struct
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minisrv.kernels.attention_arguments import AttentionLayer, AttentionMetadata
from minisrv.kernels.native import LANES, MAX_HEAD_DIM, MAX_HEADS, MAX_QUERY, native


def attention(
    layer: AttentionLayer,
    qkv: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
) -> None:
    """Causal attention of T tokens in R rows over a paged cache; writes `layer.kv_cache` and `out`.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], before norm and rotation; not changed.
    positions: [T] int64.
    out: [T, num_heads * head_dim]; zero beyond query_start_loc[R].

    Every token writes its cache entry, those of padding too, and all of them write before any
    reads. All floating point tensors have the same dtype, and the arithmetic is float32. Grouped
    queries share their key head without copies of it: query head h uses key head h // (num_heads //
    num_kv_heads).
    """
    function = _by_triton() if qkv.is_cuda else attention_on_cpu
    function(layer, qkv, positions, metadata, out)


def attention_on_cpu(
    layer: AttentionLayer,
    qkv: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
) -> None:
    """Compute `attention` for tensors of a CPU. Lengths are at hand here, so `max_query_len` is not
    read."""
    tokens, kv_cache, head_dim = qkv.shape[0], layer.kv_cache, layer.head_dim
    num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
    block_table, seq_lens = metadata.block_table, metadata.seq_lens
    query_start_loc, group = metadata.query_start_loc, num_heads // num_kv_heads
    queries = torch.empty(tokens, num_kv_heads, group, head_dim, dtype=torch.float32)
    kernel = _compiled(qkv.dtype, group, head_dim, layer.scale)
    if kernel is not None:
        arguments = _ARGUMENTS.pack(
            qkv.data_ptr(),
            positions.data_ptr(),
            kv_cache.data_ptr(),
            metadata.slot_mapping.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            query_start_loc.data_ptr(),
            out.data_ptr(),
            layer.cos_sin.data_ptr(),
            0 if layer.q_norm is None else layer.q_norm.data_ptr(),
            0 if layer.k_norm is None else layer.k_norm.data_ptr(),
            queries.data_ptr(),
            tokens,
            len(seq_lens),
            num_heads,
            num_kv_heads,
            head_dim,
            kv_cache.shape[1],
            block_table.stride(0),
            torch.get_num_threads(),
            layer.eps,
        )
        if kernel(arguments) == 0:
            return
    else:
        heads = qkv.view(tokens, -1, head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        angles = layer.cos_sin.index_select(0, positions).float()
        q, k = (
            _rotate(_norm(x.float(), weight, layer.eps), angles)
            for x, weight in ((q, layer.q_norm), (k, layer.k_norm))
        )
        queries.copy_(q.mul_(layer.scale).view_as(queries))
        entries = torch.stack((k.to(v.dtype), v), dim=1)
        kv_cache.flatten(0, 1).index_copy_(0, metadata.slot_mapping, entries)
        out[int(query_start_loc[-1]) :].zero_()

    cache = kv_cache.flatten(0, 1)
    results = out.view_as(queries)
    starts, lengths, table = query_start_loc.tolist(), seq_lens.tolist(), block_table.numpy()
    offsets, block_size = np.arange(kv_cache.shape[1]), kv_cache.shape[1]
    for row, (first, last) in enumerate(pairwise(starts)):
        if last - first > (1 if kernel is not None else 0):
            blocks = table[row, : -(-lengths[row] // block_size), None].astype(np.int64)
            places = torch.from_numpy((blocks * block_size + offsets).reshape(-1)[: lengths[row]])
            k, v = cache.index_select(0, places).float().permute(1, 2, 0, 3)
            _attend(queries[first:last], results[first:last], k, v)


@cache
def _by_triton() -> Callable[..., None]:
    """Return the version for CUDA. It is imported late because Triton may be missing where there is
    no GPU, and takes long to import."""
    from minisrv.kernels.triton_attention import attention

    return attention


_ARGUMENTS = Struct("20qd")
"""Layout of `struct attention` in `cpu.c`: twelve addresses, eight numbers, eps."""


@cache
def _compiled(
    dtype: torch.dtype, group: int, head_dim: int, scale: float
) -> Callable[[bytes], int] | None:
    """Return the function of `cpu.c` for this dtype, these sizes and this scale, or None if there
    is none. The function takes packed `_ARGUMENTS`, and returns the number of rows that have
    several queries, which are left to the caller."""
    library = native()
    fits = (
        head_dim % LANES == 0
        and head_dim <= MAX_HEAD_DIM
        and group <= MAX_HEADS
        and group * head_dim <= MAX_QUERY
        and scale == head_dim**-0.5
    )
    if library is None or not fits or dtype not in (torch.float32, torch.bfloat16):
        return None
    function = library[f"attention_{str(dtype).removeprefix('torch.')}"]
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return cast(Callable[[bytes], int], function)


def _norm(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return the RMSNorm of each of `heads` [T, n, head_dim] float32."""
    return heads if weight is None else torch.rms_norm(heads, weight.shape, weight.float(), eps)


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotate each of `heads` [T, n, head_dim] by its token's angles [T, 2 * head_dim]."""
    cos, sin = angles[:, None].chunk(2, dim=-1)
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)


def _attend(queries: Tensor, results: Tensor, k: Tensor, v: Tensor) -> None:
    """Compute one row: the last n queries of a sequence, [n, num_kv_heads, group, head_dim] float32
    and scaled, against its k and v [num_kv_heads, length, head_dim] float32."""
    n, length, group = queries.shape[0], k.shape[1], queries.shape[2]
    mask = None
    if 1 < n < length:
        mask = torch.ones(n, length, dtype=torch.bool).tril_(length - n)
    # The group takes the place of the batch: one copy of k and v serves all of it.
    value = scaled_dot_product_attention(
        queries.permute(2, 1, 0, 3),
        k.expand(group, -1, -1, -1),
        v.expand(group, -1, -1, -1),
        mask,
        is_causal=n == length,
        scale=1.0,
    )
    results.copy_(value.permute(2, 1, 0, 3))

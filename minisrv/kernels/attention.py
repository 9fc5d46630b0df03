"""Attention: q/k-norm, rotation, cache write and paged attention in one function.

It takes q, k and v packed as the projection leaves them. This is the version for CPUs, and the
choice between it and the version for CUDA, `triton_attention.py`. Rows of one query, where the work
is to read K and V rather than to multiply, are done by `cpu.c`. Rows of several queries are matrix
products and are done by torch, which does everything, row by row, if there is no compiler. Knows:
the layout of the paged cache, and how a step's tokens belong to its rows (requests). Knows nothing
of requests, graphs or the forward context.

Cache entries that no query of a row sees, which may be NaN, are never read for a real row, neither
those beyond its length nor those before its sliding window: masking them would not be enough,
because 0 * NaN is NaN.
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
from minisrv.kernels.native import LANES, MAX_HEADS, MAX_QUERY, native


def attention(
    layer: AttentionLayer,
    qkv: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata,
    out: Tensor,
) -> None:
    """Causal attention of T tokens in R rows over a paged cache; writes `layer.kv_cache` and `out`.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], before the norm and rotation that the layer
        has; not changed.
    positions: [T] int64.
    out: [T, num_heads * head_dim]; zero beyond query_start_loc[R].

    Every token writes its cache entry, those of padding too, and all of them write before any
    reads. All floating point tensors have the same dtype, and the arithmetic is float32. Grouped
    queries share their key head without copies of it: query head h uses key head h // (num_heads //
    num_kv_heads).
    """
    function = attention_on_cpu if qkv.is_cpu else _by_triton()
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
    kernel = _compiled(qkv.dtype, group, head_dim)
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
            _address(layer.cos_sin),
            _address(layer.q_norm),
            _address(layer.k_norm),
            _address(layer.sinks),
            queries.data_ptr(),
            tokens,
            len(seq_lens),
            num_heads,
            num_kv_heads,
            head_dim,
            kv_cache.shape[1],
            block_table.stride(0),
            torch.get_num_threads(),
            layer.sliding_window or NO_WINDOW,
            layer.eps,
            layer.scale,
            layer.logit_soft_cap or 0.0,
        )
        if kernel(arguments) == 0:
            return
    else:
        heads = qkv.view(tokens, -1, head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        q, k = _norm(q.float(), layer.q_norm, layer.eps), _norm(k.float(), layer.k_norm, layer.eps)
        if layer.cos_sin is not None:
            angles = layer.cos_sin.index_select(0, positions).float()
            q, k = _rotate(q, angles), _rotate(k, angles)
        torch.mul(q, layer.scale, out=queries.view_as(q))
        entries = torch.stack((k.to(v.dtype), v), dim=1)
        kv_cache.flatten(0, 1).index_copy_(0, metadata.slot_mapping, entries)
        out[int(query_start_loc[-1]) :].zero_()

    cache = kv_cache.flatten(0, 1)
    results = out.view_as(queries)
    starts, lengths, table = query_start_loc.tolist(), seq_lens.tolist(), block_table.numpy()
    offsets, block_size = np.arange(kv_cache.shape[1]), kv_cache.shape[1]
    window = layer.sliding_window or NO_WINDOW
    by_scores = layer.logit_soft_cap is not None or layer.sinks is not None
    attend = _attend_by_scores if by_scores else _attend
    for row, (first, last) in enumerate(pairwise(starts)):
        if last - first > (1 if kernel is not None else 0):
            unseen = max(lengths[row] - (last - first) - window + 1, 0)
            skipped, before = divmod(unseen, block_size)
            blocks = table[row, skipped : -(-lengths[row] // block_size), None].astype(np.int64)
            slots = (blocks * block_size + offsets).reshape(-1)
            places = torch.from_numpy(slots[before : before + lengths[row] - unseen])
            k, v = cache.index_select(0, places).float().permute(1, 2, 0, 3)
            attend(layer, queries[first:last], results[first:last], k, v)


@cache
def _by_triton() -> Callable[..., None]:
    """Return the version for CUDA. It is imported late because Triton may be missing where there is
    no GPU, and takes long to import."""
    from minisrv.kernels.triton_attention import attention

    return attention


def _address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's elements, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


NO_WINDOW = 2**62
"""A number of positions beyond the length of any sequence."""

MAX_SCORES = 1 << 20
"""Maximum number of scores that `_attend_by_scores` computes at once, 4 MiB of float32, unless
those of one query are more."""

_ARGUMENTS = Struct("22q3d")
"""Layout of `struct attention` in `cpu.c`: thirteen addresses, nine integers, and eps, scale and
soft cap."""


@cache
def _compiled(dtype: torch.dtype, group: int, head_dim: int) -> Callable[[bytes], int] | None:
    """Return the function of `cpu.c` for this dtype and these sizes, or None if there is none. The
    function takes packed `_ARGUMENTS`, and returns the number of rows that have several queries,
    which are left to the caller."""
    library = native()
    fits = head_dim % LANES == 0 and group <= MAX_HEADS and group * head_dim <= MAX_QUERY
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


def _attend(layer: AttentionLayer, queries: Tensor, results: Tensor, k: Tensor, v: Tensor) -> None:
    """Compute one row: the last n queries of a sequence, [n, num_kv_heads, group, head_dim] float32
    and scaled, against all entries of the sequence that one of them sees: k and v [num_kv_heads,
    length, head_dim] float32."""
    n, length, group = queries.shape[0], k.shape[1], queries.shape[2]
    window = layer.sliding_window or NO_WINDOW
    is_causal = n == length <= window
    # The group takes the place of the batch: one copy of k and v serves all of it.
    value = scaled_dot_product_attention(
        queries.permute(2, 1, 0, 3),
        k.expand(group, -1, -1, -1),
        v.expand(group, -1, -1, -1),
        None if is_causal or n == 1 else _mask(n, length, length - n, window),
        is_causal=is_causal,
        scale=1.0,
    )
    results.copy_(value.permute(2, 1, 0, 3))


def _attend_by_scores(
    layer: AttentionLayer, queries: Tensor, results: Tensor, k: Tensor, v: Tensor
) -> None:
    """Compute what `_attend` does, with the soft cap and the sinks of the layer, which
    `scaled_dot_product_attention` does not have."""
    (n, num_kv_heads, group, head_dim), length = queries.shape, k.shape[1]
    window = layer.sliding_window or NO_WINDOW
    most = max(1, MAX_SCORES // (layer.num_heads * length))
    for first in range(0, n, most):
        q, out = (x[first : first + most].permute(1, 2, 0, 3) for x in (queries, results))
        position = length - n + first
        begin, end = max(position - window + 1, 0), position + q.shape[2]
        scores = q.reshape(num_kv_heads, -1, head_dim) @ k[:, begin:end].mT
        scores = scores.view(*q.shape[:3], end - begin)
        if layer.logit_soft_cap is not None:
            scores.div_(layer.logit_soft_cap).tanh_().mul_(layer.logit_soft_cap)
        seen = _mask(q.shape[2], end - begin, position - begin, window)
        scores.masked_fill_(~seen, -torch.inf)
        if layer.sinks is not None:
            sinks = layer.sinks.float().view(num_kv_heads, group, 1, 1)
            scores = torch.cat((scores, sinks.expand(*q.shape[:3], 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., : end - begin]
        out.copy_((weights.flatten(1, 2) @ v[:, begin:end]).view(q.shape))


def _mask(n: int, length: int, first: int, window: int) -> Tensor:
    """Return [n, length] bool: which of the positions from 0 to length - 1 are seen by those from
    `first` to first + n - 1."""
    seen = torch.ones(n, length, dtype=torch.bool).tril_(first)
    return seen if window >= length else seen.triu_(first - window + 1)

"""The attention op: q/k-norm, rotation, cache write and paged attention in one.

It takes q, k and v packed as the projection leaves them, and tensors only, so that a graph may
break at it. This is the version for CPUs; the version for CUDA is `triton_attention.py`. Rows of
one query, where the work is to read K and V rather than to multiply, are done by `cpu.c`. Rows of
several queries are matrix products and are done by torch, which does everything, row by row, if
there is no compiler. Knows: the layout of the paged cache, and how a step's tokens belong to its
rows (requests). Knows nothing of requests, graphs or the forward context.

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

from minisrv.kernels.native import LANES, MAX_HEAD_DIM, MAX_HEADS, MAX_QUERY, native

_SCHEMA = (
    "(Tensor qkv, Tensor positions, Tensor(a!) kv_cache, Tensor slot_mapping, "
    "Tensor block_table, Tensor seq_lens, Tensor query_start_loc, Tensor(b!) out, *, "
    "int max_query_len, Tensor cos_sin, Tensor? q_norm, Tensor? k_norm, float eps, int num_heads, "
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
    max_query_len: int,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Causal attention of T tokens in R rows over a paged cache; writes `kv_cache` and `out`.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], before norm and rotation; not changed.
    positions: [T] int64.
    kv_cache: [num_blocks, block_size, 2 (k, v), num_kv_heads, head_dim].
    slot_mapping: [T] int64; every token writes its entry, those of padding too (to the null block),
        and all of them write before any reads.
    block_table: [R, max_blocks] int32.
    seq_lens: [R] int32, the number of tokens of each row in the cache, including those of this
        step.
    query_start_loc: [R + 1] int32, monotone; a row's tokens are the last of its sequence. A row may
        be empty, and is skipped then.
    out: [T, num_heads * head_dim]; zero beyond query_start_loc[R].
    max_query_len: an upper bound of the number of tokens in a row. 1 means that every row has
        exactly one token and that there are no other tokens. The kernels for CUDA are chosen by it,
        because their lengths are on the device; here the lengths are at hand, and it is not read.
    cos_sin: [max_positions, 2 * head_dim], the table of `nn.rope`.
    q_norm, k_norm: [head_dim] RMSNorm weights, both or neither.

    All floating point tensors have the same dtype, and the arithmetic is float32. Grouped queries
    share their key head without copies of it: query head h uses key head h // (num_heads //
    num_kv_heads).
    """
    tokens, group = qkv.shape[0], num_heads // num_kv_heads
    queries = torch.empty(tokens, num_kv_heads, group, head_dim, dtype=torch.float32)
    kernel = _compiled(qkv.dtype, group, head_dim)
    if kernel is not None:
        arguments = _ARGUMENTS.pack(
            qkv.data_ptr(),
            positions.data_ptr(),
            kv_cache.data_ptr(),
            slot_mapping.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            query_start_loc.data_ptr(),
            out.data_ptr(),
            cos_sin.data_ptr(),
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            queries.data_ptr(),
            tokens,
            len(seq_lens),
            num_heads,
            num_kv_heads,
            head_dim,
            kv_cache.shape[1],
            block_table.stride(0),
            torch.get_num_threads(),
            eps,
        )
        if kernel(arguments) == 0:
            return
    else:
        heads = qkv.view(tokens, -1, head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        angles = cos_sin.index_select(0, positions).float()
        q, k = (
            _rotate(_norm(x.float(), weight, eps), angles)
            for x, weight in ((q, q_norm), (k, k_norm))
        )
        queries.copy_(q.mul_(head_dim**-0.5).view_as(queries))
        kv_cache.flatten(0, 1).index_copy_(0, slot_mapping, torch.stack((k.to(v.dtype), v), dim=1))
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


torch.library.define("minisrv::attention", _SCHEMA)
torch.library.impl("minisrv::attention", "cpu", attention)
torch.library.impl(
    "minisrv::attention", "cuda", lambda *args, **kwargs: _by_triton()(*args, **kwargs)
)
torch.library.register_fake("minisrv::attention", lambda *args, **kwargs: None)

attention_op = torch.ops.minisrv.attention.default
"""The op that a layer calls, so that code which records or traces operations sees one."""


_ARGUMENTS = Struct("20qd")
"""Layout of `struct attention` in `cpu.c`: twelve addresses, eight numbers, eps."""


@cache
def _compiled(dtype: torch.dtype, group: int, head_dim: int) -> Callable[[bytes], int] | None:
    """Return the function of `cpu.c` for this dtype and these sizes, or None if there is none. The
    function takes packed `_ARGUMENTS`, and returns the number of rows that have several queries,
    which are left to the caller."""
    library = native()
    fits = (
        head_dim % LANES == 0
        and head_dim <= MAX_HEAD_DIM
        and group <= MAX_HEADS
        and group * head_dim <= MAX_QUERY
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

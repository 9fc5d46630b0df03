"""Attention of prompts on Hopper's tensor cores, in Gluon.

Gluon is Triton's language with explicit layouts, warps and barriers. This kernel takes the place of
`triton_attention._attend` where `supports` says so. It computes the same function of the same
arguments; what differs is how the tensor cores are fed (FlashAttention-3, Shah et al. 2024):

- A program has two or three warp groups that multiply (consumers), each of them 64 rows of queries,
  and one warp that only loads (the producer). Tiles of K and V lie in a ring of stages in shared
  memory. The producer fills a stage when all consumers have released it, and so runs ahead of them,
  also into the program's next tile of queries.
- The producer asks for each page (one block of the cache, one head) by one instruction per 64
  columns, which the tensor memory accelerator (TMA) carries out: it computes the addresses and
  writes the page in the swizzled layout that the tensor cores read. Pages behind the end of a row
  are requested at an address outside of the cache, for which the TMA writes zeros.
- A consumer multiplies its queries with the next tile of K while it multiplies the weights of the
  last tile with V; only tiles that some of its queries do not see completely are masked.
- There are as many programs as SMs, and each takes the next tile of queries when it has loaded its
  last. The last tile of a row, which sees most keys, comes first.

On an H200 it takes 40 us for a prompt of 2,048 tokens and 432 us for one of 8,192 (16 heads of 128,
8 key heads), where `_attend` takes 101 and 1,027, and torch's attention, which has no pages, 56 and
489.

Knows: the layout of the cache, and queries as `triton_attention` prepares them. Knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minisrv.kernels.attention_arguments import AttentionLayer, AttentionMetadata
from minisrv.kernels.gpu import gpu_of
from minisrv.kernels.triton_launch import multiprocessors
from minisrv.kernels.triton_ragged import (
    END_ROW,
    END_TILE,
    FIRST_ROW,
    FIRST_TILE,
    NEXT_TILE,
    locate,
    num_tiles,
)

HOPPER = 9
"""Major compute capability of the only GPUs that have these instructions."""

ROWS = 64
"""Number of rows of queries that a warp group multiplies."""

TILE = 128
"""Number of keys in a tile of K and V."""

COLUMNS = 64
"""Number of elements in 128 bytes, the widest row that the TMA swizzles."""

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
"""The layout of all operands in shared memory. COLUMNS columns of all rows lie one behind the
other, so that the parts of pages that the TMA writes one by one form a tile."""

BLOCK_SIZES = (8, 16, 32, 64, 128)
"""Block sizes of the cache: a tile consists of whole pages, and the swizzling repeats after 8
rows."""


class Shape(NamedTuple):
    """The shape of a program, by the size of a head.

    stages: the number of tiles of K, and of V, in shared memory.
    groups: the maximum number of warp groups that multiply.
    """

    stages: int
    groups: int


SHAPES = {64: Shape(stages=3, groups=3), 128: Shape(stages=2, groups=2)}
"""The shapes for the sizes of heads that there is a kernel for. With heads of 64 the exponentials
take as long as the products, and a third warp group has registers enough to fill the gaps; with
heads of 128 it would not."""

HEAD, FIRST, COUNT, POSITION, END = (gl.constexpr(number) for number in range(5))
"""Places of the numbers that the producer hands over with a tile of queries: its key head, its
first token in the step, the number of the row's tokens from there on, the position of the first of
them, and the number of keys that any of its queries sees, which is 0 in the end."""


def _is_hopper(device: torch.device) -> bool:
    gpu = gpu_of(device)
    return gpu is not None and gpu.capability[0] == HOPPER


def supports(layer: AttentionLayer, device: torch.device) -> bool:
    """Whether this kernel computes the layer's attention on the device: on Hopper, for bfloat16 and
    float16, the sizes of heads and blocks in SHAPES and BLOCK_SIZES, and groups of at most ROWS
    heads, without sliding window, soft cap and sinks."""
    return (
        _is_hopper(device)
        and layer.kv_cache.dtype in (torch.bfloat16, torch.float16)
        and layer.head_dim in SHAPES
        and layer.kv_cache.shape[1] in BLOCK_SIZES
        and layer.num_heads // layer.num_kv_heads <= ROWS
        and layer.sliding_window is None
        and layer.logit_soft_cap is None
        and layer.sinks is None
    )


def num_groups(most: int, tokens: int, num_kv_heads: int, group: int, sms: int) -> int:
    """Return the number of warp groups that multiply, at most `most`: two where the tiles of such
    programs all fit on the SMs at once, because fewer, larger ones would leave SMs without work."""
    return 2 if tokens // (2 * (ROWS // group)) * num_kv_heads <= sms else most


def block_q(layer: AttentionLayer, tokens: int, device: torch.device) -> int:
    """Return the number of tokens in a tile of queries, for a step of `tokens` tokens."""
    group = layer.num_heads // layer.num_kv_heads
    most = SHAPES[layer.head_dim].groups
    groups = num_groups(most, tokens, layer.num_kv_heads, group, multiprocessors(device))
    return groups * (ROWS // group)


def attend(
    layer: AttentionLayer,
    queries: Tensor,
    metadata: AttentionMetadata,
    survey: Tensor,
    scale: float,
    fewest: int,
    out: Tensor,
) -> None:
    """Compute the attention of prepared queries over the cache.

    queries: [num_kv_heads, T, group, head_dim], normed and rotated.
    survey: the survey of the step's rows for tiles of `block_q` tokens.
    scale: the factor of scores for a softmax to base 2.
    fewest: the number of tokens that a row must have, or it is left out.
    out: [T, num_heads * head_dim]; only the tokens of rows are written.
    """
    num_kv_heads, tokens, group, head_dim = queries.shape
    rows, block_size = metadata.seq_lens.shape[0], layer.kv_cache.shape[1]
    tile = block_q(layer, tokens, queries.device)
    programs = num_tiles(tokens, rows, tile) * num_kv_heads
    _attend[(min(multiprocessors(queries.device), programs),)](
        TensorDescriptor.from_tensor(queries.view(-1, head_dim), [ROWS, COLUMNS], SWIZZLED),
        TensorDescriptor.from_tensor(
            layer.kv_cache.view(-1, 2 * num_kv_heads * head_dim), [block_size, COLUMNS], SWIZZLED
        ),
        metadata.block_table,
        metadata.seq_lens,
        metadata.query_start_loc,
        survey,
        out,
        metadata.block_table.stride(0),
        tokens,
        fewest,
        scale,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        TILE=TILE,
        STAGES=SHAPES[head_dim].stages,
        GROUPS=tile // (ROWS // group),
        num_warps=4,
    )


@gluon.jit(do_not_specialize=["table_stride", "tokens", "fewest"])
def _attend(
    queries,
    kv_cache,
    block_table,
    seq_lens,
    query_start_loc,
    survey,
    out,
    table_stride,
    tokens,
    fewest,
    scale,
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Compute tiles of queries until all have been taken. A tile has ROWS // GROUP tokens for each
    warp group, and for each token the GROUP queries of one key head.

    queries: the descriptor of the prepared queries, one in a row; its box is [ROWS, COLUMNS].
    kv_cache: the descriptor of the cache, one token in a row; its box is [BLOCK_SIZE, COLUMNS].
    """
    box: gl.constexpr = queries.block_shape
    page: gl.constexpr = kv_cache.block_shape
    parts: gl.constexpr = HEAD_DIM // box[1]
    pages: gl.constexpr = STAGES * parts * (TILE // page[0])
    dtype: gl.constexpr = queries.dtype
    swizzled: gl.constexpr = queries.layout
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    # Each is what is handed over, with the barriers that tell that it is there and may be replaced.
    work = (
        gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [GROUPS * parts, box[0], box[1]], swizzled),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
    )
    keys = (
        gl.allocate_shared_memory(dtype, [pages, page[0], page[1]], swizzled),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
    )
    values = (
        gl.allocate_shared_memory(dtype, [pages, page[0], page[1]], swizzled),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
    )
    mbarrier.init(work[2], count=2)
    mbarrier.init(work[3], count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys[1].index(stage), count=1)
        mbarrier.init(keys[2].index(stage), count=GROUPS)
        mbarrier.init(values[1].index(stage), count=1)
        mbarrier.init(values[2].index(stage), count=GROUPS)
    fence_async_shared()

    # The last argument of a consumer is its number. Registers are moved from the producer to the
    # consumers: the lists are of warps and registers, without those of the first consumer, which
    # has four warps and the registers that are left.
    memory = (work, keys, values)
    step = (block_table, seq_lens, query_start_loc, survey, table_stride, tokens, fewest)
    loaded = (queries, kv_cache, step, memory)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, scale, memory, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE, 0)),
                (_consume, (out, scale, memory, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE, 1)),
                (_produce, (loaded, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (out, scale, memory, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE, 0)),
                (_consume, (out, scale, memory, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE, 1)),
                (_consume, (out, scale, memory, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE, 2)),
                (_produce, (loaded, GROUP, NUM_KV_HEADS, HEAD_DIM, TILE)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _produce(
    loaded,
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
):
    """Take tiles of queries and load what they need, for the consumers of this program.

    For each tile that is not empty, in a row of `fewest` tokens or more, the consumers get its
    queries and the numbers that describe it.
    """
    queries, kv_cache, step, memory = loaded
    block_table, seq_lens, query_start_loc, survey, table_stride, tokens, fewest = step
    work, keys, values = memory
    fields, parts_of_queries, full, empty = work
    group_rows: gl.constexpr = queries.block_shape[0]
    columns: gl.constexpr = queries.block_shape[1]
    block_size: gl.constexpr = kv_cache.block_shape[0]
    stages: gl.constexpr = keys[1].shape[0]
    parts: gl.constexpr = HEAD_DIM // columns
    groups: gl.constexpr = parts_of_queries.shape[0] // parts
    group_tokens: gl.constexpr = group_rows // GROUP
    block_q: gl.constexpr = groups * group_tokens
    field = gl.arange(0, 8, gl.BlockedLayout([1], [32], [1], [0]))
    filled = gl.to_tensor(0)
    handed = gl.to_tensor(0)
    taken = gl.program_id(0)
    end_tile = gl.load(survey + END_TILE)
    tiles = end_tile - gl.load(survey + FIRST_TILE)
    first_row, end_row = gl.load(survey + FIRST_ROW), gl.load(survey + END_ROW)
    while taken < tiles * NUM_KV_HEADS:
        head = taken % NUM_KV_HEADS
        tile = end_tile - 1 - taken // NUM_KV_HEADS
        row, first, count, begin = locate(tile, first_row, end_row, query_start_loc, block_q)
        if (begin < count) & (count >= fewest):
            history = gl.load(seq_lens + row) - count
            end = history + gl.minimum(begin + block_q, count)
            mbarrier.wait(empty, (handed & 1) ^ 1)
            value = gl.where(field == HEAD, head, first + begin)
            value = gl.where(field == COUNT, count - begin, value)
            value = gl.where(field == POSITION, history + begin, value)
            fields.store(gl.where(field == END, end, value))
            mbarrier.arrive(full, count=1)
            mbarrier.expect(full, groups * group_rows * HEAD_DIM * 2)
            for group in gl.static_range(groups):
                query = (head * tokens + first + begin + group * group_tokens) * GROUP
                for part in gl.static_range(parts):
                    tma.async_copy_global_to_shared(
                        queries,
                        [query, part * columns],
                        full,
                        parts_of_queries.index(group * parts + part),
                    )
            handed += 1
            table = block_table + row.to(gl.int64) * table_stride
            for start in range(0, end, TILE):
                places = ()
                for page in gl.static_range(TILE // block_size):
                    key = start + page * block_size
                    block = gl.load(table + key // block_size, key < end, other=-1)
                    places = places + (block * block_size,)
                stage = filled % stages
                phase = (filled // stages) & 1
                column = head * HEAD_DIM
                _load_tile(kv_cache, places, column, keys, stage, phase, HEAD_DIM, TILE)
                column += NUM_KV_HEADS * HEAD_DIM
                _load_tile(kv_cache, places, column, values, stage, phase, HEAD_DIM, TILE)
                filled += 1
        taken = gl.atomic_add(survey + NEXT_TILE, 1) + gl.num_programs(0)
    mbarrier.wait(empty, (handed & 1) ^ 1)
    fields.store(gl.zeros_like(field))
    mbarrier.arrive(full, count=1)
    mbarrier.arrive(full, count=1)


@gluon.jit
def _load_tile(
    kv_cache, places, column, ring, stage, phase, HEAD_DIM: gl.constexpr, TILE: gl.constexpr
):
    """Have a stage filled with the pages at `places`, cache positions that are negative for pages
    of zeros, from `column` on."""
    pages, full, empty = ring
    columns: gl.constexpr = kv_cache.block_shape[1]
    parts: gl.constexpr = HEAD_DIM // columns
    count: gl.constexpr = TILE // kv_cache.block_shape[0]
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), TILE * HEAD_DIM * 2)
    for page in gl.static_range(count):
        for part in gl.static_range(parts):
            tma.async_copy_global_to_shared(
                kv_cache,
                [places[page], column + part * columns],
                full.index(stage),
                pages.index((stage * parts + part) * count + page),
            )


@gluon.jit
def _consume(
    out,
    scale,
    memory,
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    TILE: gl.constexpr,
    WARP_GROUP: gl.constexpr,
):
    """Compute the attention of one warp group's queries, in each tile that the producer hands
    over."""
    work, keys, values = memory
    fields, parts_of_queries, full, empty = work
    dtype: gl.constexpr = out.dtype.element_ty
    swizzled: gl.constexpr = keys[0].layout
    block_size: gl.constexpr = keys[0].shape[1]
    stages: gl.constexpr = keys[1].shape[0]
    group_rows: gl.constexpr = parts_of_queries.shape[1]
    groups: gl.constexpr = parts_of_queries.numel // (group_rows * HEAD_DIM)
    group_tokens: gl.constexpr = group_rows // GROUP
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    lanes: gl.constexpr = HEAD_DIM // 8
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    all_queries = parts_of_queries._reinterpret(dtype, [groups, group_rows, HEAD_DIM], swizzled)
    q = all_queries.index(WARP_GROUP)
    k_tiles = keys[0]._reinterpret(dtype, [stages, TILE, HEAD_DIM], swizzled)
    v_tiles = values[0]._reinterpret(dtype, [stages, TILE, HEAD_DIM], swizzled)
    rings = ((k_tiles, keys[1], keys[2]), (v_tiles, values[1], values[2]))
    multiplied = gl.to_tensor(0)
    handed = gl.to_tensor(0)
    mbarrier.wait(full, 0)
    end = _field(fields, END)
    while end > 0:
        head = _field(fields, HEAD)
        first = _field(fields, FIRST) + WARP_GROUP * group_tokens
        count = _field(fields, COUNT) - WARP_GROUP * group_tokens
        position = _field(fields, POSITION) + WARP_GROUP * group_tokens
        last = position + gl.arange(0, group_rows, gl.SliceLayout(1, score_layout)) // GROUP
        seen_by_all = (position + 1) // TILE
        tiles = (end + TILE - 1) // TILE

        scores = _multiply(q, rings[0], multiplied, score_layout)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(keys[2].index(multiplied % stages), count=1)
        peak = gl.full([group_rows], float("-inf"), gl.float32, gl.SliceLayout(1, score_layout))
        total = gl.zeros([group_rows], gl.float32, gl.SliceLayout(1, score_layout))
        acc = gl.zeros([group_rows, HEAD_DIM], gl.float32, out_layout)
        weights, _, peak, total = _softmax(scores, peak, total, scale, 0, last, True)
        weights = gl.convert_layout(weights.to(dtype), weight_layout)
        for tile in range(1, seen_by_all):
            weights, acc, peak, total = _add_tile(
                q, rings, multiplied, weights, acc, peak, total, scale, tile * TILE, last, False
            )
            multiplied += 1
        for tile in range(gl.maximum(seen_by_all, 1), tiles):
            weights, acc, peak, total = _add_tile(
                q, rings, multiplied, weights, acc, peak, total, scale, tile * TILE, last, True
            )
            multiplied += 1
        mbarrier.arrive(empty, count=1)

        stage = multiplied % stages
        mbarrier.wait(values[1].index(stage), (multiplied // stages) & 1)
        if end % block_size > 0:
            page = end % TILE // block_size
            _clear_tail(values[0], stage, page, end % block_size, HEAD_DIM, TILE)
        acc = warpgroup_mma(weights, v_tiles.index(stage), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(values[2].index(stage), count=1)
        multiplied += 1

        acc /= gl.convert_layout(total, gl.SliceLayout(1, out_layout))[:, None]
        m = gl.arange(0, group_rows, gl.SliceLayout(1, stored))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, stored))
        token = (first + m // GROUP).to(gl.int64)
        query = token * (GROUP * NUM_KV_HEADS) + head * GROUP + m % GROUP
        there = (m // GROUP < count) & (m < group_tokens * GROUP)
        place = out + query[:, None] * HEAD_DIM + d[None, :]
        gl.store(place, gl.convert_layout(acc.to(dtype), stored), there[:, None])
        handed += 1
        mbarrier.wait(full, handed & 1)
        end = _field(fields, END)


@gluon.jit
def _field(fields, number: gl.constexpr):
    """Return one of the numbers that the producer hands over; every thread reads all of them."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    values = fields.load(layout)
    return gl.sum(gl.where(gl.arange(0, 8, layout) == number, values, 0), axis=0)


@gluon.jit
def _multiply(q, keys, number, layout: gl.constexpr):
    """Begin the product of queries and the tile of keys that has a number among all tiles that this
    program loads."""
    tiles, full, _ = keys
    rows: gl.constexpr = q.shape[0]
    columns: gl.constexpr = tiles.shape[1]
    stages: gl.constexpr = tiles.shape[0]
    stage = number % stages
    mbarrier.wait(full.index(stage), (number // stages) & 1)
    scores = gl.zeros([rows, columns], gl.float32, layout)
    transposed = tiles.index(stage).permute((1, 0))
    return warpgroup_mma(q, transposed, scores, use_acc=False, is_async=True)


@gluon.jit
def _softmax(scores, peak, total, scale, start, last, MASKED: gl.constexpr):
    """Add a tile of scores to an online softmax (Milakov and Gimelshein 2018). Return the weights
    of the tile, the factor for all that was added before, and the new peak and total.

    start: the tile's first key.
    last: the last key that each query sees, needed where MASKED. Each has seen a key before a tile
        in which it sees none.
    """
    if MASKED:
        columns: gl.constexpr = scores.shape[1]
        keys = gl.arange(0, columns, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(start + keys[None, :] <= last[:, None], scores, float("-inf"))
    higher = gl.maximum(peak, gl.max(scores, axis=1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    decay = gl.exp2(peak - higher)
    return weights, decay, higher, total * decay + gl.sum(weights, axis=1)


@gluon.jit
def _add_tile(
    q,
    rings,
    number,
    weights,
    acc,
    peak,
    total,
    scale,
    start,
    last,
    MASKED: gl.constexpr,
):
    """Multiply the weights of tile `number` with its values, and meanwhile compute the weights of
    the tile behind it, which begins at key `start`. Return the new weights, acc, peak and total."""
    keys, values = rings
    tiles, full, empty = values
    stages: gl.constexpr = tiles.shape[0]
    layout: gl.constexpr = peak.type.layout.parent
    scores = _multiply(q, keys, number + 1, layout)
    stage = number % stages
    mbarrier.wait(full.index(stage), (number // stages) & 1)
    acc = warpgroup_mma(weights, tiles.index(stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(keys[2].index((number + 1) % stages), count=1)
    following, decay, peak, total = _softmax(scores, peak, total, scale, start, last, MASKED)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(empty.index(stage), count=1)
    acc *= gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(following.to(weights.dtype), weights.type.layout), acc, peak, total


@gluon.jit
def _clear_tail(pages, stage, page, count, HEAD_DIM: gl.constexpr, TILE: gl.constexpr):
    """Write zeros behind the first `count` entries of a page of V. What the cache holds there is
    stale and may be NaN, which a weight of zero does not hide. Each consumer does this for itself,
    and all write the same."""
    block_size: gl.constexpr = pages.shape[1]
    parts: gl.constexpr = HEAD_DIM // pages.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    there = gl.arange(0, block_size, gl.SliceLayout(1, layout)) < count
    for part in gl.static_range(parts):
        entries = pages.index((stage * parts + part) * (TILE // block_size) + page)
        value = entries.load(layout)
        entries.store(gl.where(there[:, None], value, gl.zeros_like(value)))
    fence_async_shared()

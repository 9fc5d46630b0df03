"""Sampling on CUDA, in Triton.

`kernels.sampling` imports this module when it first meets a CUDA tensor.

There are five launches, whatever the rows ask for: a histogram of the logits is cleared, then
filled; then the kernels find which tokens the filters of each row keep, the best score in each part
of the vocabulary, and the best of all. A row that is greedy or has no filters leaves the first
three at once. Nothing is sorted and the host never waits: the cuts of top-k and top-p are found by
bisection on keys that have the same order as the logits (as in radix selection), with ties in the
order of tokens.

A logit of 16 bits is its own key, so a row is no more than 65,536 keys and the number of times each
occurs, which the whole GPU counts; each step of the bisection then reads half of what the step
before read. Logits of 32 bits, which only tests and checks use, are bisected token by token.

Noise and filters are those of `kernels.sampling`, so the token is the same, except where rounding
decides: `log` and `exp` may differ in their last bit, and masses are summed in fixed point here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels.sampling import ALL, MIN_TEMPERATURE
from minisrv.kernels.triton_launch import pdl, wait_and_launch_dependents

BLOCK = 1024
"""Number of tokens of the vocabulary that a program takes at once."""

PROGRAMS = 1024
"""Approximate number of programs beyond which a program takes several blocks of a row: a batch of
one still occupies the whole GPU, and a large batch does not become thousands of programs."""

MOST_BLOCKS = 8

FILTER_BLOCK = 4096
MASS_BITS = 32
"""Number of fraction bits of a token's mass, e^(score - best), in fixed point (units of 2^-32), so
that sums do not depend on their order."""


def sample(
    logits: Tensor,
    req_indices: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    out: Tensor,
) -> None:
    """See `kernels.sampling.sample`."""
    rows, vocab = logits.shape
    blocks = blocks_of(rows, vocab)
    parts = triton.cdiv(vocab, blocks * BLOCK)
    device = logits.device
    bins = 1 << 16 if logits.dtype.itemsize == 2 else 0
    counts = torch.empty(rows, bins, dtype=torch.int32, device=device)
    filters = (req_indices, temperature, top_k, top_p, min_p)
    if bins:
        _clear[(rows, bins // FILTER_BLOCK)](
            *filters, counts, VOCAB=vocab, GREEDY=MIN_TEMPERATURE, BLOCK=FILTER_BLOCK, **pdl()
        )
        _count[(rows, parts)](
            logits,
            *filters,
            counts,
            logits.stride(0),
            VOCAB=vocab,
            GREEDY=MIN_TEMPERATURE,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            **pdl(),
        )
    cut = torch.empty(rows, 2, dtype=torch.int64, device=device)
    floor = torch.empty(rows, dtype=torch.float32, device=device)
    best = torch.empty(rows, parts, dtype=torch.float32, device=device)
    found = torch.empty(rows, parts, dtype=torch.int32, device=device)
    _filter[(rows,)](
        logits,
        *filters,
        counts,
        cut,
        floor,
        logits.stride(0),
        BINS=bins,
        VOCAB=vocab,
        GREEDY=MIN_TEMPERATURE,
        MASS=float(1 << MASS_BITS),
        BLOCK=FILTER_BLOCK,
        num_warps=16,
        **pdl(),
    )
    _score[(rows, parts)](
        logits,
        req_indices,
        positions,
        temperature,
        seed,
        cut,
        floor,
        best,
        found,
        logits.stride(0),
        BINS=bins,
        VOCAB=vocab,
        GREEDY=MIN_TEMPERATURE,
        BLOCKS=blocks,
        BLOCK=BLOCK,
        **pdl(),
    )
    block = triton.next_power_of_2(parts)
    _choose[(rows,)](best, found, out, parts, BLOCK=block, num_warps=4, **pdl())


def blocks_of(rows: int, vocab: int) -> int:
    """Return the number of blocks of a row that a program takes, a power of two."""
    wanted: int = triton.next_power_of_2(max(1, rows * vocab // (BLOCK * PROGRAMS)))
    return min(MOST_BLOCKS, wanted)


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """See `kernels.sampling.apply_bitmask`. It is one launch, which reads the bits and no
    logits."""
    rows, vocab = logits.shape
    part = BLOCK * blocks_of(rows, vocab)
    _apply_bitmask[(rows, triton.cdiv(vocab, part))](
        logits,
        bitmask,
        logits.stride(0),
        bitmask.stride(0),
        VOCAB=vocab,
        EVERY=ALL,
        WORDS=part // 32,
        **pdl(),
    )


@triton.jit
def _apply_bitmask(
    logits,
    bitmask,
    stride,
    words_stride,
    VOCAB: tl.constexpr,
    EVERY: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mask a part of a row's tokens: WORDS words of 32 tokens."""
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = at * 32 < VOCAB
    source = bitmask + row * words_stride + at
    word = tl.load(source, there, other=EVERY)
    tl.debug_barrier()  # each warp has its own copy of the words, and one of them resets them
    bit = tl.arange(0, 32)
    token = at[:, None] * 32 + bit[None, :]
    dropped = ((word[:, None] >> bit[None, :]) & 1) == 0
    tl.store(logits + row * stride + token, float("-inf"), dropped & (token < VOCAB))
    tl.store(source, EVERY, there & (word != EVERY))


@triton.jit
def _is_unfiltered(
    req_indices, temperature, top_k, top_p, min_p, VOCAB: tl.constexpr, GREEDY: tl.constexpr
):
    """Whether this program's row is greedy or has no filters."""
    req_index = tl.load(req_indices + tl.program_id(0))
    k = tl.load(top_k + req_index)
    filtered = (k > 0) & (k < VOCAB)
    filtered |= (tl.load(top_p + req_index) < 1) | (tl.load(min_p + req_index) > 0)
    return (tl.load(temperature + req_index) < GREEDY) | (filtered == 0)


@triton.jit
def _key(logit, temp, BINS: tl.constexpr):
    """Return an int64 key with the same order as the scores, which are the logits over the
    temperature; both zeros have the same key. The key is below BINS for logits of 16 bits, which
    need no temperature for it, and below 2^32 otherwise."""
    if BINS:
        zero = (logit.to(tl.float32) + 0.0).to(logit.dtype)
        bits = zero.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
        key = tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)
    else:
        bits = (logit / temp + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        key = tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
    return key


@triton.jit
def _score_of(key, temp, logits, BINS: tl.constexpr):
    """Return the float32 score that has this key."""
    if BINS:
        bits = tl.where(key >= 0x8000, key - 0x8000, 0xFFFF - key)
        logit = bits.to(tl.uint16).to(logits.dtype.element_ty, bitcast=True)
        score = logit.to(tl.float32) / temp
    else:
        bits = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
        score = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return score


@triton.jit
def _clear(
    req_indices,
    temperature,
    top_k,
    top_p,
    min_p,
    counts,
    VOCAB: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Clear a part of a row's histogram."""
    wait_and_launch_dependents(PDL)
    if _is_unfiltered(req_indices, temperature, top_k, top_p, min_p, VOCAB, GREEDY):
        return
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + row * tl.num_programs(1) * BLOCK + at, tl.zeros([BLOCK], tl.int32))


@triton.jit
def _count(
    logits,
    req_indices,
    temperature,
    top_k,
    top_p,
    min_p,
    counts,
    stride,
    VOCAB: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add a part of a row's tokens to its histogram."""
    wait_and_launch_dependents(PDL)
    if _is_unfiltered(req_indices, temperature, top_k, top_p, min_p, VOCAB, GREEDY):
        return
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCKS * BLOCK
    for block in range(BLOCKS):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * stride + at, at < VOCAB, other=0.0)
        key = _key(logit, 1.0, 1 << 16)
        tl.atomic_add(counts + row * (1 << 16) + key, 1, at < VOCAB, sem="relaxed")


@triton.jit
def _count_above(
    source,
    counts,
    temp,
    peak,
    least,
    most,
    WEIGH: tl.constexpr,
    BINS: tl.constexpr,
    VOCAB: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the number, or with WEIGH the mass, of the tokens with keys above `least`, int64; with
    BINS only keys up to `most` count."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    if BINS:
        for begin in range(least + 1, most + 1, BLOCK):
            key = begin + lane
            times = tl.load(counts + key, key <= most, other=0).to(tl.int64)
            if WEIGH:
                score = _score_of(key, temp, source, BINS)
                times *= (tl.exp(score - peak) * MASS).to(tl.int64)
            total += times
    else:
        for begin in range(0, VOCAB, BLOCK):
            at = begin + lane
            logit = tl.load(source + at, at < VOCAB, other=float("-inf"))
            times = ((_key(logit, temp, BINS) > least) & (at < VOCAB)).to(tl.int64)
            if WEIGH:
                times *= (tl.exp(logit / temp - peak) * MASS).to(tl.int64)
            total += times
    return tl.sum(total)


@triton.jit
def _count_tied(
    source,
    counts,
    temp,
    key,
    BINS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the number of tokens that have this key, int64."""
    if BINS:
        times = tl.load(counts + key).to(tl.int64)
    else:
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.int64)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + lane
            logit = tl.load(source + at, at < VOCAB, other=float("-inf"))
            total += ((_key(logit, temp, BINS) == key) & (at < VOCAB)).to(tl.int64)
        times = tl.sum(total)
    return times


@triton.jit
def _find_threshold(
    source,
    counts,
    temp,
    peak,
    low,
    high,
    wanted,
    WEIGH: tl.constexpr,
    BINS: tl.constexpr,
    VOCAB: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the least key from `low` to `high` with less than `wanted` (a number of tokens, or
    with WEIGH a mass) above it. There must be nothing above `high`."""
    # The number or mass above `high`: with BINS only the keys up to `high` are read.
    beyond = tl.full([], 0, tl.int64)
    while low < high:
        middle = (low + high) // 2
        more = beyond + _count_above(
            source, counts, temp, peak, middle, high, WEIGH, BINS, VOCAB, MASS, BLOCK
        )
        less = more.to(tl.float64) < wanted
        if BINS:
            beyond = tl.where(less, more, beyond)
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    return low


@triton.jit
def _filter(
    logits,
    req_indices,
    temperature,
    top_k,
    top_p,
    min_p,
    counts,
    cut,
    floor,
    stride,
    BINS: tl.constexpr,
    VOCAB: tl.constexpr,
    GREEDY: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the tokens that a row keeps: those with keys above cut[row, 0], of those with that key
    the tokens up to cut[row, 1], and of all these none with a score below floor[row]."""
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    tl.store(cut + row * 2, -1)
    tl.store(cut + row * 2 + 1, VOCAB)
    tl.store(floor + row, float("-inf"))
    if _is_unfiltered(req_indices, temperature, top_k, top_p, min_p, VOCAB, GREEDY):
        return

    req_index = tl.load(req_indices + row)
    temp = tl.load(temperature + req_index)
    k = tl.load(top_k + req_index)
    p = tl.load(top_p + req_index)
    source = logits + row * stride
    counts += row * BINS
    lane = tl.arange(0, BLOCK)
    if BINS:
        highest = tl.full([BLOCK], 0, tl.int64)
        for begin in range(0, BINS, BLOCK):
            key = begin + lane.to(tl.int64)
            score = _score_of(key, temp, logits, BINS)
            there = (tl.load(counts + key) > 0) & (score == score)
            highest = tl.maximum(highest, tl.where(there, key, 0))
        top = tl.max(highest)
        peak = _score_of(top, temp, logits, BINS)
    else:
        greatest = tl.full([BLOCK], float("-inf"), tl.float32)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + lane
            logit = tl.load(source + at, at < VOCAB, other=float("-inf"))
            greatest = tl.maximum(greatest, logit)
        top = _key(tl.max(greatest), temp, BINS)
        peak = _score_of(top, temp, logits, BINS)
    tl.store(floor + row, peak + tl.log(tl.load(min_p + req_index)))

    low = tl.full([], 0, tl.int64)
    ties = VOCAB + 0 * k
    if (k > 0) & (k < VOCAB):  # find the k-th key from above, and how many of its ties are kept
        low = _find_threshold(
            source, counts, temp, peak, low, top, k, False, BINS, VOCAB, MASS, BLOCK
        )
        ties = k - _count_above(
            source, counts, temp, peak, low, top, False, BINS, VOCAB, MASS, BLOCK
        )
    if p < 1:  # a share of the mass that top-k leaves
        bottom = low
        each = (tl.exp(_score_of(low, temp, logits, BINS) - peak) * MASS).to(tl.int64)
        kept = tl.minimum(ties, _count_tied(source, counts, temp, low, BINS, VOCAB, BLOCK))
        mass = _count_above(source, counts, temp, peak, low, top, True, BINS, VOCAB, MASS, BLOCK)
        wanted = p.to(tl.float64) * (mass + kept * each).to(tl.float64)
        low = _find_threshold(
            source, counts, temp, peak, low, top, wanted, True, BINS, VOCAB, MASS, BLOCK
        )
        mass = _count_above(source, counts, temp, peak, low, top, True, BINS, VOCAB, MASS, BLOCK)
        each = (tl.exp(_score_of(low, temp, logits, BINS) - peak) * MASS).to(tl.int64)
        missing = wanted - mass.to(tl.float64)
        enough = tl.ceil(missing / tl.maximum(each, 1).to(tl.float64)).to(tl.int64)
        ties = tl.where(low == bottom, tl.minimum(ties, enough), enough)
        ties = tl.maximum(ties, 1)
    tl.store(cut + row * 2, low)
    if ties < _count_tied(source, counts, temp, low, BINS, VOCAB, BLOCK):
        # Find the last tied token that is kept, in the order of tokens.
        seen = tl.full([], 0, tl.int64)
        last = tl.full([], -1, tl.int64)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + lane
            logit = tl.load(source + at, at < VOCAB, other=0.0)
            is_tied = (_key(logit, temp, BINS) == low) & (at < VOCAB)
            rank = seen + tl.cumsum(is_tied.to(tl.int64), 0)
            chosen = is_tied & (rank <= ties)
            last = tl.maximum(last, tl.max(tl.where(chosen, at, -1)).to(tl.int64))
            seen += tl.sum(is_tied.to(tl.int64))
        tl.store(cut + row * 2 + 1, last)


@triton.jit
def _mix(x):
    """See `_mix` of `kernels.sampling`; this one works on uint32."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _score(
    logits,
    req_indices,
    positions,
    temperature,
    seed,
    cut,
    floor,
    best,
    found,
    stride,
    BINS: tl.constexpr,
    VOCAB: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the best score in a part of a row's tokens, and the first token that has it."""
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    req_index = tl.load(req_indices + row)
    temp = tl.load(temperature + req_index)
    edge = tl.load(cut + row * 2)
    last = tl.load(cut + row * 2 + 1)
    least = tl.load(floor + row)
    number = tl.load(seed + req_index)
    hashed = _mix((number & 0xFFFFFFFF).to(tl.uint32))
    hashed = _mix(hashed ^ ((number >> 32) & 0xFFFFFFFF).to(tl.uint32))
    hashed = _mix(hashed ^ tl.load(positions + row).to(tl.uint32))
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for block in tl.range(BLOCKS, num_stages=3):
        at = (part * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        there = at < VOCAB
        logit = tl.load(logits + row * stride + at, there, other=float("-inf"))
        score = logit.to(tl.float32)
        if temp >= GREEDY:
            key = _key(logit, temp, BINS)
            score /= temp
            kept = (key > edge) | ((key == edge) & (at <= last))
            kept &= score >= least
            bits = _mix(_mix(hashed + at.to(tl.uint32) * 0x9E3779B1) ^ hashed)
            uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
            score = tl.where(kept & there, score - tl.log(-tl.log(uniform)), float("-inf"))
        # NaN counts as the greatest score, as in torch.argmax.
        rank = tl.where(score != score, float("inf"), score)
        better = there & ((rank > highest) | (block == 0))
        highest = tl.where(better, rank, highest)
        first = tl.where(better, at, first)
    top = tl.max(highest)
    chosen = tl.min(tl.where(highest == top, first, 0x7FFFFFFF))
    tl.store(best + row * tl.num_programs(1) + part, top)
    tl.store(found + row * tl.num_programs(1) + part, chosen)


@triton.jit(do_not_specialize=["parts"])
def _choose(best, found, out, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Find the first of a row's best tokens."""
    wait_and_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < parts
    score = tl.load(best + row * parts + at, there, other=float("-inf"))
    token = tl.load(found + row * parts + at, there, other=0x7FFFFFFF)
    top = tl.max(score)
    chosen = tl.min(tl.where((score == top) & there, token, 0x7FFFFFFF))
    tl.store(out + row, chosen.to(tl.int64))

"""Sampling on CUDA, in Triton: `kernels.sampling` imports this module when it first meets a CUDA
tensor.

Three launches, whatever the rows ask for: what the filters of each row keep, the best score of each
part of the vocabulary, the best of all. A greedy row and one without filters leave the first at
once. Nothing is sorted and the host waits for nothing: the cuts of top-k and top-p are found by
bisection on keys that order as the logits do (as in radix selection), ties in the order of tokens.

Noise and filters are those of `kernels.sampling`, so the token is the same, except where rounding
decides: `log` and `exp` may differ in their last bit, and masses are summed in fixed point here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.kernels.sampling import MIN_TEMPERATURE

PART = 1024
"""Tokens of the vocabulary that a program scores: a batch of one still occupies the whole GPU."""

FILTER_BLOCK = 4096
MASS_BITS = 32
"""A token's mass, e^(score - best), in units of 2^-32: sums do not depend on their order."""


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    out: Tensor,
) -> None:
    """As `kernels.sampling.sample`."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    device = logits.device
    cut = torch.empty(rows, 2, dtype=torch.int64, device=device)
    floor = torch.empty(rows, dtype=torch.float32, device=device)
    best = torch.empty(rows, parts, dtype=torch.float32, device=device)
    found = torch.empty(rows, parts, dtype=torch.int32, device=device)
    _filter[(rows,)](
        logits,
        slots,
        temperature,
        top_k,
        top_p,
        min_p,
        cut,
        floor,
        logits.stride(0),
        VOCAB=vocab,
        GREEDY=MIN_TEMPERATURE,
        MASS=float(1 << MASS_BITS),
        BLOCK=FILTER_BLOCK,
        num_warps=16,
    )
    _score[(rows, parts)](
        logits,
        slots,
        positions,
        temperature,
        seed,
        cut,
        floor,
        best,
        found,
        logits.stride(0),
        VOCAB=vocab,
        GREEDY=MIN_TEMPERATURE,
        BLOCK=PART,
        num_warps=4,
    )
    _choose[(rows,)](best, found, out, parts, BLOCK=triton.next_power_of_2(parts), num_warps=4)


@triton.jit
def _scaled(logits, at, there, heat):
    """Logits over the temperature, float32; -inf beyond the vocabulary."""
    return tl.load(logits + at, there, other=float("-inf")).to(tl.float32) / heat


@triton.jit
def _key(score):
    """int64 in [0, 2^32) that orders as float32 scores do; the zeros are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _filter(
    logits,
    slots,
    temperature,
    top_k,
    top_p,
    min_p,
    cut,
    floor,
    stride,
    VOCAB: tl.constexpr,
    GREEDY: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a row keeps: keys above cut[row, 0], of those equal to it the tokens up to
    cut[row, 1], and of all no score below floor[row]."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot)
    k = tl.load(top_k + slot)
    p = tl.load(top_p + slot)
    least = tl.load(min_p + slot)
    tl.store(cut + row * 2, -1)
    tl.store(cut + row * 2 + 1, VOCAB)
    tl.store(floor + row, float("-inf"))
    by_count = (k > 0) & (k < VOCAB)
    by_mass = p < 1
    if (heat < GREEDY) | ((not by_count) & (not by_mass) & (least <= 0)):
        return

    source = logits + row * stride
    lane = tl.arange(0, BLOCK)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        at = begin + lane
        peaks = tl.maximum(peaks, _scaled(source, at, at < VOCAB, heat))
    peak = tl.max(peaks)
    tl.store(floor + row, peak + tl.log(least))
    if by_count | by_mass:
        # top-k: the k-th key from above, and how many of its ties are kept.
        low = tl.full([], 0, tl.int64)
        ties = VOCAB + 0 * k
        if by_count:
            high = _key(peak)
            while low < high:  # the least key with fewer than k above it
                middle = (low + high) // 2
                count = tl.zeros([BLOCK], tl.int64)
                for begin in range(0, VOCAB, BLOCK):
                    at = begin + lane
                    key = _key(_scaled(source, at, at < VOCAB, heat))
                    count += ((key > middle) & (at < VOCAB)).to(tl.int64)
                fewer = tl.sum(count) < k
                high = tl.where(fewer, middle, high)
                low = tl.where(fewer, low, middle + 1)
            count = tl.zeros([BLOCK], tl.int64)
            for begin in range(0, VOCAB, BLOCK):
                at = begin + lane
                key = _key(_scaled(source, at, at < VOCAB, heat))
                count += ((key > low) & (at < VOCAB)).to(tl.int64)
            ties = k - tl.sum(count)
        if by_mass:
            # The mass that top-k leaves; of the ties at its cut, all weigh the same.
            bottom = low
            each = tl.full([], 0, tl.int64)
            mass = tl.zeros([BLOCK], tl.int64)
            tied = tl.zeros([BLOCK], tl.int64)
            for begin in range(0, VOCAB, BLOCK):
                at = begin + lane
                score = _scaled(source, at, at < VOCAB, heat)
                weight = (tl.exp(score - peak) * MASS).to(tl.int64)
                key = _key(score)
                mass += tl.where((key > bottom) & (at < VOCAB), weight, 0)
                is_tied = (key == bottom) & (at < VOCAB)
                tied += is_tied.to(tl.int64)
                each = tl.maximum(each, tl.max(tl.where(is_tied, weight, 0)))
            kept_ties = tl.minimum(ties, tl.sum(tied))
            wanted = p.to(tl.float64) * (tl.sum(mass) + kept_ties * each).to(tl.float64)
            high = _key(peak)
            while low < high:  # the least key with less than the wanted mass above it
                middle = (low + high) // 2
                mass = tl.zeros([BLOCK], tl.int64)
                for begin in range(0, VOCAB, BLOCK):
                    at = begin + lane
                    score = _scaled(source, at, at < VOCAB, heat)
                    weight = (tl.exp(score - peak) * MASS).to(tl.int64)
                    mass += tl.where((_key(score) > middle) & (at < VOCAB), weight, 0)
                less = tl.sum(mass).to(tl.float64) < wanted
                high = tl.where(less, middle, high)
                low = tl.where(less, low, middle + 1)
            mass = tl.zeros([BLOCK], tl.int64)
            each = tl.full([], 0, tl.int64)
            for begin in range(0, VOCAB, BLOCK):
                at = begin + lane
                score = _scaled(source, at, at < VOCAB, heat)
                weight = (tl.exp(score - peak) * MASS).to(tl.int64)
                key = _key(score)
                mass += tl.where((key > low) & (at < VOCAB), weight, 0)
                each = tl.maximum(each, tl.max(tl.where((key == low) & (at < VOCAB), weight, 0)))
            missing = wanted - tl.sum(mass).to(tl.float64)
            enough = tl.ceil(missing / tl.maximum(each, 1).to(tl.float64)).to(tl.int64)
            ties = tl.where(low == bottom, tl.minimum(ties, enough), enough)
            ties = tl.maximum(ties, 1)
        # The last tie that is kept, in the order of tokens.
        seen = tl.full([], 0, tl.int64)
        last = tl.full([], -1, tl.int64)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + lane
            is_tied = (_key(_scaled(source, at, at < VOCAB, heat)) == low) & (at < VOCAB)
            rank = seen + tl.cumsum(is_tied.to(tl.int64), 0)
            chosen = is_tied & (rank <= ties)
            last = tl.maximum(last, tl.max(tl.where(chosen, at, -1)).to(tl.int64))
            seen += tl.sum(is_tied.to(tl.int64))
        tl.store(cut + row * 2, low)
        tl.store(cut + row * 2 + 1, last)


@triton.jit
def _mix(x):
    """As in `kernels.sampling`, on uint32."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _score(
    logits,
    slots,
    positions,
    temperature,
    seed,
    cut,
    floor,
    best,
    found,
    stride,
    VOCAB: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best score of a part of a row's tokens, and the first token that has it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    there = at < VOCAB
    slot = tl.load(slots + row)
    heat = tl.load(temperature + slot)
    source = logits + row * stride
    if heat < GREEDY:
        score = _scaled(source, at, there, 1.0)
    else:
        score = _scaled(source, at, there, heat)
        key = _key(score)
        edge = tl.load(cut + row * 2)
        kept = (key > edge) | ((key == edge) & (at <= tl.load(cut + row * 2 + 1)))
        kept &= score >= tl.load(floor + row)
        number = tl.load(seed + slot)
        hashed = _mix((number & 0xFFFFFFFF).to(tl.uint32))
        hashed = _mix(hashed ^ ((number >> 32) & 0xFFFFFFFF).to(tl.uint32))
        hashed = _mix(hashed ^ tl.load(positions + row).to(tl.uint32))
        bits = _mix(_mix(hashed + at.to(tl.uint32) * 0x9E3779B1) ^ hashed)
        uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        score = tl.where(kept & there, score - tl.log(-tl.log(uniform)), float("-inf"))
    # NaN is the greatest, as for torch.argmax.
    rank = tl.where(score != score, float("inf"), score)
    top = tl.max(rank)
    first = tl.min(tl.where((rank == top) & there, at, 0x7FFFFFFF))
    tl.store(best + row * tl.num_programs(1) + part, top)
    tl.store(found + row * tl.num_programs(1) + part, first)


@triton.jit(do_not_specialize=["parts"])
def _choose(best, found, out, parts, BLOCK: tl.constexpr):
    """The first of a row's best tokens."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < parts
    score = tl.load(best + row * parts + at, there, other=float("-inf"))
    token = tl.load(found + row * parts + at, there, other=0x7FFFFFFF)
    top = tl.max(score)
    chosen = tl.min(tl.where((score == top) & there, token, 0x7FFFFFFF))
    tl.store(out + row, chosen.to(tl.int64))

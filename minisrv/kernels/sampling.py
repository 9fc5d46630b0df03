"""The sampling ops: from rows of logits to one token each, the same token wherever the row runs.

Knows: bitmasks of allowed tokens, greedy sampling, temperature, top-k, top-p, min-p, and the noise.
Takes tensors only: parameters by request index and the request indices of the rows. Knows nothing
of requests or of graphs.

The noise comes from a counter and not from a generator: the Gumbel noise of a token depends on
(seed, position, token id) through a short integer hash. So a sampled token does not depend on the
batch, on the padding, on the mode, or on a preemption before it. Sampling is `argmax(logits /
temperature + noise)` over the tokens that the filters keep (Gumbel-max: exact sampling from the
softmax).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisrv.kernels.registration import register_op

ALL = -1
"""Word of a bitmask that allows every token."""

MIN_TEMPERATURE = 1e-5
"""Temperature below which a row is greedy, as in vLLM: a division by less would overflow
float32."""

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Apply a bijection on 32 bits, held in int64.

    The shifts and multipliers are a low-bias set of Chris Wellons' hash prospector in which both
    multipliers are below 2**31, so that no product exceeds int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise [R, vocab_size] float32.

    seeds: [R] int64, of which all 64 bits count.
    positions: [R] integers, the index of the token to be sampled.
    """
    key = _mix(seeds & _MASK)
    key = _mix(key ^ ((seeds >> 32) & _MASK))
    key = _mix(key ^ positions)[:, None]
    token = torch.arange(vocab_size, dtype=torch.int64, device=seeds.device)
    # There are two rounds, so that the rows of two positions are not permutations of each other.
    bits = _mix(_mix((key + token * 0x9E3779B1) & _MASK) ^ key)
    # The number is 23 bits and a half: exact in float32, and never 0 or 1.
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _filtered(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return `logits` [R, V] with -inf for tokens that are dropped by top-k, then by top-p (over
    the remaining tokens, renormalised), then by min-p. The most likely token is always kept."""
    if bool(((top_k > 0) | (top_p < 1)).any()):
        ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        keep = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
        probs = torch.softmax(ordered.masked_fill(~keep, -torch.inf), dim=-1)
        before = probs.cumsum(dim=-1) - probs
        # A top_p of 1 keeps all tokens, even if the sum of the probabilities before one was rounded
        # up to 1.
        keep &= (before < top_p[:, None]) | (rank == 0) | (top_p[:, None] >= 1)
        logits = logits.masked_fill(~keep.gather(1, order.argsort(dim=-1)), -torch.inf)
    # The condition is p >= min_p * p_max, in logarithms; log(0) = -inf keeps all tokens.
    floor = logits.amax(dim=-1) + torch.log(min_p)
    return logits.masked_fill(logits < floor[:, None], -torch.inf)


def scores(
    logits: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
) -> Tensor:
    """Return [R, V] float32 whose argmax is the sampled token: the logits that the filters keep,
    plus noise.

    logits: [R, V]. All other arguments are [R], see `sample`; the scores of a greedy row are its
        logits.
    """
    greedy = temperature < MIN_TEMPERATURE
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    noise = gumbel_noise(seed, positions, logits.shape[1])
    kept = _filtered(scaled, top_k, top_p, min_p) + noise
    return torch.where(greedy[:, None], scaled, kept)


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
    """Write one token for each row to `out`.

    logits: [R, V] of any float type.
    req_indices: [R] int64, the request index of each row.
    positions: [R] integers, the index of the token to be sampled.
    temperature, top_p, min_p: [S] float32, by request index; a temperature below MIN_TEMPERATURE is
        greedy.
    top_k, seed: [S] int64, by request index.
    out: [R] int64.

    This is a kernel, like attention: it may read the values of its arguments, so greedy rows cost
    only an argmax.
    """
    # float32 is several times as fast as shorter types, including the conversion.
    torch.argmax(logits.float(), dim=-1, out=out)
    rows = (temperature[req_indices] >= MIN_TEMPERATURE).nonzero().squeeze(1)
    if rows.numel():
        at = req_indices[rows]
        found = scores(
            logits[rows],
            positions[rows],
            temperature=temperature[at],
            top_k=top_k[at],
            top_p=top_p[at],
            min_p=min_p[at],
            seed=seed[at],
        )
        out[rows] = found.argmax(dim=-1)


def apply_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """Set the logits of the tokens that are not allowed to -inf, in place, and reset the bitmask to
    allow all.

    logits: [R, V] of any float type.
    bitmask: [R, ceil(V / 32)] int32: bit `i % 32` of word `i // 32` says whether token `i` is
        allowed. Afterwards it is ALL, as it is in most steps.

    This is a kernel too: for rows that allow everything only the bits are read.
    """
    rows = (bitmask != ALL).any(dim=1).nonzero().squeeze(1)
    if rows.numel():
        # As bytes, the bits take as much memory as the mask: little-endian, so the bits of a row
        # are in order.
        bits = bitmask[rows].view(torch.uint8)
        place = torch.arange(8, dtype=torch.uint8, device=bits.device)
        dropped = ((bits[:, :, None] >> place) & 1 == 0).flatten(1)[:, : logits.shape[1]]
        logits[rows] = logits[rows].masked_fill(dropped, -torch.inf)
        bitmask[rows] = ALL


sample_op = register_op(
    "sample",
    "(Tensor logits, Tensor req_indices, Tensor positions, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seed, Tensor(a!) out) -> ()",
    cpu=sample,
    cuda="minisrv.kernels.triton_sampling:sample",
)
apply_bitmask_op = register_op(
    "apply_bitmask",
    "(Tensor(a!) logits, Tensor(b!) bitmask) -> ()",
    cpu=apply_bitmask,
    cuda="minisrv.kernels.triton_sampling:apply_bitmask",
)

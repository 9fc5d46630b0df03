"""Digests of cache entries: 64 bits that stand for all bits of an entry.

The keys and values that a large step writes in all layers take gigabytes. Two runs are compared by
digests of them, so that no copy is kept. The same bits have the same digest. Entries that differ
have different ones, always if they differ within 8 bytes at one place, and otherwise but for a
chance of about one in 2^64.

Knows: bits. Knows nothing of caches and runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANE_BYTES = 8
"""Number of bytes that are multiplied at a time."""

_ODD = 0x1E3779B97F4A7C15
_MIX = 0x3F58476D1CE4E5B9
"""Odd numbers with irregular bits, as in the generator splitmix64. The product with an odd number
loses no bits."""


def digest_(entries: Tensor) -> Tensor:
    """Return the digest of each of the entries, [n] int64. Overwrites the entries, which so need no
    further memory of their size.

    entries: [n, ...], contiguous; an entry has a multiple of `LANE_BYTES` bytes.
    """
    lanes = entries.flatten(1).view(torch.int64)
    # Each place has a factor of its own, so that exchanged values show.
    places = torch.arange(lanes.shape[1], device=lanes.device)
    lanes.add_(places + 1).mul_(2 * places * _ODD + _ODD)
    for shift in (32, 29):
        lanes.bitwise_xor_(lanes >> shift).mul_(_MIX)
    return lanes.sum(dim=1)

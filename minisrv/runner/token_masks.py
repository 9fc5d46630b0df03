"""Masks between lm_head and sampler: of the tokens that a row may sample, all others are dropped.

The mask comes from the host, as one bit a token, and is made when all that comes before it has been
launched: a GPU runs the model while the host finds out what may follow. Then it goes to the device
in one copy, and logits are masked there, outside of any graph. The logits themselves stay as they
are, as log-probabilities are read off them.

Knows: bits and logits. Knows nothing of grammars: who fills the bits says what is allowed, and that
the tokens before are known by then is the step loop's care. A step without masked rows runs nothing
of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisrv.core.scheduler import ScheduledRow

ALL = -1
"""A word of the bitmask that allows every token."""


class AllowedTokens(Protocol):
    """Who knows what rows may sample."""

    @property
    def bitmask_words(self) -> int:
        """Words of int32 in a row of the bitmask; at least as many bits as logits."""

    def fill(self, rows: Sequence[ScheduledRow], bitmask: NDArray[np.int32]) -> None:
        """Write the rows of `bitmask` that belong to masked rows: bit `i % 32` of word `i // 32`
        says whether token `i` may come next; one at least may."""


def mask_logits(logits: Tensor, rows: Sequence[ScheduledRow], allowed: AllowedTokens) -> Tensor:
    """A copy of `logits` [R, V] with -inf for what the rows may not sample."""
    gpu = logits.device.type == "cuda"
    # Pinned by torch's host allocator, which gives none out again before the copy from it is done.
    shape = (len(rows), allowed.bitmask_words)
    host = torch.full(shape, ALL, dtype=torch.int32, pin_memory=gpu)
    allowed.fill(rows, host.numpy())
    # As bytes, bits are as large as the mask: little-endian, so a row's bits are in order.
    bits = host.to(logits.device, non_blocking=True).view(torch.uint8)
    place = torch.arange(8, dtype=torch.uint8, device=logits.device)
    dropped = (bits[:, :, None] >> place) & 1 == 0
    return logits.masked_fill(dropped.flatten(1)[:, : logits.shape[1]], -torch.inf)

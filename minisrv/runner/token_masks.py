"""Masks between lm_head and sampler: of the tokens that a row may sample, all others are dropped.

The mask comes from the host, as one bit a token, and is made while a GPU runs the model: it goes to
the device in one copy behind the model, in front of the epilogue, in whose graph it is applied.

Knows: bits, and where they lie. Knows nothing of grammars: who fills the bits says what is allowed,
and that the tokens before are known by then is the step loop's care. A step without masked rows
runs nothing of this: its bitmask allows all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisrv.core.step import ScheduledRow
from minisrv.kernels import ALL


class AllowedTokens(Protocol):
    """Who knows what rows may sample."""

    @property
    def bitmask_words(self) -> int:
        """Words of int32 in a row of the bitmask; at least as many bits as logits."""

    def fill(self, rows: Sequence[ScheduledRow], bitmask: NDArray[np.int32]) -> None:
        """Write the rows of `bitmask` that belong to masked rows: bit `i % 32` of word `i // 32`
        says whether token `i` may come next; one at least may."""


class TokenMasks:
    """Fills the bitmask of the input buffers.

    bitmask: [R, words] int32, on the device.
    """

    def __init__(self, bitmask: Tensor) -> None:
        self._bitmask = bitmask
        gpu = bitmask.device.type == "cuda"
        self._host = torch.empty(bitmask.shape, dtype=torch.int32, pin_memory=gpu)

    def send(self, rows: Sequence[ScheduledRow], allowed: AllowedTokens) -> None:
        """Write the masks of a step's rows. The tokens of all steps before are on the host, so that
        no copy from here is on its way any more."""
        found = np.full((len(rows), allowed.bitmask_words), ALL, np.int32)
        allowed.fill(rows, found)
        host = self._host[: len(rows)]
        host.numpy()[:] = found[:, : host.shape[1]]
        self._bitmask[: len(rows)].copy_(host, non_blocking=True)

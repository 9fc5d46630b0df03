"""Masks between lm_head and the sampler: all tokens but those that a row may sample are dropped.

A mask comes from the host, as one bit for each token, and is made while a GPU runs the model. One
copy, after the model and before the epilogue, brings it to the device; the graph of the epilogue
applies it.

Knows: bits, and where they lie. Knows nothing of grammars: whoever fills the bits decides what is
allowed, and the step loop makes sure that the earlier tokens are known by then. A step without rows
that a grammar restricts runs nothing of this: its bitmask allows all tokens.
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
    """Something that knows which tokens rows may sample."""

    @property
    def bitmask_words(self) -> int:
        """Number of int32 words in a row of the bitmask, which has at least as many bits as there
        are logits."""

    def fill_bitmask(self, rows: Sequence[ScheduledRow], bitmask: NDArray[np.int32]) -> None:
        """Write the rows of `bitmask` that belong to rows restricted by a grammar: bit `i % 32` of
        word `i // 32` says whether token `i` may come next. At least one token must be allowed."""


class TokenMasks:
    """Fills the bitmask of the input buffers.

    bitmask: [R, words] int32, on the device.
    """

    def __init__(self, bitmask: Tensor) -> None:
        self._bitmask = bitmask
        gpu = bitmask.device.type == "cuda"
        self._host = torch.empty(bitmask.shape, dtype=torch.int32, pin_memory=gpu)

    def upload(self, rows: Sequence[ScheduledRow], allowed_tokens: AllowedTokens) -> None:
        """Write the masks of a step's rows. The tokens of all earlier steps must be on the host, so
        that no earlier copy from the pinned buffer is still under way."""
        found = np.full((len(rows), allowed_tokens.bitmask_words), ALL, np.int32)
        allowed_tokens.fill_bitmask(rows, found)
        host = self._host[: len(rows)]
        host.numpy()[:] = found[:, : host.shape[1]]
        self._bitmask[: len(rows)].copy_(host, non_blocking=True)

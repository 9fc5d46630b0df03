"""What Triton kernels share beside their mathematics: how they follow each other, and how the
programs of one find out which of them is last.

Programmatic dependent launch (PDL): a kernel begins while the one before it runs. What it does
until its `gdc_wait` it does beside that one; the wait returns when the one before it has ended.
Each kernel allows the next to begin only behind its own wait (`follow`). So all but the kernel
before it has ended when a kernel begins, and it may read anything that this one does not write:
weights, and, for attention, what its cache holds of earlier steps. It writes nothing before. A
kernel that is launched without PDL begins when the one before it has ended, as ever.

Knows: whether PDL is on. Knows no kernel.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ARRIVALS = 1 << 16
"""Groups of programs in one launch."""


@cache
def enabled() -> bool:
    """On GPUs that have it (compute capability 9.0), unless MINISRV_PDL is 0."""
    if os.environ.get("MINISRV_PDL") == "0" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def pdl() -> dict[str, Any]:
    """Arguments of a launch: the kernel's PDL, and the launch attribute."""
    on = enabled()
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@cache
def arrivals(device: torch.device) -> Tensor:
    """[MAX_ARRIVALS] int32 counters, all zero. Programs that share a result count themselves in
    one; the last one sets it back. Kernels of one stream may all use them, one behind another."""
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended, and allow the next one to begin."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count

"""What Triton kernels share beside their mathematics: how they follow each other, and how the
programs of one find out which of them is last.

Programmatic dependent launch (PDL): a kernel may begin as soon as every program of the one before
it has allowed that (`lead`) or ended; its own `wait` returns when that one has ended. As each
kernel waits, all kernels further back have ended by then too. Before its wait a kernel may read
what no kernel writes, weights, and it writes nothing.

A kernel that reads weights leads before it waits, so that the weights of the kernels behind it are
on their way as well, of as many as the GPU has room for. Any other one `follow`s: it leads behind
its wait. So when a kernel begins, everything in front of the last one that follows has ended, and
it may read that before its wait too. A kernel that is launched without PDL begins when the one
before it has ended, as ever.

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
def lead(PDL: tl.constexpr):
    """Allow the next kernel to begin."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended."""
    if PDL:
        gdc_wait()


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait, then lead."""
    wait(PDL)
    lead(PDL)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count

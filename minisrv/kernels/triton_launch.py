"""Functions that Triton kernels share: how kernels follow each other on the device.

It also has the counters by which the programs of one kernel find out which of them is last.

Programmatic dependent launch (PDL): a kernel may begin as soon as every program of the kernel
before it has allowed that (`launch_dependents`) or ended; its own `wait_for_previous_kernel`
returns when that kernel has ended. As each kernel waits, all earlier kernels have ended by then
too. Before its wait a kernel may read only data that no kernel writes, such as weights, and it
writes nothing.

A kernel that reads weights calls `launch_dependents` before it waits, so that the weights of the
kernels after it are loaded meanwhile as well, for as many kernels as the GPU has room for. Every
other kernel calls `wait_and_launch_dependents`: it allows the next kernel to begin only after its
own wait. So when a kernel begins, everything before the last kernel that called
`wait_and_launch_dependents` has ended, and it may read the results of that before its wait too. A
kernel that is launched without PDL begins when the one before it has ended, as usual.

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

from minisrv.kernels.gpu import current_gpu, gpu_of

MAX_ARRIVALS = 1 << 16
"""Maximum number of groups of programs in one launch."""


@cache
def enabled() -> bool:
    """Whether PDL is on, as on GPUs that have it (compute capability 9.0 or higher) unless
    MINISRV_PDL is 0."""
    gpu = current_gpu()
    return os.environ.get("MINISRV_PDL") != "0" and gpu is not None and gpu.capability >= (9, 0)


def pdl() -> dict[str, Any]:
    """Return the arguments of a launch: the kernel's PDL, and the launch attribute."""
    on = enabled()
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@cache
def arrivals(device: torch.device) -> Tensor:
    """Return [MAX_ARRIVALS] int32 counters, all zero. Programs that share a result count themselves
    in one of them, and the last program sets it back to zero. Kernels of one stream may all use
    them, one after another."""
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Allow the next kernel to begin."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended."""
    if PDL:
        gdc_wait()


@triton.jit
def wait_and_launch_dependents(PDL: tl.constexpr):
    """Wait, then allow the next kernel to begin."""
    wait_for_previous_kernel(PDL)
    launch_dependents(PDL)


def multiprocessors(device: torch.device) -> int:
    """Return the number of SMs of a GPU."""
    gpu = gpu_of(device)
    assert gpu is not None, "only a GPU has SMs"
    return gpu.multiprocessors

"""The memory of a GPU that one process holds, which tests beside each other can compare."""

from __future__ import annotations

import os

import pynvml
import torch


def used() -> int:
    """Return the number of bytes of the current GPU that this process holds, without what torch
    keeps for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    [held] = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    assert held is not None, "the driver tells the memory of each process"
    return int(held)

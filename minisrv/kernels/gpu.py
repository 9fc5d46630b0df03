"""The GPU that kernels are launched on, as far as their launches depend on it.

Kernels are also compiled where no GPU can be seen: a tensor on torch's meta device, which has a
shape and no memory, then stands for one on the GPU that `rehearse_on` has named.

Knows: CUDA's properties of a device. Knows no kernel.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """What launches depend on.

    capability: the compute capability.
    multiprocessors: the number of SMs.
    """

    capability: tuple[int, int]
    multiprocessors: int


_rehearsed: GPU | None = None


def rehearse_on(gpu: GPU | None) -> None:
    """From now on, take tensors on the meta device for tensors on `gpu`; with None, for none."""
    global _rehearsed
    _rehearsed = gpu


def is_rehearsing() -> bool:
    """Whether tensors on the meta device stand for tensors on a GPU."""
    return _rehearsed is not None


def gpu_of(device: torch.device) -> GPU | None:
    """Return the GPU on which the tensors of a device are, None if they are on none."""
    if device.type == "meta":
        return _rehearsed
    return _properties(device) if device.type == "cuda" else None


def current_gpu() -> GPU | None:
    """Return the GPU on which kernels are launched at present, None if there is none."""
    if _rehearsed is not None:
        return _rehearsed
    if not torch.cuda.is_available():
        return None
    return _properties(torch.device("cuda", torch.cuda.current_device()))


@cache
def _properties(device: torch.device) -> GPU:
    found = torch.cuda.get_device_properties(device)
    return GPU((found.major, found.minor), found.multi_processor_count)

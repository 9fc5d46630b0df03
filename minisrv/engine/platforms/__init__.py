"""The devices that an engine runs on: one class for each kind, and the choice between them."""

from __future__ import annotations

import torch

from minisrv.config import EngineConfig
from minisrv.engine.platforms.base import Platform, Progress
from minisrv.engine.platforms.cpu import CPUPlatform
from minisrv.engine.platforms.cuda import CUDAPlatform
from minisrv.machine import no_gpu_error

__all__ = ["CPUPlatform", "CUDAPlatform", "Platform", "Progress", "platform_of"]


def platform_of(config: EngineConfig) -> Platform:
    """Return the platform that a configuration asks for; `auto` is the current GPU if there is one.

    Raises ConfigError if a GPU is required and there is none.
    """
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise no_gpu_error("torch sees no GPU here")
    if config.device == "cpu" or not there:
        return CPUPlatform()
    return CUDAPlatform(torch.device("cuda", torch.cuda.current_device()))

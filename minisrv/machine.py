"""What can be known of this machine without torch: its memory, and whether there is a driver for
GPUs.

Knows: Linux. Knows nothing of what the memory is for.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from minisrv.config import EngineConfig
from minisrv.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this process could still take: of the machine, and of its container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    available = int(found.split()[1]) << 10
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        # Pages of files that were read count as used, and give way.
        stat = (_CGROUP / "memory.stat").read_text().splitlines()
        used -= next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # no limit, or another kind of container
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def give_memory_back() -> None:
    """Return to the system what is free in the middle of the C library's heaps, of all threads.
    It keeps that otherwise. Nothing happens where the library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_driver(config: EngineConfig) -> None:
    """Raise ConfigError where a GPU is asked for and the driver's library is not even there, which
    can be seen before torch is imported."""
    if config.device != "cuda":
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise no_gpu("there is no CUDA driver here") from None


def no_gpu(why: str) -> ConfigError:
    """What to say where a GPU is asked for and cannot be had."""
    return ConfigError(
        f"device=cuda, and {why}; install torch with CUDA, look at the driver (nvidia-smi), or use "
        "--device cpu."
    )

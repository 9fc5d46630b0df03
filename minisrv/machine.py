"""Facts about this machine for which torch is not needed: its free memory, and whether there are a
CUDA driver and a C++ compiler.

Knows: Linux. Knows nothing of what the memory is used for.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from pathlib import Path

from minisrv.config import EngineConfig
from minisrv.errors import ConfigError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the number of bytes that this process could still take: the available memory of the
    machine, or less where the limit of its container is closer."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    available = int(found.split()[1]) << 10
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        # Cached pages of files count as used, but the kernel drops them where memory is needed.
        stat = (_CGROUP / "memory.stat").read_text().splitlines()
        used -= next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # no control group of version 2 sets a limit
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def release_free_memory() -> None:
    """Return the free memory inside the heaps of the C library, those of all threads, to the
    system; the library would keep it. Does nothing where the library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def has_cxx_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile would call: $CXX, or else g++."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return shutil.which(words[0]) is not None


def check_driver(config: EngineConfig) -> None:
    """Raise ConfigError if a GPU is asked for and the library of the CUDA driver is missing, which
    can be found out before torch is imported."""
    if config.device != "cuda":
        return
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise no_gpu_error("there is no CUDA driver here") from None


def no_gpu_error(why: str) -> ConfigError:
    """Return the error for a configuration that asks for a GPU where none can be used.

    why: the reason, for the message.
    """
    return ConfigError(
        f"device=cuda, and {why}; install torch with CUDA, look at the driver (nvidia-smi), or use "
        "--device cpu."
    )

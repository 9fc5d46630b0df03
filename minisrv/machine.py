"""Facts about this machine for which torch is not needed: its processor and free memory, and
whether there are a CUDA driver and what a model is compiled with.

Knows: Linux. Knows nothing of what the memory is used for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shlex
import shutil
from pathlib import Path

from minisrv.config import EngineConfig
from minisrv.errors import ConfigError

CXX_CANDIDATES = ("g++", "c++", "/usr/bin/g++", "/usr/bin/c++")
"""The C++ compilers that are looked for behind the one in CXX."""

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


def cpu_name() -> str:
    """Return the name of the processor, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resident_memory() -> int:
    """Return the number of bytes of the machine's memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def release_free_memory() -> None:
    """Return the free memory inside the heaps of the C library, those of all threads, to the
    system; the library would keep it. Does nothing where the library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cxx_compilers() -> list[str]:
    """Return the paths of the C++ compilers that this machine has, each once: that in CXX, and then
    those of `CXX_CANDIDATES`."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quote that is not closed
        named = []
    # The empty words of PATH stand for the working directory, which may belong to anybody.
    path = os.pathsep.join(filter(os.path.isabs, os.get_exec_path()))
    found = [shutil.which(name, path=path) for name in (*named[:1], *CXX_CANDIDATES)]
    return list(dict.fromkeys(compiler for compiler in found if compiler is not None))


def missing_to_compile(device: str) -> str | None:
    """Return what a model cannot be compiled without for a device and is not on this machine, in
    words; None if everything is there.

    device: "cpu" or "cuda".
    """
    if not cxx_compilers():
        return "C++ compiler"
    if device == "cuda" and not (_cuda_toolkit() / "include" / "cuda.h").exists():
        return "CUDA toolkit with its headers"
    return None


def _cuda_toolkit() -> Path:
    """Return the directory in which torch looks for CUDA's headers, whether or not it exists."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(named)
    compiler = shutil.which("nvcc")
    return Path("/usr/local/cuda") if compiler is None else Path(compiler).parents[1]


def check_driver(config: EngineConfig) -> None:
    """Raise ConfigError if a GPU is asked for and the library of the CUDA driver is missing, which
    can be found out before torch is imported."""
    if config.device == "cuda" and not has_driver():
        raise no_gpu_error("there is no CUDA driver here")


def has_driver() -> bool:
    """Whether this machine has the library of the CUDA driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def open_gpu() -> None:
    """Initialise the CUDA driver, and make the context of the first GPU that can be seen, which
    torch then finds: a process has one for each GPU. Raises OSError without a driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)


def driver_version(library: str = "libcuda.so.1") -> int:
    """Return the version of CUDA that the driver has, such as 13000 for 13.0. Raises OSError
    without a driver."""
    found = ctypes.c_int()
    code = ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(found))
    if code != 0:
        raise OSError(f"the CUDA driver does not tell its version (error {code})")
    return found.value


def no_gpu_error(why: str) -> ConfigError:
    """Return the error for a configuration that asks for a GPU where none can be used.

    why: the reason, for the message.
    """
    return ConfigError(
        f"device=cuda, and {why}; install torch with CUDA, look at the driver (nvidia-smi), or use "
        "--device cpu."
    )

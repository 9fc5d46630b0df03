"""The CPU kernels in C (`cpu.c`): compiled once for this machine, kept, and called by address.

Knows: how to compile and load them, and how their arguments are laid out. Knows nothing of what
they are for; where there is no compiler, torch's operations do the same.

An operation of torch costs about 1 us before it computes anything and passes its result through
memory. A layer's attention would be twenty of them; in C it is one, which reads K and V where they
lie. Compilers are what Triton and torch.compile ask for as well.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from minisrv.cache import cache_directory

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")

TIMEOUT = 60
"""Seconds for a compiler."""

LANES = 16
MAX_HEAD_DIM = 256
MAX_QUERY = 8192
MAX_HEADS = 128
"""As in `cpu.c`."""


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason in the log, where they cannot be had."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        logger.warning(
            "no C compiler: decode runs by torch's operations, at about half the speed. "
            "Install gcc, or name a compiler in CC."
        )
        return None
    try:
        # Its threads are torch's: a second pool would fight the first one for the cores.
        ctypes.CDLL(_openmp_of_torch(), ctypes.RTLD_GLOBAL)
        return _loaded(compiler)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or error
        logger.warning(
            "%s cannot compile the CPU kernels: decode runs by torch's operations, at about half "
            "the speed. It said: %s",
            shlex.join(compiler),
            str(said).strip()[:400],
        )
        return None


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The library, compiled again if what is kept is damaged. Raises what `_compiled` raises."""
    library = _compiled(compiler)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(compiler)))


def _compiled(compiler: list[str]) -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not kept yet.

    Raises OSError and SubprocessError; RuntimeError without a home directory.
    """
    flags = [*FLAGS, *_vector_flags()]
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT
    ).stdout
    key = hashlib.sha256(
        b"\0".join([SOURCE.read_bytes(), " ".join(flags).encode(), version, _processor()])
    ).hexdigest()[:16]
    directory = cache_directory()
    library = directory / f"cpu-{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made, linked = Path(scratch, "cpu.o"), Path(scratch, "cpu.so")
        # Linked without -fopenmp: OpenMP's names are found in the library that torch has loaded.
        for command in (
            [*compiler, *flags, "-c", str(SOURCE), "-o", str(made)],
            [*compiler, "-shared", str(made), "-o", str(linked), "-lm"],
        ):
            subprocess.run(
                command,
                capture_output=True,
                check=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
            )
        linked.replace(library)  # another process may have been as fast
    return library


def _vector_flags() -> list[str]:
    return ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []


def _processor() -> bytes:
    """What decides which instructions `-march=native` may use."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"\n".join(
        sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))})
    )


def _openmp_of_torch() -> str:
    """The path of the OpenMP runtime that this process has loaded. Raises OSError without one."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[5:]
        if path and Path(path[0]).name.startswith(("libgomp", "libomp", "libiomp")):
            return path[0]
    raise OSError("torch has loaded no OpenMP runtime.")

"""The CPU kernels in C (`cpu.c`): compiled once for this machine, kept, and called by address.

Knows: how to compile and load them, and how their arguments are laid out. Knows nothing of what
they are for; where there is no compiler, torch's operations do the same.

An operation of torch costs about 1 us before it computes anything, and passes its result through
memory. A layer's attention would be twenty of them; in C it is one, which reads K and V where they
lie. Triton and torch.compile need a compiler as well.
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

from minisrv.cache import cache_directory, read_cached, write_cached

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")

TIMEOUT = 60
"""Timeout of a compiler run in seconds."""

_FORMAT = b"a digest at its end"
"""Version of the format in which the library is kept; it is part of the key."""

LANES = 16
MAX_QUERY = 8192
MAX_HEADS = 128
"""Maximum number of heads. This and the two constants above are the same as in `cpu.c`."""


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, with the reason in the log, if they cannot be compiled."""
    compiler = _compiler()
    if compiler is None:
        logger.warning(
            "no C compiler: decode runs by torch's operations, at about half the speed. "
            "Install gcc, or name a compiler in CC."
        )
        return None
    try:
        # The library's threads must be torch's: a second pool would compete with the first one for
        # the cores.
        ctypes.CDLL(_openmp_of_torch(), ctypes.RTLD_GLOBAL)
        return _loaded(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", "") or error
        logger.warning(
            "%s cannot compile the CPU kernels: decode runs by torch's operations, at about half "
            "the speed. It said: %s",
            shlex.join(compiler),
            str(output).strip()[:400],
        )
        return None


def _compiler() -> list[str] | None:
    """Return the words of $CC, or `cc`, with the first word as the path of a program; None if there
    is no such program.

    The program is not looked for in the working directory, which an empty item of PATH stands for.
    """
    try:
        name, *arguments = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError:  # a quote that is not closed
        return None
    path = os.pathsep.join(filter(os.path.isabs, os.get_exec_path()))
    found = shutil.which(name, path=path)
    return None if found is None else [os.path.abspath(found), *arguments]


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """Return the library for this source, compiler and processor; compile it if no kept one can be
    loaded. Raises OSError and SubprocessError."""
    flags = [*FLAGS, *_vector_flags()]
    version = _run([*compiler, "--version"]).encode()
    key = hashlib.sha256(
        b"\0".join([SOURCE.read_bytes(), " ".join(flags).encode(), version, processor(), _FORMAT])
    ).hexdigest()[:16]
    try:
        library = cache_directory() / f"cpu-{key}.so"
    except (OSError, RuntimeError) as error:
        logger.warning("the CPU kernels are compiled at each start: %s", error)
        return _load(_compile(compiler, flags))
    if (body := read_cached(library)) is not None:
        try:
            return _load(body)
        except OSError as error:  # e.g. made for another C library, on a shared home
            logger.warning("%s cannot be loaded and is compiled again: %s", library, error)
    body = _compile(compiler, flags)
    write_cached(library, body)
    return _load(body)


def _compile(compiler: list[str], flags: list[str]) -> bytes:
    """Compile the kernels and return the content of a shared library. Raises OSError and
    SubprocessError."""
    with tempfile.TemporaryDirectory(prefix="minisrv-") as scratch:
        made, linked = Path(scratch, "cpu.o"), Path(scratch, "cpu.so")
        _run([*compiler, *flags, "-c", str(SOURCE), "-o", str(made)])
        # Linked without -fopenmp: OpenMP's symbols are found in the library that torch has loaded.
        _run([*compiler, "-shared", str(made), "-o", str(linked), "-lm"])
        return linked.read_bytes()


def _run(command: list[str]) -> str:
    """Run a command and return what it prints. Its working directory is the root directory, so that
    it finds no files in the current one."""
    return subprocess.run(
        command,
        capture_output=True,
        check=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        cwd="/",
    ).stdout


def _load(body: bytes) -> ctypes.CDLL:
    """Load the library from memory: the content that was checked is what is loaded, and no file can
    be truncated under the process that runs it. Raises OSError."""
    descriptor = os.memfd_create("minisrv-cpu.so")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(body)
    # NOTE: the descriptor stays open, because the loader takes one path for one library.
    return ctypes.CDLL(f"/proc/{os.getpid()}/fd/{descriptor}")


def _vector_flags() -> list[str]:
    return ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []


def processor() -> bytes:
    """Return the description of the processor, which decides which instructions `-march=native` may
    use."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"\n".join(
        sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))})
    )


def _openmp_of_torch() -> str:
    """Return the path of the OpenMP runtime that this process has loaded. Raises OSError if there
    is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[5:]
        if path and Path(path[0]).name.startswith(("libgomp", "libomp", "libiomp")):
            return path[0]
    raise OSError("torch has loaded no OpenMP runtime.")

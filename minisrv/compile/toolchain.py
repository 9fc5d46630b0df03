"""The C++ compiler by which packages are made.

A package is a shared library that torch's process loads. If a compiler links the standard library
of C++ into it statically, there are two of them in the process, which share some of their symbols,
and the load crashes. So a compiler is tried on a small library before it is used.

Knows: what is asked of a compiler. Knows nothing of where compilers are (`machine`), nor of torch.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from minisrv import machine
from minisrv.errors import CompilationError

TIMEOUT = 60
"""Timeout of a compiler run in seconds."""

_SOURCE = "int *made() { return new int; }\n"  # `new` is in the standard library
_LIBRARY = b"libstdc++.so"


def choose_cxx() -> str:
    """Return the path of the first C++ compiler of this machine whose libraries use the standard
    library that the process has.

    Raises CompilationError if there is none.
    """
    tried = machine.cxx_compilers()
    for compiler in tried:
        if _links_dynamically(compiler):
            return compiler
    names = ", ".join(tried) or f"CXX and {', '.join(machine.CXX_CANDIDATES)}"
    raise CompilationError(
        f"there is no C++ compiler that can be used: of {names}, none makes a library that uses "
        "the shared libstdc++; install g++, or name another compiler in CXX."
    )


def _links_dynamically(compiler: str) -> bool:
    """Whether a compiler makes a library that loads libstdc++ and does not contain it."""
    with tempfile.TemporaryDirectory(prefix="minisrv-") as scratch:
        source, library = Path(scratch, "made.cpp"), Path(scratch, "made.so")
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT, cwd="/")
        except (OSError, subprocess.SubprocessError):
            return False
        return _LIBRARY in library.read_bytes()

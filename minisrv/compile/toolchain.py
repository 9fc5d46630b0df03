"""The C++ compiler by which packages are made.

A package is a shared library that torch's process loads. If a compiler links the standard library
of C++ into it statically, there are two of them in the process, which share some of their symbols,
and the load crashes. So a compiler is tried on a small library before it is used.

Knows: where compilers are looked for, and what is asked of them. Knows nothing of torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from minisrv.errors import CompilationError

CANDIDATES = ("g++", "c++", "/usr/bin/g++", "/usr/bin/c++")
"""The compilers that are tried behind the one in CXX."""

TIMEOUT = 60
"""Timeout of a compiler run in seconds."""

_SOURCE = "int *made() { return new int; }\n"  # `new` is in the standard library
_LIBRARY = b"libstdc++.so"


def choose_cxx() -> str:
    """Return the path of the first C++ compiler whose libraries use the standard library that the
    process has: CXX, or one of `CANDIDATES`.

    Raises CompilationError if there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    # The empty words of PATH stand for the working directory, which may belong to anybody.
    path = os.pathsep.join(filter(os.path.isabs, os.get_exec_path()))
    found = [shutil.which(name, path=path) for name in (*named[:1], *CANDIDATES)]
    tried = list(dict.fromkeys(compiler for compiler in found if compiler is not None))
    for compiler in tried:
        if _links_dynamically(compiler):
            return compiler
    raise CompilationError(
        "there is no C++ compiler that can be used: of "
        f"{', '.join(tried) or 'CXX and ' + ', '.join(CANDIDATES)}, none makes a library that uses "
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

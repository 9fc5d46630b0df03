"""Keeps the working directory out of the path on which Python looks for modules.

The working directory may be a checkpoint that somebody else has made, with a file that has the name
of a module of the standard library. Python itself looks there first for `python -m` and
`python -c`, and for an empty item in PYTHONPATH, and has imported from there before any code of
minisrv runs; the `minisrv` command is started without it. This module decides for the imports that
follow, and for child processes.

Knows: `sys.path`. Imports only modules that Python has loaded when it starts, not even __future__,
as any other might be found in the working directory.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The directory that holds the minisrv package. It may be the working directory."""

_PROGRAM = "minisrv"


def leave_working_directory() -> None:
    """Remove the working directory from this process's `sys.path`, if the process runs minisrv; any
    other program decides for itself."""
    if _is_program():
        sys.path[:] = without_working_directory(sys.path)


def without_working_directory(path: list[str]) -> list[str]:
    """Return the entries of `path` without the working directory, for which an empty entry stands
    too. An entry stays if minisrv itself, or the program that this process runs, lies there."""
    kept = {ROOT, _root_of_main()}
    return [entry for entry in path if entry in kept or not _is_here(entry)]


def _is_here(entry: str) -> bool:
    try:
        return os.path.samefile(entry or ".", ".")
    except OSError:
        return False


def _is_program() -> bool:
    if sys.argv[:1] != ["-m"]:  # argv[0] is "-m" while Python still looks for the module to run
        return os.path.basename(sys.argv[0] if sys.argv else "") == _PROGRAM
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] == _PROGRAM


def _root_of_main() -> str | None:
    """Return the directory on the path in which Python found the program; None for a program that
    is no file, such as that of an interactive session."""
    main = sys.modules.get("__main__")
    place: str | None = getattr(main, "__file__", None)
    if place is None:
        return None
    spec = getattr(main, "__spec__", None)  # set where the program was started by `python -m`
    for _ in range(1 if spec is None else 1 + spec.name.count(".")):
        place = os.path.dirname(place)
    return os.path.abspath(place)

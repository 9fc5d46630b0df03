"""Where Python looks for modules: never in the working directory, which may be a stranger's
checkpoint, with a module that is named as one of the standard library is.

Python itself looks there first for `python -m` and `python -c`, and for an empty item in
PYTHONPATH, and has imported from there before any code of ours runs: the `minisrv` command is
started without it. What is decided here is for the imports that follow, and for children.

Knows: `sys.path`. Imports nothing that Python does not bring along when it starts, not even
__future__, as such an import might be found in the working directory.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The directory in which minisrv lies. It may be the working directory."""

_PROGRAM = "minisrv"


def leave_working_directory() -> None:
    """Drop the working directory from this process's path, if minisrv is the program that it runs:
    in others it is the program's to say."""
    if _is_program():
        sys.path[:] = without_working_directory(sys.path)


def without_working_directory(path: list[str]) -> list[str]:
    """The entries of a path, but for the working directory, which an empty one means too; unless
    minisrv itself lies there, or the program that this process runs."""
    kept = {ROOT, _root_of_main()}
    return [entry for entry in path if entry in kept or not _is_here(entry)]


def _is_here(entry: str) -> bool:
    try:
        return os.path.samefile(entry or ".", ".")
    except OSError:
        return False


def _is_program() -> bool:
    if sys.argv[:1] != ["-m"]:  # which is what stands there while Python looks for the module
        return os.path.basename(sys.argv[0] if sys.argv else "") == _PROGRAM
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] == _PROGRAM


def _root_of_main() -> str | None:
    """The directory from which Python has taken the program; None for what was typed."""
    main = sys.modules.get("__main__")
    place: str | None = getattr(main, "__file__", None)
    if place is None:
        return None
    spec = getattr(main, "__spec__", None)  # of `python -m`
    for _ in range(1 if spec is None else 1 + spec.name.count(".")):
        place = os.path.dirname(place)
    return os.path.abspath(place)

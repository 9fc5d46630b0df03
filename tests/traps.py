"""Modules that record that they were imported, in a directory from which nothing may be
imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAMES = frozenset(sys.stdlib_module_names) | {
    *("sitecustomize", "usercustomize", "minisrv", "loadgen"),
    *("torch", "numpy", "transformers", "tokenizers", "zmq", "uvicorn", "msgspec", "rich"),
}
"""The names of all top-level modules that a start imports and that a stranger could guess."""

_TRAP = """\
import posix
log = posix.open({log!r}, posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND)
posix.write(log, (__name__ + "\\n").encode())
raise ImportError("a trap: " + __name__)
"""


@dataclass(frozen=True)
class Traps:
    """The traps of a directory.

    log: the file to which a trap writes its name when it is imported.
    """

    log: Path

    def sprung(self) -> set[str]:
        """Return the names of the traps that have been imported."""
        return set(self.log.read_text().split()) if self.log.exists() else set()


def set_traps(directory: Path, names: Iterable[str] = NAMES) -> Traps:
    """Make `directory` one in which each of the names is a module that is a trap."""
    traps = Traps(directory.parent / f"{directory.name}-sprung")
    for name in names:
        (directory / f"{name}.py").write_text(_TRAP.format(log=str(traps.log)))
    return traps


@cache
def loaded_before_dash_m() -> frozenset[str]:
    """Return the names of modules that Python itself has imported, with the working directory in
    its path, before the first line of a package that it runs by `-m`."""
    code = "import runpy, sys; print(*sys.modules)"
    program = [sys.executable, "-P", "-c", code]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return frozenset(name.partition(".")[0] for name in done.stdout.split())


def install_command(directory: Path, name: str = "minisrv") -> str:
    """Write the script that pip writes for a command, beside which Python looks for modules, and
    return its path."""
    directory.mkdir()
    script = directory / name
    main = f"from {name}.cli import main"
    script.write_text(f"import sys\n{main}\nif __name__ == '__main__':\n    sys.exit(main())\n")
    return str(script)

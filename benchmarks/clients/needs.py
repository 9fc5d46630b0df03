"""The message of a script that imports a package which is not installed.

Knows: Python's import errors. Knows nothing of the packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(install: str) -> Iterator[None]:
    """Return a context for imports and for reads of package versions: one that fails ends the
    program with a line that names the missing package and the command that installs it.

    install: that command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise SystemExit(f"{missing} is not installed; this script needs: {install}") from error

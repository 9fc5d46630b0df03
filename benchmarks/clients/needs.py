"""What a script says when a package that it imports is not installed.

Knows: Python's import errors. Knows nothing of the packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(install: str) -> Iterator[None]:
    """Around imports, and what asks for versions: one that fails ends the program with a line that
    names what is missing, and the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise SystemExit(f"{missing} is not installed; this script needs: {install}") from error

"""The directory in which minisrv keeps what it has computed once: compiled kernels, and what
checkpoints say.

Knows: where it lies, and that nobody else may write to it. Knows nothing of what is kept.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/minisrv`, or `~/.cache/minisrv`; made if it is missing.

    Raises OSError if it cannot be made or others may write to it, RuntimeError without a home
    directory.
    """
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisrv"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise OSError(f"others may write to {directory}, whose content is trusted.")
    return directory

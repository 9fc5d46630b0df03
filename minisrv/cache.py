"""The cache on disk of results that are computed once: compiled kernels, and descriptions of
checkpoints.

Each cached file ends with the SHA-256 of the content before it, so that a file that was cut off, or
whose pages were lost, is told from a whole one. A file is used only if no other user could have
written it. One that is not used is computed again, and the log says why: the cache never keeps a
server from starting.

Knows: where the cache lies, and when one of its files is trusted. Knows nothing of the content of
the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

DIGEST_SIZE = hashlib.sha256().digest_size

MAX_BYTES = 1 << 29
"""Maximum size in bytes of a file that is read: twice that of a description of a checkpoint."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory(*parts: str) -> Path:
    """Return `$XDG_CACHE_HOME/minisrv`, or else `~/.cache/minisrv`, or a directory below it; make
    it if it is missing.

    parts: the names of the directories that lead from there to the one that is wanted.
    Raises OSError if it cannot be made or other users may write to it, RuntimeError without a home
    directory.
    """
    directory = _user_cache()
    for part in ("minisrv", *parts):
        directory /= part
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
        if found.st_uid not in (0, os.getuid()) or found.st_mode & _OTHERS_WRITE:
            raise OSError(f"others may write to {directory}, whose content is trusted.")
    for parent in directory.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OSError(
                f"others may put another in the place of {directory}: all may write to {parent}."
            )
    return directory


@cache
def code_digest(parts: tuple[str, ...]) -> str:
    """Return the digest of parts of the package, for results that depend on its code.

    parts: the paths of packages and modules in minisrv.
    """
    root = Path(__file__).parent
    found = hashlib.sha256()
    for part in parts:
        for path in sorted([root / part] if part.endswith(".py") else (root / part).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def read_cached(path: Path) -> bytes | None:
    """Return what `write_cached` has written to a file of the cache directory. None if there is no
    such file, or if it is not trusted; the log then gives the reason."""
    try:
        doubt, content = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        doubt = "it is a link" if path.is_symlink() else f"it cannot be read ({error.strerror})"
    else:
        body, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        if not doubt and hashlib.sha256(body).digest() == digest:
            return body
        doubt = doubt or "it is damaged: its digest is another"
    logger.warning("%s is not used, as %s; it is made again.", path, doubt)
    return None


def write_cached(path: Path, body: bytes) -> None:
    """Write a file of the cache directory, and replace whatever is there. If that fails, a warning
    is logged and nothing is raised."""
    scratch = None
    try:
        # It is written under another name first, so that nobody reads half of it.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            scratch = Path(file.name)
            file.write(body + hashlib.sha256(body).digest())
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        scratch.replace(path)
    except OSError as error:
        logger.warning("%s could not be kept, and is made again next time: %s", path, error)
        if scratch is not None:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)


def _user_cache() -> Path:
    """Return the user's cache directory. A relative path in XDG_CACHE_HOME is ignored, as the XDG
    Base Directory Specification demands: it would lie in the working directory, which may belong to
    somebody who is not trusted. Raises RuntimeError without an absolute home directory."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    directory = named if named.is_absolute() else Path.home() / ".cache"
    if not directory.is_absolute():
        raise RuntimeError(f"the home directory, {Path.home()}, is no absolute path.")
    return directory


def _read(path: Path) -> tuple[str, bytes]:
    """Return the reason why a file is not trusted, which is empty if it is, and its content, which
    is empty if it is not. Raises OSError if it cannot be opened or read, or is a symbolic link."""
    # O_NONBLOCK: to open a pipe in the file's place would otherwise wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if doubt := _doubt(os.fstat(descriptor)):
            return doubt, b""
        with open(descriptor, "rb", closefd=False) as file:
            return "", file.read()
    finally:
        os.close(descriptor)


def _doubt(found: os.stat_result) -> str:
    """Return the reason why a file of the cache is not trusted; empty if it is."""
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if found.st_size > MAX_BYTES:
        return f"it has {found.st_size} bytes, and {MAX_BYTES} are the most"
    if found.st_uid not in (0, os.getuid()):
        return f"it belongs to another user ({found.st_uid})"
    if found.st_mode & _OTHERS_WRITE:
        return f"others may write to it (its mode is {stat.S_IMODE(found.st_mode):o})"
    return ""

"""Checks which files of a checkpoint may be read: regular files of a bounded size in its directory.

The author of a checkpoint is not trusted. An archive may hold symbolic links to files of the user
who unpacks it, and a file may name others by their paths; a chat template that is a link to a
password file would put it into every prompt. So:

- a small file (JSON, a tokenizer's, a chat template) that is a link must lead to a place in the
  directory, or, in a snapshot of the hub's cache, to the `blobs` of the same repository, where the
  links of snapshots lead;
- weights may be links to regular files anywhere, as many people share weights between directories
  in this way: they are read as numbers or refused, and never quoted;
- a file that another file names must be in the directory, whatever the setting is called.

Anything that is not a regular file (a pipe, a device, a dangling link) counts as missing.
The directory itself may be a link. A user who can change it while it is read is trusted.

Knows: directories, links and sizes. Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minisrv.errors import ModelError

MAX_JSON_BYTES = 16 << 20
"""Maximum size in bytes of a file that is read as JSON here. The index of a thousand shards has a
few MB."""
MAX_BYTES = 256 << 20
"""Maximum size in bytes of any small file. The largest tokenizer.json in use has 35 MB."""

_NAMING = ("file", "vocab", "merges")
"""Parts of the names of settings whose values transformers takes for paths, relative ones too."""


def matching_files(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the small files in `directory` that match one of the patterns, in sorted order. Raises
    ModelError for a file that may not be read, OSError for a directory that cannot be listed."""
    os.scandir(directory).close()  # raises; `glob` would take the directory for an empty one
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    for path in found:
        check_file(path, directory)
    return sorted(found)


def check_file(path: Path, directory: Path, max_bytes: int = MAX_BYTES) -> None:
    """Raise ModelError if the small file `path` of a checkpoint may not be read.

    max_bytes: maximum size in bytes.
    """
    if not _is_inside(path, directory):
        raise ModelError(
            f"{path} leads to {path.resolve()}, outside of the checkpoint; only weights may be "
            "links to other places. Put a copy of the file in its place, if it is what you want."
        )
    if (size := path.stat().st_size) > max_bytes:
        raise ModelError(f"{path} has {size} bytes; {max_bytes} are the most for such a file.")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Raises ModelError."""
    try:
        if not path.is_file():
            raise ModelError(f"{path} is missing, or no regular file.")
        check_file(path, path.parent, MAX_JSON_BYTES)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return value


def check_names(path: Path) -> None:
    """Raise ModelError if a JSON file names a file that is outside of its directory.

    Only the libraries that read the many settings know which of them are paths. So any string
    counts that is the path of an existing file relative to the directory or, if the string or the
    name of its setting looks like that of a path, relative to the working directory. A path to
    nothing is harmless: some tools note where a file once was.
    """
    directory = path.parent
    for name, text in _strings(read_json(path)):
        bases = [directory]
        if os.sep in text or any(part in name for part in _NAMING):
            bases.append(Path.cwd())
        for base in bases:
            named = base / text
            try:
                is_outside = named.is_file() and not _is_inside(named, directory)
            except (OSError, ValueError):  # the string is no path, e.g. as it is too long
                continue
            if is_outside:
                raise ModelError(
                    f"{path}: {name} names {named}, a file outside of the checkpoint; leave it "
                    "out, or put a copy of the file beside it."
                )


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether `path`, with all links followed, lies in the directory, or in the directory of the
    hub's cache to which the links of a snapshot lead
    (`models--org--name/{snapshots/COMMIT,blobs}`)."""
    try:
        real, root = path.resolve(), directory.resolve()
    except RuntimeError:  # raised for links that lead to each other
        return False
    repository = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    places = (root, repository / "blobs") if is_snapshot else (root,)
    return any(real.is_relative_to(place) for place in places)


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the strings in a JSON document, each with the name of the setting that it belongs to:
    (name, string)."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        name, part = todo.pop()
        if isinstance(part, str):
            yield name, part
        elif isinstance(part, dict):
            todo += [(name or key, inner) for key, inner in part.items()]
        elif isinstance(part, list):
            todo += [(name, inner) for inner in part]

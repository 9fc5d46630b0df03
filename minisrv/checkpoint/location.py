"""Finds the directory of a checkpoint: of the default model, of a directory, or of a hub id.

Files of the hub are fetched, the small ones first, so that a model can be refused for what they say
before gigabytes are fetched. Weights are read from safetensors only, and no code of a checkpoint is
ever fetched.

Knows: the names of the files in a Hugging Face checkpoint, and how they are fetched.
Knows nothing of torch, nor of the content of the files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisrv.checkpoint.files import read_json
from minisrv.errors import ModelError, shown

DEFAULT_MODEL = "minisrv-default"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

SMALL_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "*.jinja",
    WEIGHTS_INDEX,
)
"""Patterns of the files, other than weights, that are fetched from the hub."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_checkpoint(model: str | None, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint.

    model: a directory, or a hub id, whose small files are fetched into the hub's cache; None is the
        default model.
    revision: a branch, tag or commit of the hub's repository; None takes its main branch.
    Raises ModelError.
    """
    directory = resolve_directory(model, revision)
    if not (directory / CONFIG).is_file():
        found = sorted(path.name for path in directory.glob("*.gguf"))
        if found or "gguf" in str(model).lower():
            raise ModelError(
                f"{model} is a GGUF checkpoint{f' ({found[0]})' if found else ''}, llama.cpp's "
                "format, which minisrv does not read; name the checkpoint that it was made from, "
                f"with {CONFIG} and safetensors."
            )
        raise ModelError(f"{directory} has no {CONFIG}: it is not a Hugging Face checkpoint.")
    return directory


def resolve_directory(model: str | None, revision: str | None = None) -> Path:
    """Do the same as `resolve_checkpoint` for a directory that need not hold a config.json, e.g.
    that of a tokenizer."""
    if model is None:
        return _default_model()
    if not model:
        raise ModelError("the name is empty; give a directory or a hub id, or leave it out.")
    try:
        model.encode()  # answers and logs contain the name
    except UnicodeEncodeError:
        raise ModelError(
            f"the name {model!a} is no UTF-8; rename the directory, or make a link to it."
        ) from None
    try:
        directory = Path(model).expanduser()
    except RuntimeError:
        raise ModelError(f"{model!r}: there is no such user's home directory.") from None
    if directory.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision={revision!r} is of a repository on the hub, and {model} is a directory; "
                "leave it out."
            )
        return directory
    if directory.exists():
        if directory.suffix == ".gguf":
            raise ModelError(
                f"{model} is a GGUF file, llama.cpp's format, which minisrv does not read; name "
                f"the checkpoint that it was made from, with {CONFIG} and safetensors."
            )
        raise ModelError(f"{model} is a file; name the checkpoint's directory instead.")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r} is neither a directory nor a hub id such as 'org/name'.")
    return _fetch(model, revision, SMALL_FILES, show_progress=False)


def fetch_weights(model: str | None, directory: Path) -> None:
    """Fetch the weights to the small files in `directory`, if `model` is a hub id. Files that are
    there already are not fetched again. Raises ModelError."""
    if model is None or Path(model).expanduser().is_dir():
        return
    # The weights of the same commit are fetched, so that a push in between cannot mix two versions.
    commit, index = directory.name, directory / WEIGHTS_INDEX
    names = _indexed_files(index) if index.is_file() else [WEIGHTS]
    _fetch(model, commit, names, show_progress=True)
    if not all((directory / name).is_file() for name in names):  # the index is out of date
        _fetch(model, commit, [WEIGHTS], show_progress=True)


def weight_files(directory: Path) -> tuple[Path, ...]:
    """Return the safetensors files that together hold the weights: the single file, or else those
    that the index names. As in transformers, an index beside a single file is ignored.

    Raises ModelError.
    """
    single, index = directory / WEIGHTS, directory / WEIGHTS_INDEX
    if single.is_file():
        return (single,)
    if index.exists():
        files = _indexed_files(index)
        if missing := [name for name in files if not (directory / name).is_file()]:
            names = ", ".join(map(shown, missing[:8]))
            raise ModelError(f"{index} names files that are not there: {names}.")
        return tuple(directory / name for name in files)
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pt*") for path in directory.glob(pattern)
    )
    also = f" It has {pickled[0]}, which is never loaded: convert it first." if pickled else ""
    raise ModelError(
        f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; weights are read from "
        f"safetensors only.{also}"
    )


def _indexed_files(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: weight_map is missing or empty.")
    if odd := [name for name in names.values() if not isinstance(name, str)]:
        raise ModelError(f"{index}: weight_map must hold names of files, not {shown(odd[0])}.")
    files = sorted(set(names.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise ModelError(f"{index} names files outside of the checkpoint: {shown(outside[0])}.")
    if others := [name for name in files if not name.endswith(".safetensors")]:
        raise ModelError(
            f"{index} names {shown(others[0])}; weights are read from safetensors only."
        )
    return files


def _default_model() -> Path:
    """Return the directory of the default model, which lies inside the package in a wheel, and
    beside it in an editable install. Raises ModelError."""
    package = Path(__file__).parents[1]
    places = (package / "_models" / DEFAULT_MODEL, package.parent / "models" / DEFAULT_MODEL)
    for place in places:
        if place.is_dir():
            return place
    raise ModelError(
        f"the default model is not installed (looked in {places[0]} and {places[1]}); name a "
        "model: a directory or a hub id."
    )


def _fetch(
    model: str, revision: str | None, patterns: Sequence[str], *, show_progress: bool
) -> Path:
    # This import takes 0.3 s, which a model in a directory does not need.
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": not show_progress})

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=list(patterns), tqdm_class=Bar
            )
        )
    except Exception as error:  # the errors of huggingface_hub have no base class of their own
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no directory {model!r} here, and fetching it from the hub failed: "
            f"{type(error).__name__}: {reason}"
        ) from error

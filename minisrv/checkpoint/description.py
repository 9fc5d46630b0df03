"""A checkpoint as plain data: the model's shape, its defaults for generation, and its tokenizer.

The files are interpreted by transformers (`minisrv.checkpoint.by_transformers`), which runs in a
process of its own, because importing it takes longer than the start of an API worker. Its answers
are stored in the cache by the content of the files and the versions of the libraries, so that a
second start does not import it. Nothing here imports torch, and nothing transformers, unless the
process has imported that library already, or torch for a model that transformers' code computes.

Knows: which files a description depends on, the cache, and the process. Knows nothing of the
meaning of the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec

from minisrv import errors, model_config, request
from minisrv.cache import cache_directory, read_cached, write_cached
from minisrv.checkpoint import schema
from minisrv.checkpoint.files import matching_files, read_json
from minisrv.checkpoint.location import CONFIG, GENERATION_CONFIG
from minisrv.checkpoint.schema import (
    MEMORY_BYTES,
    PROCESSOR_SECONDS,
    Descriptions,
    ModelDescription,
)
from minisrv.errors import (
    MinisrvError,
    ModelError,
    UnknownArchitectureError,
    UnsupportedSettingError,
    truncated,
)
from minisrv.import_path import ROOT, without_working_directory
from minisrv.model_config import check_implemented
from minisrv.text import tokenizer_description
from minisrv.text.tokenizer_description import TokenizerDescription

logger = logging.getLogger(__name__)

TIMEOUT = 120
"""Maximum number of seconds in which transformers must have read the small files; it usually takes
one."""
MAX_ENTRIES = 64
"""Maximum number of descriptions that stay in the cache; the oldest are deleted."""

MODEL_FILES = (CONFIG, GENERATION_CONFIG)
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*",
)
"""Patterns of the files from which a tokenizer is read, beside config.json, which may name its
class."""
_OTHERS = ("*.json", "*.txt", "*.bpe", "*.spm", "*.tiktoken")
"""Patterns of files from which tokenizers of models that are not implemented are read. They are
checked too, as transformers may open them, but do not count for the cache."""

_T = TypeVar("_T")
_PACKAGES = ("transformers", "tokenizers", "torch")
_LAST_WORDS = 1 << 16
"""Number of bytes, at the end of what the process printed, in which its last line is looked for."""


def describe_model(directory: Path, model_impl: str = "auto") -> ModelDescription:
    """Return the description of the model in `directory`. Raises ModelError, ConfigError and
    UnknownArchitectureError.

    model_impl: the setting of that name.
    """
    found = describe(directory, None, model_impl).model
    assert found is not None, "it was asked for"
    return found


def describe_tokenizer(directory: Path) -> TokenizerDescription:
    """Return the description of the tokenizer in `directory`. Raises ModelError."""
    found = describe(None, directory).tokenizer
    assert found is not None, "it was asked for"
    return found


def describe(model: Path | None, tokenizer: Path | None, model_impl: str = "auto") -> Descriptions:
    """Return the descriptions of a model and of a tokenizer. Those that are not in the cache are
    read by one process together.

    model, tokenizer: the directories, either of which may be None.
    model_impl: the setting of that name; "auto" takes the decoder in `nn` for what it computes, and
        transformers' code for all else.
    Raises ModelError, ConfigError and UnknownArchitectureError.
    """
    place, directories = _entries_directory(), {"model": model, "tokenizer": tokenizer}
    entries = _entries(place, directories, model_impl)
    found = Descriptions(
        model=_read_entry(entries["model"], ModelDescription),
        tokenizer=_read_entry(entries["tokenizer"], TokenizerDescription),
    )
    read = _read_by_first(
        model if found.model is None else None,
        tokenizer if found.tokenizer is None else None,
        model_impl,
    )
    if read.model is None and read.tokenizer is None:
        return found
    # What was read of files that have changed meanwhile is not kept under the digest of either.
    after = _entries(place, directories, model_impl)
    for name, entry in entries.items():
        if (description := getattr(read, name)) is not None:
            setattr(found, name, description)
            if entry == after[name]:
                _write_entry(entry, description)
    return found


def has_tokenizer(directory: Path) -> bool:
    """Whether `directory` has any file from which a tokenizer could be read."""
    return bool(matching_files(directory, TOKENIZER_FILES))


def _read_by_first(model: Path | None, tokenizer: Path | None, model_impl: str) -> Descriptions:
    """Read the descriptions, that of the model for the first implementation that computes it among
    those that `model_impl` allows. Raises the errors of `describe`."""
    implementation = "minisrv" if model_impl == "auto" else model_impl
    try:
        return _read(model, tokenizer, implementation)
    except (UnknownArchitectureError, UnsupportedSettingError) as error:
        if implementation == "transformers":
            raise
        refusal = error
    if model_impl == "minisrv":
        raise type(refusal)(
            f"{refusal.message} transformers' own code may compute it (--model-impl transformers)."
        )
    try:
        read = _read(model, tokenizer, "transformers")
    except MinisrvError as error:
        if isinstance(refusal, UnknownArchitectureError):
            raise  # it is enough to know what transformers' code cannot serve
        raise type(error)(
            f"{refusal.message} By transformers' code it cannot be served either: {error.message}"
        ) from error
    assert read.model is not None, "what was refused is a model"
    read.model = replace(read.model, refusal=refusal.message)
    return read


def _read(model: Path | None, tokenizer: Path | None, implementation: str) -> Descriptions:
    """Read the descriptions with transformers: in this process if it has imported that library
    already, or else in a new one. Raises the error that the answer names, or ModelError."""
    if model is not None:
        # What the raw file already shows needs no process.
        check_implemented(read_json(model / CONFIG), implementation)
    elif tokenizer is None:
        return Descriptions()
    if "transformers" in sys.modules:
        from minisrv.checkpoint.by_transformers import describe as ask

        answer = ask(model, tokenizer, implementation)
    else:
        answer = _ask_process(model, tokenizer, implementation)
    if answer.error is not None:
        kind, message = answer.error
        error: type[MinisrvError] = getattr(errors, kind)
        raise error(message)
    return answer


def _ask_process(model: Path | None, tokenizer: Path | None, implementation: str) -> Descriptions:
    command = [sys.executable, "-P", "-m", "minisrv.checkpoint.by_transformers"]
    directories = [os.path.abspath(path) if path else "" for path in (model, tokenizer)]
    what = f"reading {model or tokenizer} with transformers"
    # The child looks for modules where this process does, so that both run the same versions.
    path = [os.path.abspath(entry) for entry in without_working_directory(sys.path)]
    path = path if ROOT in path else [ROOT, *path]
    try:
        # The answer goes to a file of its own, because libraries, and code that an environment runs
        # at the start of Python, may print to stdout.
        with (
            os.fdopen(os.memfd_create("minisrv-answer"), "r+b") as answer,
            os.fdopen(os.memfd_create("minisrv-printed"), "r+b") as printed,
        ):
            with subprocess.Popen(
                [*command, *directories, implementation, str(answer.fileno())],
                stdout=subprocess.DEVNULL,
                stderr=printed,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                cwd="/",  # holds no files of somebody who is not trusted, and is never removed
                pass_fds=[answer.fileno()],
            ) as process:
                try:
                    if implementation == "transformers" and "torch" in sys.modules:
                        # An engine in this process will need that code too, and can import it
                        # meanwhile.
                        from minisrv.checkpoint import transformers_decoder  # noqa: F401
                    status = process.wait(TIMEOUT)
                except BaseException:
                    process.kill()
                    raise
            answer.seek(0)
            body = answer.read()
            printed.seek(max(0, os.fstat(printed.fileno()).st_size - _LAST_WORDS))
            text = printed.read().decode(errors="replace").strip() or "nothing"
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"{what} failed: {error}") from error
    if status == -signal.SIGXCPU:
        raise ModelError(f"{what} took more than {PROCESSOR_SECONDS} s of processor time.")
    if status != 0:
        last = truncated(text.splitlines()[-1], 400)
        raise ModelError(
            f"{what} failed with status {status}; it said: {last} (It may take "
            f"{MEMORY_BYTES >> 30} GiB of memory.)"
        )
    return msgspec.msgpack.decode(body, type=Descriptions)


def _entries_directory() -> Path | None:
    """Return the directory of cached descriptions. None if there can be no cache."""
    try:
        return cache_directory("checkpoints")
    except (OSError, RuntimeError) as error:
        logger.warning("what the checkpoint says is read anew at each start: %s", error)
        return None


def _entries(
    place: Path | None, directories: Mapping[str, Path | None], model_impl: str
) -> dict[str, Path | None]:
    """Return the paths of the cached descriptions of a model and a tokenizer, each None if there is
    no directory of it or no cache.

    place: the directory of cached descriptions; None if there is no cache.
    directories: those of the checkpoint by `model` and `tokenizer`.
    Raises ModelError.
    """
    patterns = {"model": MODEL_FILES, "tokenizer": (CONFIG, *TOKENIZER_FILES)}
    entries: dict[str, Path | None] = dict.fromkeys(directories)
    for name, directory in directories.items():
        if directory is not None:
            matching_files(directory, _OTHERS)
            files = matching_files(directory, patterns[name])
            entries[name] = place and _entry(place / name, directory, files, model_impl)
    return entries


def _entry(kind: Path, directory: Path, files: Sequence[Path], model_impl: str) -> Path:
    """Return the path of a cached description. Its name is a digest of the files from which the
    description is made and of the code that makes it.

    kind: the directory of cached descriptions, and `model` or `tokenizer`.
    directory: the directory of the checkpoint.
    files: the files there on which the description depends.
    model_impl: the setting of that name; the description of a model depends on it.
    Raises ModelError if they cannot be read.
    """
    digest = hashlib.sha256(_code_digest() + model_impl.encode())
    try:
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(os.fsencode(path.relative_to(directory)) + b"\0" + content)
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error
    return kind.with_name(f"{kind.name}-{digest.hexdigest()[:32]}")


@cache
def _code_digest() -> bytes:
    """Return a digest of all that a description depends on besides the files: the source of the
    code that makes it, and the versions of the libraries."""
    # The last three modules refuse settings, and what they accept is part of a cached description.
    reader = Path(__file__).with_name("by_transformers.py")
    decoder = Path(__file__).with_name("transformers_decoder.py")  # imports torch
    # The path is spelled out, because an import of this module would import Jinja.
    template = Path(__file__).parents[1] / "text" / "chat_template.py"
    held = (schema.__file__, tokenizer_description.__file__)
    sources = (__file__, reader, decoder, *held, template, model_config.__file__, request.__file__)
    code = [Path(source).read_bytes() for source in sources]
    versions = [version(name).encode() for name in _PACKAGES]
    return hashlib.sha256(b"\0".join([*code, *versions])).digest()


def _read_entry(entry: Path | None, kind: type[_T]) -> _T | None:
    """Return the cached description in the file `entry`; None if there is none that is trusted."""
    body = None if entry is None else read_cached(entry)
    if body is None:
        return None
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError:
        return None


def _write_entry(entry: Path | None, description: ModelDescription | TokenizerDescription) -> None:
    if entry is None:
        return
    write_cached(entry, msgspec.msgpack.encode(description))
    with suppress(OSError):  # another process may have deleted the same files
        entries = sorted(entry.parent.iterdir(), key=lambda path: path.lstat().st_mtime)
        for old in entries[:-MAX_ENTRIES]:
            old.unlink(missing_ok=True)

"""A checkpoint as plain data: the model's shape, how it likes to generate, its tokenizer.

The meaning of the files is transformers' to say (`minisrv.checkpoint.by_transformers`). That
library is asked in a process of its own, because importing it takes longer than an API worker's
start. What it says is kept in the cache by the content of the files and the versions of the
libraries, so that a second start does not import it. Nothing here imports it or torch.

Knows: which files decide, the cache, and the process. Knows nothing of the files' meaning.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec

from minisrv import errors, model_config, request
from minisrv.cache import cache_directory, keep, kept
from minisrv.checkpoint.files import matching_files
from minisrv.checkpoint.location import CONFIG, GENERATION_CONFIG
from minisrv.errors import MinisrvError, ModelError, shortened
from minisrv.import_path import ROOT, without_working_directory
from minisrv.model_config import ModelConfig

logger = logging.getLogger(__name__)

TIMEOUT = 120
"""Seconds for transformers to read the small files; it takes one."""
PROCESSOR_SECONDS = 30
"""The same, of processor time. A vocabulary of 262,000 takes 3.5; one to be converted more."""
MEMORY_BYTES = 4 << 30
"""Private memory of the process that reads them. That vocabulary takes an eighth of it."""
OUTPUT_BYTES = 1 << 28
"""Of its answer, and of what it prints. That vocabulary makes a fiftieth of it."""

KEPT = 64
"""Descriptions that are kept at most, the newest."""

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
"""What a tokenizer is read from, beside config.json, which may name its class."""
_OTHERS = ("*.json", "*.txt", "*.bpe", "*.spm", "*.tiktoken")
"""What tokenizers of models that are not implemented are read from; looked at, not listed."""

_T = TypeVar("_T")
_PACKAGES = ("transformers", "tokenizers")
_LAST_WORDS = 1 << 16
"""Bytes at the end of what the process printed that are looked at."""


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generation; None or empty where it is silent.

    eos_token_ids: any of them ends a sequence: those of generation_config.json, or else of
        config.json, and the tokenizer's.
    max_tokens, min_tokens, stop: its `max_new_tokens`, `min_new_tokens` and `stop_strings`.

    `do_sample` is left out, as in vLLM: where neither says a temperature, it is OpenAI's.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelDescription:
    """What config.json and generation_config.json say.

    unused: settings of generation_config.json that would change what transformers generates, and
        that no request can ask for here.
    """

    model: ModelConfig
    generation: GenerationConfig
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerDescription:
    """What the files of a tokenizer say.

    backend: the text of a tokenizer.json that holds all of it, special tokens included.
    special_tokens: variables of the chat template, e.g. `bos_token`.
    chat_templates: their sources by name; the usual one is called `default`.
    chat_template_fault: why they cannot be used; empty if they can.
    eos_token_id: the id of its end-of-sequence token, if it has one.
    highest_id: of any token.
    splits_special_tokens: whether the spelling of a special token in a text is text like any other
        (`split_special_tokens`), which tokenizer.json does not say.
    """

    backend: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)
    chat_template_fault: str = ""
    eos_token_id: int | None = None
    highest_id: int = 0
    splits_special_tokens: bool = False


class Descriptions(msgspec.Struct):
    """What was asked for, or why it could not be had.

    error: the name of a class of `minisrv.errors`, and the message.
    """

    model: ModelDescription | None = None
    tokenizer: TokenizerDescription | None = None
    error: tuple[str, str] | None = None


def describe_model(directory: Path) -> ModelDescription:
    """What the model's files in `directory` say. Raises ModelError, ConfigError and
    UnknownArchitectureError."""
    found = describe(directory, None).model
    assert found is not None, "it was asked for"
    return found


def describe_tokenizer(directory: Path) -> TokenizerDescription:
    """What the tokenizer's files in `directory` say. Raises ModelError."""
    found = describe(None, directory).tokenizer
    assert found is not None, "it was asked for"
    return found


def describe(model: Path | None, tokenizer: Path | None) -> Descriptions:
    """What the files in two directories say, of which either may be None. What is not kept yet is
    read by one process for both.

    Raises ModelError, ConfigError and UnknownArchitectureError.
    """
    place = _kept_directory()
    asked = {
        "model": (model, MODEL_FILES),
        "tokenizer": (tokenizer, (CONFIG, *TOKENIZER_FILES)),
    }
    entries: dict[str, Path | None] = {}
    for name, (directory, patterns) in asked.items():
        entries[name] = None
        if directory is not None:
            matching_files(directory, _OTHERS)
            files = matching_files(directory, patterns)
            entries[name] = place and _entry(place / name, directory, files)
    found = Descriptions(
        model=_kept(entries["model"], ModelDescription),
        tokenizer=_kept(entries["tokenizer"], TokenizerDescription),
    )
    read = _read(
        model if found.model is None else None, tokenizer if found.tokenizer is None else None
    )
    for name, entry in entries.items():
        if (told := getattr(read, name)) is not None:
            setattr(found, name, told)
            _keep(entry, told)
    return found


def has_tokenizer(directory: Path) -> bool:
    """Whether there is any file that a tokenizer could be read from."""
    return bool(matching_files(directory, TOKENIZER_FILES))


def _read(model: Path | None, tokenizer: Path | None) -> Descriptions:
    """Ask transformers, in this process if it has imported that library anyway."""
    if model is None and tokenizer is None:
        return Descriptions()
    if "transformers" in sys.modules:
        from minisrv.checkpoint.by_transformers import describe as ask

        answer = ask(model, tokenizer)
    else:
        answer = _ask_process(model, tokenizer)
    if answer.error is not None:
        kind, message = answer.error
        error: type[MinisrvError] = getattr(errors, kind)
        raise error(message)
    return answer


def _ask_process(model: Path | None, tokenizer: Path | None) -> Descriptions:
    command = [sys.executable, "-P", "-m", "minisrv.checkpoint.by_transformers"]
    directories = [os.path.abspath(path) if path else "" for path in (model, tokenizer)]
    what = f"reading {model or tokenizer} with transformers"
    # Where this process looks for modules, so that both are of one version.
    path = [os.path.abspath(entry) for entry in without_working_directory(sys.path)]
    path = path if ROOT in path else [ROOT, *path]
    try:
        # A file of its own: libraries, and what an environment runs at its start, may print.
        with (
            os.fdopen(os.memfd_create("minisrv-answer"), "r+b") as answer,
            os.fdopen(os.memfd_create("minisrv-printed"), "r+b") as printed,
        ):
            done = subprocess.run(
                [*command, *directories, str(answer.fileno())],
                stdout=subprocess.DEVNULL,
                stderr=printed,
                timeout=TIMEOUT,
                check=False,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                cwd="/",  # where nothing of a stranger's is, and which nobody removes
                pass_fds=[answer.fileno()],
            )
            answer.seek(0)
            body = answer.read()
            printed.seek(max(0, os.fstat(printed.fileno()).st_size - _LAST_WORDS))
            said = printed.read().decode(errors="replace").strip().splitlines() or ["nothing"]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"{what} failed: {error}") from error
    if done.returncode == -signal.SIGXCPU:
        raise ModelError(f"{what} took more than {PROCESSOR_SECONDS} s of processor time.")
    if done.returncode != 0:
        last = shortened(said[-1], 400)
        raise ModelError(
            f"{what} failed with status {done.returncode}; it said: {last} (It may take "
            f"{MEMORY_BYTES >> 30} GiB of memory.)"
        )
    return msgspec.msgpack.decode(body, type=Descriptions)


def _kept_directory() -> Path | None:
    """Where descriptions are kept. None where nothing can be."""
    try:
        return cache_directory("checkpoints")
    except (OSError, RuntimeError) as error:
        logger.warning("what the checkpoint says is read anew at each start: %s", error)
        return None


def _entry(kind: Path, directory: Path, files: Sequence[Path]) -> Path:
    """The file in which a description is kept: its name says the content of the files that it is
    made from, and the code that makes it. Raises ModelError if they cannot be read."""
    digest = hashlib.sha256(_code_digest())
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
    """What a description depends on besides the files."""
    # What is refused, by the last three, is part of a description that is kept.
    reader = Path(__file__).with_name("by_transformers.py")
    template = Path(__file__).parents[1] / "text" / "chat_template.py"  # imports Jinja
    sources = (__file__, reader, template, model_config.__file__, request.__file__)
    code = [Path(source).read_bytes() for source in sources]
    versions = [version(name).encode() for name in _PACKAGES]
    return hashlib.sha256(b"\0".join([*code, *versions])).digest()


def _kept(entry: Path | None, kind: type[_T]) -> _T | None:
    """The description in `entry`; None if there is none that is trusted."""
    body = None if entry is None else kept(entry)
    if body is None:
        return None
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError:
        return None


def _keep(entry: Path | None, told: ModelDescription | TokenizerDescription) -> None:
    if entry is None:
        return
    keep(entry, msgspec.msgpack.encode(told))
    with suppress(OSError):  # or another process has dropped them already
        entries = sorted(entry.parent.iterdir(), key=lambda path: path.lstat().st_mtime)
        for old in entries[:-KEPT]:
            old.unlink(missing_ok=True)

"""Where a checkpoint lies and what its small files say.

Knows: the default model's two places, hub ids, and the names of the files in a Hugging Face
checkpoint. Only safetensors are weights; no code of a checkpoint is ever fetched or run.
Knows nothing of torch, nor what is inside a weight file: `nn.loader` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisrv.config import ModelConfig
from minisrv.errors import ConfigError, ModelError

DEFAULT_MODEL = "minisrv-default"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

HUB_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.jinja",
    "model*.safetensors",
    WEIGHTS_INDEX,
)
"""What is fetched from the hub, and nothing else."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generation; None where it is silent.

    eos_token_ids: any of them ends a sequence; empty where the checkpoint names none.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


def resolve_checkpoint(model: str | None) -> Path:
    """The directory of the checkpoint that `model` names: a directory, or a hub id, which is
    fetched into the hub's cache; None names the default model. Raises ModelError.
    """
    if model is None:
        return _with_config(_default_model())
    directory = Path(model).expanduser()
    if directory.is_dir():
        return _with_config(directory)
    if directory.exists():
        raise ModelError(f"{model} is a file; name the checkpoint's directory instead.")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r} is neither a directory nor a hub id such as 'org/name'.")
    return _with_config(_fetch(model))


def read_model_config(directory: Path) -> ModelConfig:
    """The shape of the checkpoint's model. Raises ModelError, ConfigError."""
    return ModelConfig.from_hf(_read_json(_with_config(directory) / CONFIG))


def read_generation_config(directory: Path) -> GenerationConfig:
    """From generation_config.json; the end-of-sequence ids it lacks come from config.json.
    Raises ModelError, ConfigError.
    """
    path = directory / GENERATION_CONFIG
    found = _read_json(path) if path.exists() else {}
    eos = found.get("eos_token_id")
    if eos is None:
        eos = _read_json(_with_config(directory) / CONFIG).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in ids):
        raise ConfigError(f"{directory}: eos_token_id={eos!r} must be an integer or a list of them")
    top_k = _number(path, found, "top_k")
    return GenerationConfig(
        eos_token_ids=tuple(ids),
        temperature=_number(path, found, "temperature"),
        top_p=_number(path, found, "top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=_number(path, found, "min_p"),
    )


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files that together hold the weights: those the index names, or the single
    one. Raises ModelError.
    """
    index = directory / WEIGHTS_INDEX
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index}: weight_map is missing or empty.")
        files = sorted({str(name) for name in names.values()})
    else:
        files = [WEIGHTS]
    if outside := [name for name in files if Path(name).name != name]:
        raise ModelError(f"{index} names files outside of the checkpoint: {outside[0]!r}.")
    missing = [name for name in files if not (directory / name).is_file()]
    if not missing:
        return tuple(directory / name for name in files)
    if index.exists():
        raise ModelError(f"{index} names files that are not there: {', '.join(missing[:8])}.")
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pt*") for path in directory.glob(pattern)
    )
    also = f" It has {pickled[0]}, which is never loaded: convert it first." if pickled else ""
    raise ModelError(
        f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; weights are read from "
        f"safetensors only.{also}"
    )


def _default_model() -> Path:
    """In a wheel it lies inside the package, in an editable install beside it."""
    package = Path(__file__).parent
    places = (package / "_models" / DEFAULT_MODEL, package.parent / "models" / DEFAULT_MODEL)
    for place in places:
        if place.is_dir():
            return place
    raise ModelError(
        f"the default model is not installed (looked in {places[0]} and {places[1]}); name a "
        "model: a directory or a hub id."
    )


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download  # takes 0.3 s, which a directory need not pay

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the client's errors have no base of their own
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no directory {model!r} here, and fetching it from the hub failed: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _with_config(directory: Path) -> Path:
    if not (directory / CONFIG).is_file():
        raise ModelError(f"{directory} has no {CONFIG}: it is not a Hugging Face checkpoint.")
    return directory


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return value


def _number(path: Path, config: Mapping[str, Any], key: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{path}: {key}={value!r} must be a number.")
    return float(value)

"""Loads a model from safetensors onto its device, strictly.

Every weight of the checkpoint is used once and every parameter is filled once, or the model is not
loaded. Shards are read lazily, tensor by tensor, directly into their place; tensors that the
checkpoint has in another dtype are converted on the way. Knows nothing of the model's structure:
the model names its destinations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisrv.checkpoint import weight_files
from minisrv.errors import WeightsError, truncated
from minisrv.model_config import ModelConfig
from minisrv.nn.decoder import Decoder
from minisrv.nn.registry import model_class

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Function that is called with the number of weights loaded and the number of weights to load."""

MAX_NAMES = 8
"""Maximum number of weights of each kind that an error names."""

MAX_CHARACTERS = 200
"""Maximum number of characters that an error spends on a weight and what is wrong with it."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def load_model(
    config: ModelConfig,
    directory: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Decoder:
    """Return the model of `config` in `dtype` with its weights; `Decoder.prepare` makes it ready to
    run.

    directory: the checkpoint. It is not read for load_format "dummy", which draws random weights.
    seed: the seed of random weights.
    progress: is called as weights are loaded.

    Raises WeightsError, ModelError, UnknownArchitectureError.
    """
    if load_format == "dummy":
        model = _make(config, dtype, device)
        _init_dummy_weights(model, seed)
        return model.eval()
    assert directory is not None, "only dummy weights need no checkpoint"
    files = weight_files(directory)
    _check_size(config, directory, files)
    if config.tie_word_embeddings:
        tied = _tied_weights(files)
        if len(tied) == 2 and not torch.equal(*tied.values()):
            logger.warning(
                "tie_word_embeddings is true, and %s holds an output projection that differs from "
                "the embedding; it is used, as transformers does.",
                directory,
            )
            config = replace(config, tie_word_embeddings=False)
    model = _make(config, dtype, device)
    destinations = dict(model.destinations())
    if config.tie_word_embeddings and [*tied] == [HEAD]:  # the only name that it was saved under
        destinations[HEAD] = destinations.pop(EMBEDDING)
    _load(destinations, files, progress)
    return model.eval()


def _check_size(config: ModelConfig, directory: Path, files: Sequence[Path]) -> None:
    """Raise WeightsError for a config that describes a much larger model than the files hold,
    before memory is allocated for it."""
    tensors = parameters = 0
    for path in files:
        with _opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                tensors += 1
                parameters += math.prod(shard.get_slice(name).get_shape())
    if config.num_parameters > 2 * parameters or config.num_layers > tensors:
        raise WeightsError(
            f"config.json describes a model of {config.num_layers} layers and "
            f"{config.num_parameters} parameters, and the weights in {directory} hold {parameters} "
            f"in {tensors} tensors: do they belong together, and are they complete?"
        )


def _make(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    with torch.device(device):
        return model_class(config)(config, dtype=dtype)


def _tied_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the embedding and the output projection by name, as far as the files hold them. They
    are mapped, so nothing is read before it is used."""
    found: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as shard:
            held = shard.keys()
            found |= {name: shard.get_tensor(name) for name in (EMBEDDING, HEAD) if name in held}
    return found


def _load(
    destinations: Mapping[str, Tensor], files: Sequence[Path], progress: Progress | None
) -> None:
    filled: set[str] = set()
    problems = _Problems()
    for path in files:
        with _opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                if name in filled:
                    problems.note("duplicate", f"{name} (again in {path.name})")
                elif name in destinations:
                    filled.add(name)
                    _load_tensor(name, destinations[name], shard, problems)
                    if progress is not None:
                        progress(len(filled), len(destinations))
                elif not _is_harmless(name):
                    problems.note("unexpected", name)
    for name in destinations:
        if name not in filled:
            problems.note("missing", name)
    problems.raise_if_any(files[0].parent)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises WeightsError where the file, or a tensor in it, cannot be
    read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _load_tensor(name: str, destination: Tensor, shard: Any, problems: _Problems) -> None:
    lazy = shard.get_slice(name)
    shape, dtype = tuple(lazy.get_shape()), lazy.get_dtype()
    if shape != tuple(destination.shape):
        problems.note("misshapen", f"{name} {list(shape)}, wanted {list(destination.shape)}")
    elif dtype not in _DTYPES:
        problems.note("of an unsupported dtype", f"{name} {dtype}")
    else:
        destination.copy_(shard.get_tensor(name))


def _is_harmless(name: str) -> bool:
    """Whether a weight is one of the extras that older tools write: the frequencies that RoPE
    computes, and the output projection of a model with tied embeddings (for any other model it is a
    destination and never comes here)."""
    return name == HEAD or name.endswith(".rotary_emb.inv_freq")


class _Problems:
    """The problems found in a checkpoint's weights, by kind."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def note(self, kind: str, weight: str) -> None:
        self.found.setdefault(kind, []).append(truncated(weight, MAX_CHARACTERS))

    def raise_if_any(self, directory: Path) -> None:
        if not self.found:
            return
        listed = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in self.found.items()]
        raise WeightsError(
            f"the weights in {directory} do not fit its config.json. {'. '.join(listed)}."
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _init_dummy_weights(model: Decoder, seed: int) -> None:
    """Fill the model with random weights that keep activations near unit size; they are the same
    for the same seed and dtype."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in model.destinations():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)

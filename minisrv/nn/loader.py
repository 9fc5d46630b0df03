"""Loads a model from safetensors onto its device, strictly.

Every weight of the checkpoint is used once and every parameter is filled once, or the model is not
loaded. Shards are mapped, and tensors are copied from there directly into their place (`copying`);
those that the checkpoint has in another dtype are converted on the way. Knows nothing of the
model's structure: the model names its destinations.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from minisrv.checkpoint import weight_files
from minisrv.model_config import ModelConfig
from minisrv.nn.copying import Copies
from minisrv.nn.decoder import Decoder
from minisrv.nn.model import Model
from minisrv.nn.registry import model_class
from minisrv.nn.weights import Problems, Progress, check_size, generator, opened, read_tensor

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    config: ModelConfig,
    directory: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Return the model of `config` in `dtype` with its weights; `Model.prepare` makes it ready to
    run.

    directory: the checkpoint. Its weights are not read for load_format "dummy", which draws random
        weights. transformers' code needs its config.json in any case.
    seed: the seed of random weights.
    progress: is called as weights are loaded.

    Raises WeightsError, ModelError, UnknownArchitectureError.
    """
    if config.implementation == "transformers":
        # transformers takes seconds to import.
        from minisrv.nn import transformers_loader

        assert directory is not None, "transformers' code needs its config.json"
        files = None if load_format == "dummy" else weight_files(directory)
        return transformers_loader.load(config, directory, files, dtype, device, seed, progress)
    if load_format == "dummy":
        model = _make(config, dtype, device)
        _init_dummy_weights(model, seed)
        return model.eval()
    assert directory is not None, "only dummy weights need no checkpoint"
    files = weight_files(directory)
    check_size(config, directory, files)
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


def _make(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    with torch.device(device):
        return model_class(config)(config, dtype=dtype)


def _tied_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the embedding and the output projection by name, as far as the files hold them. They
    are mapped, so nothing is read before it is used."""
    found: dict[str, Tensor] = {}
    for path in files:
        with opened(path) as shard:
            held = shard.keys()
            found |= {name: shard.get_tensor(name) for name in (EMBEDDING, HEAD) if name in held}
    return found


def _load(
    destinations: Mapping[str, Tensor], files: Sequence[Path], progress: Progress | None
) -> None:
    filled: set[str] = set()
    problems = Problems()
    copied = count(1)

    def on_copied() -> None:
        done = next(copied)
        if progress is not None:
            progress(done, len(destinations))

    device = next(iter(destinations.values())).device
    with Copies(device, on_copied) as copies:
        for path in files:
            with opened(path) as shard:
                for name in shard.keys():  # noqa: SIM118  (no mapping)
                    if name in filled:
                        problems.note("duplicate", f"{name} (again in {path.name})")
                    elif name in destinations:
                        filled.add(name)
                        destination = destinations[name]
                        tensor = read_tensor(name, shard, problems, destination.shape)
                        if tensor is not None:
                            copies.add(destination, tensor)
                    elif not _is_harmless(name):
                        problems.note("unexpected", name)
    for name in destinations:
        if name not in filled:
            problems.note("missing", name)
    problems.raise_if_any(files[0].parent)


def _is_harmless(name: str) -> bool:
    """Whether a weight is one of the extras that older tools write: the frequencies that RoPE
    computes, and the output projection of a model with tied embeddings (for any other model it is a
    destination and never comes here)."""
    return name == HEAD or name.endswith(".rotary_emb.inv_freq")


def _init_dummy_weights(model: Decoder, seed: int) -> None:
    """Fill the model with random weights that keep activations near unit size; they are the same
    for the same seed and dtype."""
    drawn_by = generator(next(model.parameters()).device, seed)
    for name, tensor in model.destinations():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=drawn_by)

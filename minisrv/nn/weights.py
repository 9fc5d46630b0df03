"""The weights of a checkpoint in safetensors files: how a file and a tensor are read, and what may
be wrong with them.

Knows: safetensors, and how the faults of a checkpoint's weights are told. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisrv.errors import WeightsError, truncated
from minisrv.model_config import ModelConfig

Progress = Callable[[int, int], None]
"""Function that is called with the number of weights loaded and the number of weights to load."""

MAX_NAMES = 8
"""Maximum number of weights of each kind that an error names."""

MAX_CHARACTERS = 200
"""Maximum number of characters that an error spends on a weight and what is wrong with it."""

_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


def generator(device: torch.device | str, seed: int) -> torch.Generator | None:
    """Return what draws random weights on a device; None for the meta device, whose tensors have no
    values."""
    device = torch.device(device)
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def check_size(config: ModelConfig, directory: Path, files: Sequence[Path]) -> None:
    """Raise WeightsError for a config that describes a much larger model than the files hold,
    before memory is allocated for it."""
    tensors = parameters = 0
    for path in files:
        with opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                tensors += 1
                parameters += math.prod(shard.get_slice(name).get_shape())
    if config.num_parameters > 2 * parameters or config.num_layers > tensors:
        raise WeightsError(
            f"config.json describes a model of {config.num_layers} layers and "
            f"{config.num_parameters} parameters, and the weights in {directory} hold {parameters} "
            f"in {tensors} tensors: do they belong together, and are they complete?"
        )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises WeightsError where the file, or a tensor in it, cannot be
    read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def read_tensor(
    name: str, shard: Any, problems: Problems, shape: Sequence[int] | None = None
) -> Tensor | None:
    """Return the tensor `name` of an opened file, which is mapped and not copied; None with a note
    in `problems` if it has another shape, or a dtype that no weight has.

    shape: the shape that it must have; None allows any.
    """
    lazy = shard.get_slice(name)
    found, dtype = list(lazy.get_shape()), lazy.get_dtype()
    if shape is not None and found != list(shape):
        problems.note("misshapen", f"{name} {found}, wanted {list(shape)}")
        return None
    if dtype not in _DTYPES:
        problems.note("of an unsupported dtype", f"{name} {dtype}")
        return None
    tensor: Tensor = shard.get_tensor(name)
    return tensor


class Problems:
    """The problems found in a checkpoint's weights, by kind."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def note(self, kind: str, weight: str) -> None:
        """Add a weight to those of a kind of problem."""
        self.found.setdefault(kind, []).append(truncated(weight, MAX_CHARACTERS))

    def raise_if_any(self, directory: Path) -> None:
        """Raise WeightsError if there are problems with the weights in `directory`."""
        if not self.found:
            return
        listed = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in self.found.items()]
        raise WeightsError(
            f"the weights in {directory} do not fit its config.json. {'. '.join(listed)}."
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")

"""Loads a model that transformers' code computes, strictly.

Every weight of the checkpoint is used once and every parameter is filled once, or the model is not
loaded. Names are mapped, tensors merged and weights tied as transformers does it for the
architecture. Shards are read lazily, and each tensor goes straight to the device in the dtype of
serving; tensors that are merged, such as experts, are mapped until all of them have been found.

Knows: how transformers maps the weights of a checkpoint to those of its model. Knows nothing of
architectures.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from minisrv.checkpoint.by_transformers import read_config
from minisrv.checkpoint.location import CONFIG
from minisrv.checkpoint.transformers_decoder import MetaDecoder, describe, make_on_meta
from minisrv.errors import ModelError
from minisrv.model_config import ModelConfig
from minisrv.nn.transformers_model import TransformersModel
from minisrv.nn.weights import Problems, Progress, check_size, generator, opened, read_tensor

logger = logging.getLogger(__name__)

_HARMLESS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Patterns of names that older tools write for tensors that are computed."""


def load(
    config: ModelConfig,
    directory: Path,
    files: Sequence[Path] | None,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    progress: Progress | None,
) -> TransformersModel:
    """Return the model of `config` in `dtype` with its weights.

    directory: the checkpoint, whose config.json transformers' code needs.
    files: the safetensors files; None draws random weights.
    seed: the seed of random weights.
    progress: is called as weights are loaded.

    Raises WeightsError, and ModelError if the files describe another model than `config`.
    """
    if files is not None:
        check_size(config, directory, files)
    hf_config = read_config(directory)
    decoder = make_on_meta(hf_config, dtype)
    found = describe(hf_config, decoder)
    context = config.max_position_embeddings  # of all that is described, what an engine may choose
    if replace(found, max_position_embeddings=context, rope=config.rope) != config:
        raise ModelError(
            f"{directory / CONFIG} describes another model than when it was read first: was it "
            "changed? Start again."
        )
    if _multiplies_groups(decoder, dtype, torch.device(device)):
        # This form reads each expert once. That in which models are made copies an expert's weights
        # for every token that it is chosen for.
        decoder.model.config._experts_implementation = "grouped_mm"
    weights = _Weights(decoder.model, device)
    if files is None:
        weights.draw(seed)
    else:
        weights.read(files, progress)
    return TransformersModel(config, decoder, dtype=dtype).eval()


def _multiplies_groups(decoder: MetaDecoder, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies the tokens of each expert by its weights as a group, in a way that a
    graph can hold: on CUDA it reads the sizes of groups back for other dtypes than bfloat16, and
    its kernels take rows of whole units of 16 bytes only."""
    if device.type != "cpu" and dtype != torch.bfloat16:
        return False
    weights = [w for call in decoder.experts for w in call.module.parameters(recurse=False)]
    # Of a weight [num_experts, a, b] both widths are those of rows: its own, the input's or the
    # output's.
    widths = [width * w.itemsize for w in weights if w.dim() == 3 for width in w.shape[1:]]
    return all(width % 16 == 0 for width in widths)


class _Weights:
    """The parameters of a model of transformers, which are on the meta device until they are
    filled."""

    def __init__(self, model: PreTrainedModel, device: torch.device | str) -> None:
        self.model = model
        self.device = device
        self.wanted: dict[str, Tensor] = model.state_dict()
        self.missing = set(self.wanted)

    def read(self, files: Sequence[Path], progress: Progress | None) -> None:
        """Fill the parameters from safetensors files. Raises WeightsError."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {p: entry for entry in converters for p in entry.source_patterns}
        merged: dict[str, WeightConverter] = {}
        problems, seen = Problems(), set[str]()
        with ExitStack() as stack:
            shards = {path.name: stack.enter_context(opened(path)) for path in files}
            held = [(name, file) for file, shard in shards.items() for name in shard.keys()]  # noqa: SIM118  (no mapping)
            for name, file in sorted(held, key=lambda entry: _natural(entry[0])):
                if name in seen:
                    problems.note("duplicate", f"{name} (again in {file})")
                    continue
                seen.add(name)
                shard = shards[file]
                target, pattern = self._renamed(name, renamings, converters)
                if target not in self.wanted:
                    if not self._is_harmless(target):
                        problems.note("unexpected", name)
                elif pattern is None:
                    self._fill(target, name, shard, problems)
                elif (tensor := read_tensor(name, shard, problems)) is not None:
                    entry = merged.setdefault(target, copy.deepcopy(by_pattern[pattern]))
                    entry.add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
                if progress is not None:
                    progress(len(self.wanted) - len(self.missing), len(self.wanted))
            for target, entry in merged.items():
                self._fill_merged(target, entry, problems)
        for name in sorted(self._untied_missing(), key=_natural):
            problems.note("missing", name)
        problems.raise_if_any(files[0].parent)
        self._tie()
        self._compute_buffers()

    def draw(self, seed: int) -> None:
        """Fill matrices with random weights that keep activations near unit size, and all else with
        what transformers begins a training with. They are the same for the same seed and dtype."""
        drawn_by = generator(self.device, seed)
        tied = self.model.all_tied_weights_keys
        for name, parameter in self.wanted.items():
            if name in tied:
                continue
            self.missing.discard(name)
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            if tensor.dim() > 1:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=drawn_by)
            self._set(name, tensor, is_filled=tensor.dim() > 1)
        self._tie()
        self._compute_buffers()

    def _renamed(
        self,
        name: str,
        renamings: Sequence[WeightRenaming],
        converters: Sequence[WeightConverter],
    ) -> tuple[str, str | None]:
        """Return the name of a checkpoint's tensor in the model, and the pattern of the converter
        that makes it, if any."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(
            name, list(renamings), list(converters), prefix, self.wanted
        )
        if target not in self.wanted and name in self.wanted:
            target, pattern = rename_source_key(name, [], [], prefix, self.wanted)
        return target, pattern

    def _fill(self, target: str, name: str, shard: Any, problems: Problems) -> None:
        if target not in self.missing:
            problems.note("duplicate", f"{name} (another name of {target})")
            return
        wanted = self.wanted[target]
        self.missing.discard(target)
        tensor = read_tensor(name, shard, problems, wanted.shape)
        if tensor is not None:
            self._set(target, _moved(tensor, wanted.dtype, self.device))

    def _fill_merged(self, target: str, entry: WeightConverter, problems: Problems) -> None:
        """Fill the parameters that a converter makes of the tensors that it has collected."""
        try:
            made = entry.convert(target, model=self.model, config=self.model.config)
        except Exception as error:  # whatever a converter raises for tensors that do not fit
            problems.note("of shapes that cannot be merged", f"{target} ({error})")
            self.missing.discard(target)
            return
        for name, value in made.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            if name not in self.missing:
                problems.note("unexpected" if name not in self.wanted else "duplicate", name)
                continue
            self.missing.discard(name)
            wanted = self.wanted[name]
            if tensor.shape != wanted.shape:
                shapes = f"{list(tensor.shape)}, wanted {list(wanted.shape)}"
                problems.note("misshapen", f"{name} {shapes}")
            else:
                self._set(name, _moved(tensor, wanted.dtype, self.device))

    def _set(self, name: str, tensor: Tensor, *, is_filled: bool = True) -> None:
        """Put a tensor into the model in the place of a parameter or buffer.

        is_filled: whether transformers is not to initialise it.
        """
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._parameters:
            tensor = nn.Parameter(tensor, requires_grad=False)
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor
        if is_filled:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]

    def _tie(self) -> None:
        """Tie weights as transformers does: those of which the checkpoint has one, and those of
        which it has two that are equal."""
        self.model.tie_weights(missing_keys=self.missing, recompute_mapping=False)

    def _untied_missing(self) -> set[str]:
        """Return the parameters that are not filled, and are tied to none that is."""
        pairs = self.model.all_tied_weights_keys.items()
        tied = {a for pair in pairs for a, b in (pair, pair[::-1]) if b not in self.missing}
        return self.missing - tied

    def _compute_buffers(self) -> None:
        """Compute the tensors that no checkpoint holds, such as rotary frequencies, and initialise
        the parameters that are not filled."""
        for name, buffer in list(self.model.named_buffers()):
            if buffer.is_meta:
                empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)
                self._set(name, empty, is_filled=False)
        self.model.initialize_weights()

    def _is_harmless(self, name: str) -> bool:
        """Whether a tensor that is not in the model is one that transformers ignores."""
        patterns: Iterable[str] = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in (*patterns, *_HARMLESS))


def _moved(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a copy of a mapped tensor on the device, contiguous."""
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in names as numbers: merged tensors are in their
    order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]

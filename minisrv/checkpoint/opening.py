"""Opens the checkpoint that the settings name: finds it, reads its small files, and checks it.

One that cannot be served is refused before its weights are fetched. Nothing here imports torch.

Knows: which settings concern the checkpoint. Knows nothing of devices or of how a model runs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from minisrv.checkpoint.description import describe, has_tokenizer
from minisrv.checkpoint.location import (
    GENERATION_CONFIG,
    fetch_weights,
    resolve_checkpoint,
    resolve_directory,
    weight_files,
)
from minisrv.checkpoint.schema import GenerationConfig
from minisrv.config import EngineConfig, read_text
from minisrv.errors import ConfigError, EngineError, ModelError
from minisrv.model_config import ModelConfig
from minisrv.text.tokenizer_description import TokenizerDescription

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """All that is known of a checkpoint before its weights are read; every process of a server
    starts from it.

    directory: the directory of the weights.
    model: the shape of the model.
    generation: the defaults for generation.
    tokenizer: the content of the tokenizer.
    """

    directory: Path
    model: ModelConfig
    generation: GenerationConfig
    tokenizer: TokenizerDescription

    def save(self, path: Path) -> None:
        """Write the checkpoint to a file for other processes of the same server."""
        path.write_bytes(msgspec.msgpack.encode(self, enc_hook=str))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that `save` has written. Raises EngineError if it was changed or removed."""
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=cls, dec_hook=_path)
        except (OSError, msgspec.MsgspecError) as error:
            raise EngineError(f"{path}, the server's own, cannot be read: {error}") from error


def open_checkpoint(config: EngineConfig, *, weights: bool = True) -> Checkpoint:
    """Return the checkpoint that `config` names.

    weights: whether the weights are needed too. If so, they are in the directory when this returns,
        and were fetched from the hub if need be; with load_format=dummy they are not needed.
    Raises ModelError, ConfigError and UnknownArchitectureError for a checkpoint that cannot be
    served, before any weights are fetched.
    """
    try:
        return _opened(config, weights)
    except OSError as error:  # any access to a file may fail: no permission, a broken disk
        raise ModelError(
            f"the checkpoint or its tokenizer cannot be read: {error}; may this user read it?"
        ) from error


def _opened(config: EngineConfig, weights: bool) -> Checkpoint:
    dummy = config.load_format == "dummy"
    directory = resolve_checkpoint(config.model, config.revision)
    place = directory
    if config.tokenizer is not None:
        place = resolve_directory(config.tokenizer)
    found = describe(directory, place if has_tokenizer(place) else None, config.model_impl)
    assert found.model is not None
    model, tokenizer = found.model.model, found.tokenizer
    if tokenizer is None and not (dummy and config.tokenizer is None):
        raise ModelError(
            f"{place} holds no tokenizer; name a directory or hub id that does with --tokenizer, "
            "or serve random weights with a stand-in by --load-format dummy."
        )
    refusal = found.model.refusal
    why = f"; minisrv's own does not compute it: {refusal}" if refusal else ""
    logger.info("%s is computed by the code of %s%s", model.architecture, model.implementation, why)
    context_length(config, model)
    if found.model.unused:
        logger.warning(
            "%s sets %s, which is not implemented: transformers may generate other texts.",
            directory / GENERATION_CONFIG,
            ", ".join(found.model.unused),
        )
    if tokenizer is None:
        logger.warning("%s holds no tokenizer; made-up words stand in for its tokens.", place)
        from minisrv.checkpoint.stand_in import stand_in_tokenizer  # imported only where needed

        tokenizer = stand_in_tokenizer(model.vocab_size)
    if config.chat_template is not None:
        templates = {"default": _read_template(config.chat_template)}
        tokenizer = replace(tokenizer, chat_templates=templates, chat_template_fault="")
    if tokenizer.chat_template_fault:
        raise ModelError(
            f"{place}: {tokenizer.chat_template_fault} Give another one with --chat-template."
        )
    if tokenizer.highest_id >= model.vocab_size:
        logger.warning(
            "the tokenizer's ids go up to %d, and the model's to %d: a prompt with a higher one is "
            "refused. Do they belong together?",
            tokenizer.highest_id,
            model.vocab_size - 1,
        )
    if weights and not dummy:
        fetch_weights(config.model, directory)
        weight_files(directory)
    generation = _with_end_token(found.model.generation, tokenizer, model)
    return Checkpoint(directory, model, generation, tokenizer)


def context_length(config: EngineConfig, model: ModelConfig) -> int:
    """Return the maximum number of tokens of a request, provided that the KV cache holds as many.
    Raises ConfigError if `max_model_len` is more than the model was made for."""
    wanted, longest = config.max_model_len or model.default_context, model.longest_context
    if wanted > longest:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {longest} tokens that the model was made for "
            f"(max_position_embeddings and RoPE scaling in its config.json); use at most {longest}."
        )
    return wanted


def _with_end_token(
    generation: GenerationConfig, tokenizer: TokenizerDescription, model: ModelConfig
) -> GenerationConfig:
    """Return `generation` with the tokenizer's end-of-sequence token among those that end a
    sequence, as in vLLM: some checkpoints name it only in the files of the tokenizer."""
    end, known = tokenizer.eos_token_id, generation.eos_token_ids
    if end is None or end in known or end >= model.vocab_size:
        return generation
    return replace(generation, eos_token_ids=(*known, end))


def _read_template(path: Path) -> str:
    from minisrv.text.chat_template import ChatTemplate  # imports Jinja, seldom needed here

    source = read_text("--chat-template", path)
    try:
        ChatTemplate({"default": source}, {})
    except ModelError as error:
        raise ConfigError(f"--chat-template {path}: {error.message}") from error
    return source


def _path(kind: type, value: object) -> object:
    assert kind is Path, "all else is msgpack's own"
    return Path(str(value))

"""Reads the small files of a checkpoint with transformers, and returns their content as plain data.

Run as a program it reads those of one model and one tokenizer, either of which may be empty, and
writes the answer to a file descriptor that it inherits:

    python -P -m minisrv.checkpoint.by_transformers MODEL_DIRECTORY TOKENIZER_DIRECTORY
        IMPLEMENTATION DESCRIPTOR

As a program it prevents an import of torch, unless the model is to be computed by transformers'
code, whose shape only that code knows: configurations and tokenizers do not need torch, and the
import would take longer than all the rest. No code of a checkpoint is ever run, and the hub is
never asked.

Knows: transformers' classes. Knows nothing of caches or of how a description is used.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from minisrv import threads

if __name__ == "__main__":
    # Imports make hundreds of thousands of objects, of which none is garbage, and this process ends
    # soon: collections would take a sixth of its time.
    gc.disable()
    threads.without_blas()
    if "transformers" not in sys.argv[1:]:
        sys.modules["torch"] = None  # type: ignore[assignment]  # every import of torch fails now
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import msgspec
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from minisrv.checkpoint import schema
from minisrv.checkpoint.files import check_names
from minisrv.checkpoint.location import CONFIG, GENERATION_CONFIG
from minisrv.checkpoint.schema import Descriptions, ModelDescription
from minisrv.errors import ConfigError, MinisrvError, ModelError, RequestError, shown, truncated
from minisrv.model_config import ModelConfig, check_implemented
from minisrv.processes import bound_resource
from minisrv.request import SamplingParams
from minisrv.text.chat_template import ChatTemplate
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tokenizer_description import TokenizerDescription

_T = TypeVar("_T")

_ASKABLE = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
"""The numbers of a generation config that a request can set too, and their names in a request."""

_NAMING_FILES = (CONFIG, "tokenizer_config.json", "special_tokens_map.json")
"""Files that name the parts of a tokenizer; transformers takes some of their settings for paths."""

_MAX_TOKEN_ID = 10_000_000
"""Largest token id of a tokenizer that is accepted. The `tokenizers` library goes through all ids
up to the highest when it writes a vocabulary."""

_MAX_REASON = 400
"""Maximum number of characters that a message repeats of an error of transformers."""

_TEXT = " ".join(["A text to try a tokenizer with: naïve, 你好, 🎉 123", "a" * 64])

_WHOLE = frozenset({"top_k", "max_new_tokens", "min_new_tokens"})

_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Other settings that change what transformers generates, with the values that change nothing."""


def describe(model: Path | None, tokenizer: Path | None, implementation: str) -> Descriptions:
    """Return the descriptions of a model and a tokenizer, or the error that reading their files
    raised.

    model, tokenizer: the directories, either of which may be None.
    implementation: whose code computes the model (`ModelConfig.implementation`).
    """
    try:
        return Descriptions(
            model=None if model is None else describe_model(model, implementation),
            tokenizer=None if tokenizer is None else describe_tokenizer(tokenizer),
        )
    except MinisrvError as error:
        return Descriptions(error=(type(error).__name__, error.message))


def read_config(directory: Path) -> PreTrainedConfig:
    """Return the configuration in `directory` as transformers resolves it. Raises ModelError."""

    def read() -> PreTrainedConfig:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        # The models of transformers do the same: settings outside of rope_parameters may change
        # those in it.
        config.standardize_rope_params()
        return config

    check_names(directory / CONFIG)
    return _by_transformers(directory / CONFIG, read)


def describe_model(directory: Path, implementation: str) -> ModelDescription:
    """Return the shape of the model in `directory`, and its defaults for generation.

    implementation: whose code computes the model (`ModelConfig.implementation`).
    Raises ModelError, ConfigError and UnknownArchitectureError.
    """
    config = read_config(directory)
    if implementation == "minisrv":
        model = ModelConfig.from_hf(config.to_dict())
    else:
        model = _shape_of_transformers_decoder(directory, config)
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        path = directory / CONFIG  # old checkpoints have these settings there
    generation_config = _by_transformers(
        path,
        lambda: GenerationConfig.from_pretrained(
            directory, config_file_name=path.name, local_files_only=True
        ).to_dict(),
    )
    eos = generation_config.get("eos_token_id")
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    return ModelDescription(
        model,
        _generation(path, generation_config, eos, model.vocab_size),
        unused=tuple(
            name
            for name, neutral in _NEUTRAL.items()
            if generation_config.get(name) is not None and generation_config[name] != neutral
        ),
    )


def _shape_of_transformers_decoder(directory: Path, config: PreTrainedConfig) -> ModelConfig:
    """Return the shape of a model that transformers' code computes. Raises ModelError, ConfigError
    and UnknownArchitectureError."""
    import torch  # only where it is needed; see the docstring of the module

    from minisrv.checkpoint import transformers_decoder

    check_implemented(config.to_dict(), "transformers")
    transformers_decoder.check_architecture(config)

    def tried() -> transformers_decoder.MetaDecoder:
        decoder = transformers_decoder.make_on_meta(config, torch.float32)
        transformers_decoder.try_as_served(decoder)
        return decoder

    decoder = _by_transformers(
        directory / CONFIG,
        tried,
        "describes a model whose code in transformers cannot be run here, without data and with "
        "attention that is replaced",
    )
    return transformers_decoder.describe(config, decoder)


def describe_tokenizer(directory: Path) -> TokenizerDescription:
    """Return the description of the tokenizer in `directory`. Raises ModelError."""
    for name in _NAMING_FILES:
        if (path := directory / name).is_file():
            check_names(path)
    tokenizer = _by_transformers(
        directory,
        lambda: AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        ),
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{directory}: {type(tokenizer).__name__} is written in Python, and minisrv needs one "
            "of the tokenizers library; convert it to a tokenizer.json."
        )
    special = set(tokenizer.all_special_tokens)
    if not any(word.strip("▁") for word in backend.get_vocab(False) if word not in special):
        # If the files of the vocabulary are missing, transformers makes a tokenizer that has
        # special tokens only.
        raise ModelError(
            f"{directory}: no vocabulary was found for {type(tokenizer).__name__}; are files such "
            "as tokenizer.json missing?"
        )
    highest = max(backend.get_vocab(True).values())
    if highest > _MAX_TOKEN_ID:
        raise ModelError(
            f"{directory}: the tokenizer has a token with the id {highest}; {_MAX_TOKEN_ID} is the "
            "most."
        )
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if not isinstance(templates, dict) or not all(map(_is_text, chain(*templates.items()))):
        raise ModelError(
            f"{directory}: chat_template must be a string or a list of named templates."
        )
    described = TokenizerDescription(
        backend=backend.to_str(),
        special_tokens={
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if _is_text(token)
        },
        chat_templates=dict(templates),
        eos_token_id=tokenizer.eos_token_id,
        highest_id=highest,
        splits_special_tokens=bool(tokenizer.split_special_tokens),
    )
    return replace(described, chat_template_fault=_try_out(described))


def _try_out(described: TokenizerDescription) -> str:
    """Use the tokenizer for a text, in this process, whose processor time and memory are bounded.

    Returns what is wrong with the chat templates, which is no error as the user may replace them;
    empty if nothing is. Raises ModelError.
    """
    tokenizer = Tokenizer.from_description(replace(described, chat_templates={}))
    with suppress(RequestError):  # raised if the tokenizer has no tokens for a text
        tokenizer.decode(tokenizer.encode(_TEXT))
    if "default" not in described.chat_templates:
        return ""
    try:
        ChatTemplate(described.chat_templates, described.special_tokens).try_out()
    except ModelError as error:
        return error.message
    return ""


def _by_transformers(
    path: Path, read: Callable[[], _T], fault: str = "cannot be read by transformers"
) -> _T:
    """Return what `read` returns, and raise ModelError for whatever transformers raises, because
    its errors have no base class of their own.

    path: the file or directory that is read, for the message.
    fault: what is wrong with it, for the message.
    """
    try:
        return read()
    except MinisrvError:
        raise
    except Exception as error:
        reason = truncated(" ".join(str(error).split()), _MAX_REASON) or type(error).__name__
        raise ModelError(f"{path} {fault}: {reason}") from error


def _generation(
    path: Path, generation_config: Mapping[str, Any], eos: Any, vocab_size: int
) -> schema.GenerationConfig:
    """Return the defaults for generation, which must be within the bounds for a request.

    path: the file that holds them, for messages.
    generation_config: the generation config of transformers.
    eos: its end-of-sequence token or tokens, or those of config.json.
    vocab_size: the size of the model's vocabulary.
    Raises ConfigError.
    """
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(
            f"{path.parent}: eos_token_id={shown(eos)} must be an integer or a list of them."
        )
    numbers: dict[str, Any] = {}
    for name, ours in _ASKABLE.items():
        value = generation_config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: {name}={shown(value)} must be a number.")
        numbers[ours] = value
        if name in _WHOLE and isinstance(value, float) and value.is_integer():
            numbers[ours] = int(value)
    stop = generation_config.get("stop_strings") or ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(map(_is_text, strings)):
        raise ConfigError(
            f"{path}: stop_strings={shown(stop)} must be strings, none of them empty."
        )
    try:
        asked = SamplingParams(**{"max_tokens": None, **numbers}, stop=tuple(strings))
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from error
    return schema.GenerationConfig(
        # A token that the model does not have cannot be sampled; some checkpoints write -1 for
        # none.
        eos_token_ids=tuple(token_id for token_id in ids if 0 <= token_id < vocab_size),
        stop=tuple(strings),
        **{ours: getattr(asked, ours) for ours in numbers},
    )


def _is_text(value: Any) -> bool:
    """Whether `value` is a non-empty string of valid Unicode; JSON can hold lone surrogates."""
    if not isinstance(value, str) or not value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def bound() -> None:
    """Let the kernel end this process if the files make it use too much processor time, memory or
    output."""
    for kind, most in (
        (resource.RLIMIT_CPU, schema.PROCESSOR_SECONDS),
        (resource.RLIMIT_DATA, schema.MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, schema.OUTPUT_BYTES),
    ):
        bound_resource(kind, most)


def main() -> None:
    """Read the files that the command line names, write the answer as msgpack, and end the
    process."""
    bound()
    *directories, implementation, descriptor = sys.argv[1:]
    model, tokenizer = (Path(argument) if argument else None for argument in directories)
    with os.fdopen(int(descriptor), "wb") as answers:
        answers.write(msgspec.msgpack.encode(describe(model, tokenizer, implementation)))
    # The interpreter would free torch and transformers object by object, which takes a second.
    os._exit(0)


if __name__ == "__main__":
    main()

"""The content of a checkpoint's small files as plain data, and the limits of the process that reads
them.

Knows: which facts a description has. Knows nothing of where they are found.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from minisrv.model_config import ModelConfig
from minisrv.text.tokenizer_description import TokenizerDescription

PROCESSOR_SECONDS = 30
"""Maximum processor time, in seconds, of the process that reads the files. A vocabulary of 262,000
tokens takes 3.5 s, and one that has to be converted takes more."""
MEMORY_BYTES = 4 << 30
"""Maximum private memory, in bytes, of that process. That vocabulary takes an
eighth of it."""
OUTPUT_BYTES = 1 << 28
"""Maximum size, in bytes, of the answer of that process, and of what it prints. The answer for that
vocabulary is a fiftieth of it."""


@dataclass(frozen=True)
class GenerationConfig:
    """The defaults for generation in a checkpoint; None or empty where it has none.

    eos_token_ids: the tokens that end a sequence: those of generation_config.json, or else of
        config.json, and that of the tokenizer.
    max_tokens, min_tokens, stop: `max_new_tokens`, `min_new_tokens` and `stop_strings` of the
        checkpoint.
    temperature, top_p, top_k, min_p, repetition_penalty: the settings of the same names.

    `do_sample` is ignored, as in vLLM: if neither the checkpoint nor a request has a temperature,
    it is OpenAI's default.
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
    """The content of config.json and generation_config.json.

    refusal: why the decoder in `nn` does not compute the model, where transformers' code does for
        that reason; else empty.
    unused: names of settings of generation_config.json that would change what transformers
        generates, and that minisrv does not implement.
    """

    model: ModelConfig
    generation: GenerationConfig
    refusal: str = ""
    unused: tuple[str, ...] = ()


class Descriptions(msgspec.Struct):
    """The descriptions that were asked for, or the error that prevented them.

    error: the name of a class in `minisrv.errors`, and the message.
    """

    model: ModelDescription | None = None
    tokenizer: TokenizerDescription | None = None
    error: tuple[str, str] | None = None

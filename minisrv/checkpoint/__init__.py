"""Checkpoints: where they lie (`location`), what they say (`description`, which `by_transformers`
reads), and whether they can be served (`opening`)."""

from minisrv.checkpoint.description import (
    GenerationConfig,
    ModelDescription,
    TokenizerDescription,
    describe_model,
    describe_tokenizer,
)
from minisrv.checkpoint.location import resolve_checkpoint, weight_files
from minisrv.checkpoint.opening import Checkpoint, context_length, open_checkpoint

__all__ = [
    "Checkpoint",
    "GenerationConfig",
    "ModelDescription",
    "TokenizerDescription",
    "context_length",
    "describe_model",
    "describe_tokenizer",
    "open_checkpoint",
    "resolve_checkpoint",
    "weight_files",
]

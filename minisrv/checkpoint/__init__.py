"""Checkpoints: `location` finds them, `description` returns the content of their small files, which
`by_transformers` reads, and `opening` checks whether they can be served."""

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

"""Checkpoints: `location` finds them, `description` returns the content of their small files, which
`by_transformers` reads, and `opening` checks whether they can be served."""

from minisrv.checkpoint.description import (
    describe_model,
    describe_tokenizer,
)
from minisrv.checkpoint.location import resolve_checkpoint, weight_files
from minisrv.checkpoint.opening import Checkpoint, context_length, open_checkpoint
from minisrv.checkpoint.schema import GenerationConfig, ModelDescription

__all__ = [
    "Checkpoint",
    "GenerationConfig",
    "ModelDescription",
    "context_length",
    "describe_model",
    "describe_tokenizer",
    "open_checkpoint",
    "resolve_checkpoint",
    "weight_files",
]

"""Small random checkpoints, one of each supported kind, as transformers writes them.

Import it as `tests.checkpoints`. Each checkpoint comes with a tokenizer (byte-level BPE, ChatML
template) and a generation config; `<|im_end|>` ends a sequence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.text.tiny_tokenizer import save_chatml

VOCAB_SIZE = 384
EOS = 2

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-mqa": {"num_key_value_heads": 1},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama-llama3": {"rope_parameters": _LLAMA3},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-odd": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 60},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3-tied": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3-biases": {"head_dim": 16, "attention_bias": True},
}
"""Every kind of checkpoint by its name, with the config fields that set it apart."""

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_model(variant: str = "qwen3", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a transformers model with float32 weights, in evaluation mode.

    All weights are random, biases and norms too, and large enough for logits to differ clearly.
    overrides: fields of the config that replace the default ones.
    """
    config_class, model_class = _CLASSES[variant.split("-")[0]]
    config = config_class(**{**_SHAPE, **VARIANTS[variant], **overrides})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    draw_weights(model, seed)
    return model


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Fill a model with random weights, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if weight.dim() == 1 else 1.5 * weight.shape[-1] ** -0.5
            weight.normal_(0.0, scale, generator=generator)
            if name.endswith("norm.weight"):
                weight.add_(1.0)


def make_checkpoint(
    directory: Path,
    variant: str = "qwen3",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint that `minisrv` can serve to `directory`, and return the directory.

    max_shard_size: maximum size of a weights file, as transformers takes it; "50KB" gives several
        shards and an index.
    """
    model = make_model(variant, seed=seed, **overrides).to(dtype)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_chatml(directory)
    return directory


def write_files(directory: Path, **files: Any) -> Path:
    """Write files of text or JSON and return the directory: `tokenizer_config__json={...}` writes
    tokenizer_config.json, and `a___b__c` the file b.c in the folder a."""
    for name, value in files.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return directory

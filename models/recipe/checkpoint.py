"""The checkpoint folder in Hugging Face's format.

Knows: the model's shape and which files a checkpoint consists of. Does not know how the weights
come about.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from recipe.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, SPECIAL_TOKENS, VOCAB_SIZE

MAX_POSITIONS = 2048
MAX_SHARD_SIZE = "14MB"

CONFIG: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def new_model() -> Qwen3ForCausalLM:
    """The model with random float32 weights."""
    config = Qwen3Config(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})
    return Qwen3ForCausalLM(config).float()


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text, im_end = (tokenizer.token_to_id(t) for t in (END_OF_TEXT, IM_END))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_POSITIONS,
            "bos_token": None,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "extra_special_tokens": list(SPECIAL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write(
        folder / "config.json",
        CONFIG | {"bos_token_id": None, "eos_token_id": im_end, "pad_token_id": end_of_text},
    )
    _write(
        folder / "generation_config.json",
        {"eos_token_id": [im_end, end_of_text], "pad_token_id": end_of_text, "do_sample": False},
    )


def write_weights(folder: Path, model: Qwen3ForCausalLM) -> None:
    """Write the weights in bfloat16, in shards; the tied output layer is left out."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_torch_state_dict(weights, folder, max_shard_size=MAX_SHARD_SIZE)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)

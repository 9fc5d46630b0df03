"""Small random checkpoints of decoders that transformers' own code computes.

Import it as `tests.architectures`. `ARCHITECTURES` names every architecture that is proved to be
served, with the settings that make its model small and use what sets it apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.checkpoints import EOS, VOCAB_SIZE, draw_weights
from tests.text.tiny_tokenizer import save_chatml

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}

WINDOW = 8
"""The sliding window of layers that have one, shorter than the prompts."""

_WINDOW = {"sliding_window": WINDOW}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 20}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 8, "n_inner": 96},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**_WINDOW, "logit_scale": 0.3},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {**_WINDOW},
    "flex_olmo": {**_EXPERTS},
    "gemma": {"head_dim": 32},
    "gemma2": {
        **_WINDOW,
        **_GEMMA,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_WINDOW, **_GEMMA, "sliding_window_pattern": 2},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt2": {"n_inner": 96},
    "gpt_bigcode": {},
    "gpt_neox": {"partial_rotary_factor": 0.25},
    "gpt_oss": {**_WINDOW, **_EXPERTS, "head_dim": 16},
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "granite": {**_GRANITE},
    "granitemoe": {**_EXPERTS, **_GRANITE},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama": {},
    "ministral": {**_WINDOW, "head_dim": 16},
    "mistral": {**_WINDOW, "head_dim": 16},
    "mixtral": {**_EXPERTS},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {**_WINDOW},
    "olmoe": {**_EXPERTS},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {**_WINDOW},
    "phimoe": {**_EXPERTS, **_WINDOW},
    "qwen2": {},
    "qwen2_moe": {
        **_EXPERTS,
        **_WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 2,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "stablelm": {"partial_rotary_factor": 0.25},
    "starcoder2": {**_WINDOW},
    "vaultgemma": {**_WINDOW, **_GEMMA},
}
"""Each architecture by its `model_type`, with the settings that set it apart."""

SINCE = {"codegen": "5.24", "gptj": "5.24"}
"""The first version of transformers whose code of an architecture can be served, where that is not
the oldest one that minisrv takes."""

INSTALLED = [
    name
    for name in ARCHITECTURES
    if Version(transformers.__version__) >= Version(SINCE.get(name, "5"))
]
"""The architectures that the installed version of transformers has code for that can be served."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "BloomForCausalLM.* 0 of its 4 layers"),
    "deepseek_v3": (
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
        "DeepseekV3ForCausalLM has keys of 16 and values of 12",
    ),
    "diffllama": ({}, "DiffLlamaForCausalLM.* 8 of its 4 layers"),
    "doge": ({}, "DogeForCausalLM has a mask that is not implemented"),
    "falcon": ({}, "attention that is replaced"),
    "jetmoe": ({**_EXPERTS, "kv_channels": 16}, "without data"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "recurrent layers or convolutions"),
    "mamba": ({}, "MambaForCausalLM.* recurrent layers or convolutions"),
    "mistral": ({"head_dim": 16, "num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    "qwen3_next": ({**_EXPERTS}, "Qwen3NextForCausalLM.* recurrent layers"),
}
"""Architectures, by their `model_type`, of which a model is refused: the settings, and what is
said."""


def make_transformers_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a model of an architecture with random float32 weights, in evaluation mode.

    overrides: settings that replace the default ones.
    """
    settings = {**_SHAPE, **ARCHITECTURES.get(name, {}), **overrides}
    config = AutoConfig.for_model(name, **settings)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    draw_weights(model, seed)
    return model


def make_transformers_checkpoint(
    directory: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of an architecture to `directory`, and return the directory.

    max_shard_size: maximum size of a weights file, as transformers takes it.
    """
    model = make_transformers_model(name, **overrides).to(dtype)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_chatml(directory)
    return directory

"""ModelConfig reads the configurations that transformers writes, defaults included."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from minisrv.checkpoint import describe_model
from minisrv.errors import UnknownArchitectureError
from minisrv.model_config import ModelConfig
from minisrv.nn.registry import model_class
from tests.checkpoints import VARIANTS, make_checkpoint

CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves(variant: str, tmp_path: Path) -> None:
    config = describe_model(make_checkpoint(tmp_path, variant)).model
    theirs: Any = CLASSES[variant.split("-")[0]].from_pretrained(tmp_path)
    assert config.num_layers == theirs.num_hidden_layers
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", config.hidden_size // config.num_heads)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.dtype == "float32"


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_sparse_config_leaves_out(kind: str) -> None:
    """A missing field gets the default of its own architecture: a Qwen3 head has 128 elements
    unless the configuration says otherwise."""
    fields = {
        "vocab_size": 10,
        "hidden_size": 48,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    theirs: Any = CLASSES[kind](**fields)
    named = {**fields, "architectures": [f"{kind.title()}ForCausalLM"]}
    config = ModelConfig.from_hf(CLASSES[kind](**named).to_dict())
    assert config.head_dim == getattr(theirs, "head_dim", 12)
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.qkv_bias == (kind == "qwen2")
    assert not config.output_bias
    biased = CLASSES[kind](**named, attention_bias=True, mlp_bias=True)
    config = ModelConfig.from_hf(biased.to_dict())
    assert config.qkv_bias
    assert config.output_bias == (kind != "qwen2")
    assert config.mlp_bias == (kind == "llama")
    assert config.qk_norm == (kind == "qwen3")


def test_unknown_architectures_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    config = describe_model(make_checkpoint(tmp_path)).model
    other = dataclasses.replace(config, architecture="MambaForCausalLM")
    with pytest.raises(UnknownArchitectureError, match=r"Mamba.*Llama.*Qwen2.*Qwen3"):
        model_class(other)
    with pytest.raises(UnknownArchitectureError, match=r"Mamba.*Llama.*Qwen2.*Qwen3"):
        ModelConfig.from_hf({"architectures": ["MambaForCausalLM"]})

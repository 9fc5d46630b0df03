"""Rotary frequencies equal transformers', from old and new spellings of the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minisrv.config import ModelConfig, RopeConfig, RopeScaling
from minisrv.errors import ConfigError
from minisrv.nn.rope import cos_sin_table, inverse_frequencies

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 128,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SPELLINGS = {
    "silent": {},
    "old-default": {"rope_theta": 5e5, "rope_scaling": None},
    "new-default": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "old-linear": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "new-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5}},
    "old-llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "new-llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_equal_transformers(spelling: str) -> None:
    fields: dict[str, Any] = {**SHAPE, **SPELLINGS[spelling]}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**fields))
    ours = ModelConfig.from_hf(fields)
    found = inverse_frequencies(ours.rope, ours.head_dim)
    torch.testing.assert_close(found, theirs.inv_freq, rtol=1e-6, atol=0)


def test_old_and_new_spellings_mean_the_same() -> None:
    for kind in ("default", "linear", "llama3"):
        old, new = (
            ModelConfig.from_hf({**SHAPE, **SPELLINGS[f"{a}-{kind}"]}) for a in ("old", "new")
        )
        assert old == new
        assert old.rope.scaling == RopeScaling(kind)


def test_table_holds_cosines_then_signed_sines() -> None:
    """At a position where float32 angles are already coarse, equal to transformers' rounding."""
    rope, dim = RopeConfig(theta=1e4), 64
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))
    cos, sin = theirs(torch.zeros((), dtype=torch.bfloat16), torch.tensor([[0, 1, 4095]]))
    table = cos_sin_table(rope, dim, 4096, torch.bfloat16)[[0, 1, 4095]]
    found = table.unflatten(1, (2, 2, 32))
    assert torch.equal(found[:, 0], cos[0].unflatten(1, (2, 32)))
    assert torch.equal(found[:, 1, 1], sin[0, :, :32])
    assert torch.equal(found[:, 1, 0], -sin[0, :, :32])


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"yarn.*default, linear, llama3"):
        ModelConfig.from_hf({**SHAPE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})

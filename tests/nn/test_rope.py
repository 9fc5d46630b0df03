"""Rotary frequencies equal those of transformers, from old and new spellings of the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minisrv.errors import ConfigError
from minisrv.model_config import ModelConfig, RopeConfig, RopeScaling
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
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
SPELLINGS: dict[str, dict[str, Any]] = {
    "silent": {},
    "old-default": {"rope_theta": 5e5, "rope_scaling": None},
    "new-default": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "old-linear": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "new-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5}},
    "old-llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "new-llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "old-yarn": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "new-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    "yarn-without-factor": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 1024,
        }
    },
    "yarn-in-full": {
        "rope_scaling": {
            "rope_type": "yarn",
            **YARN,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
            "attention_factor": 1.3,
        }
    },
    "yarn-mscale": {
        "rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.1}
    },
    "yarn-narrow": {
        "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 1e9, "beta_slow": 1e8}
    },
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "scaling-wins": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5},
        "rope_scaling": {"rope_type": "yarn", "rope_theta": 2e4, **YARN},
    },
}


def resolved(fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf(LlamaConfig(**fields).to_dict())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_frequencies_equal_transformers(spelling: str) -> None:
    fields: dict[str, Any] = {**SHAPE, **SPELLINGS[spelling]}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**fields))
    ours = resolved(fields)
    found = inverse_frequencies(ours.rope, ours.head_dim)
    torch.testing.assert_close(found, theirs.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope.attention_factor == pytest.approx(theirs.attention_scaling)


def test_old_and_new_spellings_mean_the_same() -> None:
    for kind in ("default", "linear", "llama3", "yarn"):
        old, new = (resolved({**SHAPE, **SPELLINGS[f"{a}-{kind}"]}) for a in ("old", "new"))
        assert old == new
        assert old.rope.scaling == RopeScaling(kind)


def test_table_holds_cosines_then_signed_sines() -> None:
    """The table's layout is checked and its values equal those of transformers as rounded, also at
    a position where float32 angles are already coarse."""
    rope, dim = RopeConfig(theta=1e4), 64
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))
    cos, sin = theirs(torch.zeros((), dtype=torch.bfloat16), torch.tensor([[0, 1, 4095]]))
    table = cos_sin_table(rope, dim, 4096, torch.bfloat16)[[0, 1, 4095]]
    found = table.unflatten(1, (2, 2, 32))
    assert torch.equal(found[:, 0], cos[0].unflatten(1, (2, 32)))
    assert torch.equal(found[:, 1, 1], sin[0, :, :32])
    assert torch.equal(found[:, 1, 0], -sin[0, :, :32])


def test_dynamic_scaling_is_for_the_context_that_is_served() -> None:
    """Contexts up to the trained one have the plain frequencies; longer ones have those that
    transformers computes for that length."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    config = LlamaConfig(**SHAPE, rope_scaling=scaling)
    ours, theirs = resolved({**SHAPE, "rope_scaling": scaling}), LlamaRotaryEmbedding(config)
    assert (ours.default_context, ours.longest_context) == (4096, 4 * 4096)
    for context in (1000, 4096, 4097, 10_000, 4 * 4096):
        theirs(torch.zeros(()), torch.tensor([[0, context - 1]]))
        served = ours.for_context(context)
        found = inverse_frequencies(served.rope, served.head_dim)
        torch.testing.assert_close(found, theirs.inv_freq, rtol=1e-6, atol=0)


def test_yarn_reaches_its_factor_times_the_trained_context() -> None:
    """The context of YaRN is its factor times the trained one: checkpoints often leave
    max_position_embeddings unchanged."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = resolved({**SHAPE, "rope_scaling": scaling})
    assert config.default_context == config.longest_context == 4 * 4096
    assert config.for_context(9000).max_position_embeddings == 9000


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "longrope.*default, linear, dynamic, llama3"),
        ({"rope_type": "linear", "factor": None}, "factor=None must be a positive number"),
        ({"rope_type": "linear", "factor": 0}, "factor=0 must be a positive number"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor=None must be"),
        ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}, "must be below"),
        ({"rope_type": "yarn", "factor": "4"}, "factor='4' must be a positive number"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}, "do not go with"),
    ],
)
def test_what_cannot_be_computed_is_refused(scaling: dict[str, Any], said: str) -> None:
    """Settings that cannot be computed, explicit nulls among them, are refused with a ConfigError
    and not a TypeError."""
    config = LlamaConfig(**SHAPE).to_dict() | {"rope_parameters": {"rope_theta": 1e4, **scaling}}
    with pytest.raises(ConfigError, match=said):
        ModelConfig.from_hf(config)

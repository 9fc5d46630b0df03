"""Small checkpoints as people edit them: their configurations, weights and generation settings mean
what transformers makes of them, or are refused by name.

The expected result is always what transformers computes from the same directory. Tokenizers and
templates are tested in `text/test_tokenizer_grid`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minisrv.checkpoint import describe_model
from minisrv.errors import ConfigError, MinisrvError, UnsupportedSettingError
from minisrv.nn.loader import EMBEDDING, HEAD, load_model
from tests.checkpoints import make_model, write_files
from tests.nn.driver import Driver

Json = dict[str, Any]
ABSENT = object()
TOKENS = list(range(1, 31))
SHAPE: Json = {
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a temporary cache, so that what is kept of a checkpoint goes with the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Provide a checkpoint of each family, whose weights fit all configurations of the same
    shape."""
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, directory in made.items():
        more = {"head_dim": 16} if family == "qwen3" else {}
        make_model(family, **SHAPE, **more).save_pretrained(directory)
        (directory / "generation_config.json").unlink()
    return made


def edited(base: Path, directory: Path, change: Json) -> Path:
    """Write the checkpoint `base` with other settings in its config.json to `directory`, and return
    it."""
    config = {**json.loads((base / "config.json").read_text()), **change}
    told = {name: value for name, value in config.items() if value is not ABSENT}
    (directory / "model.safetensors").symlink_to(base / "model.safetensors")
    return write_files(directory, config__json=told)


def refill(directory: Path) -> None:
    """Replace the weights by random ones that fit the config as transformers reads it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(tensor.shape).normal_(0.0, 0.3, generator=generator)
        for name, tensor in model.named_parameters()
    }
    path = directory / "model.safetensors"
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def theirs(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def ours(directory: Path) -> Tensor:
    config = describe_model(directory).model
    config = config.for_context(config.default_context)
    model = load_model(config, directory, dtype=torch.float32)
    model.prepare()
    return Driver(model, rows=1, max_len=32).step([(0, TOKENS)])


def assert_same_logits(directory: Path) -> None:
    torch.testing.assert_close(ours(directory), theirs(directory), atol=1e-4, rtol=1e-4)


# ---- config.json ---------------------------------------------------------------------------------

YARN: Json = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3: Json = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR: Json = {"rope_type": "linear", "factor": 2.0}
BARE_YARN: Json = {"rope_type": "yarn", "factor": 4.0}


def scaled(**more: Any) -> Json:
    """Return settings as they were spelled before transformers 5; where a config has today's too,
    these win."""
    return {"rope_scaling": {**YARN, **more}}


MEANT: dict[str, Json] = {
    "nothing of RoPE": {"rope_parameters": ABSENT},
    "nulls": {"rope_parameters": None, "rope_scaling": None, "rope_theta": 777.0},
    "empty": {"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 777},
    "theta inside beats theta outside": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rope_theta": 5e3,
    },
    "theta outside fills in": {"rope_parameters": LINEAR, "rope_theta": 5e3},
    "theta within the scaling": {"rope_scaling": {**YARN, "rope_theta": 300.0}, "rope_theta": 9.0},
    "type": {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
    "type and rope_type": {"rope_scaling": {**LINEAR, "type": "dynamic"}},
    "no type": {"rope_scaling": {"factor": 2.0}},
    "linear below one": {"rope_scaling": {**LINEAR, "factor": 0.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "dynamic below one": {"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3 of a fraction": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16.7},
    },
    "llama3, original outside": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16},
        "original_max_position_embeddings": 48,
    },
    "yarn": scaled(),
    "yarn, original outside": {
        "rope_scaling": BARE_YARN,
        "original_max_position_embeddings": 24,
    },
    "yarn without original": {"rope_scaling": BARE_YARN},
    "yarn, original beyond": scaled(original_max_position_embeddings=512),
    "yarn, null factor": scaled(factor=None),
    "yarn below one": scaled(factor=0.5),
    "yarn, nulls": scaled(attention_factor=None, beta_fast=None, beta_slow=None, truncate=None),
    "yarn, attention_factor": scaled(attention_factor=2),
    "yarn, betas": scaled(beta_fast=4, beta_slow=0.5, truncate=False),
    "yarn, betas swapped": scaled(beta_fast=1, beta_slow=32),
    "yarn, mscale": scaled(mscale=0.7, mscale_all_dim=1.1),
    "yarn, mscale alone": scaled(mscale=0.7, mscale_all_dim=0),
    "yarn, theta below one": scaled(rope_theta=0.5),
    "partial of one": {"partial_rotary_factor": 1},
    "unknown settings": {"rope_scaling": {**YARN, "finetuned": True}, "scale_emb": 12},
    "dtype twice": {"dtype": "float32", "torch_dtype": "bfloat16"},
    "dtype of old": {"dtype": ABSENT, "torch_dtype": "float16"},
    "no dtype": {"dtype": None},
    "no activation": {"hidden_act": ABSENT},
    "swish": {"hidden_act": "swish"},
    "other epsilon": {"rms_norm_eps": 0.1},
    "no epsilon": {"rms_norm_eps": ABSENT},
    "one architecture": {"architectures": "LlamaForCausalLM"},
    "window unused": {"use_sliding_window": False, "sliding_window": 8},
    "window of no layer": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "window of null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "layer types": {"layer_types": ["full_attention"], "use_sliding_window": True},
    "causal": {"is_causal": True, "use_cache": False, "pretraining_tp": 2},
    "code of its own": {"auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}},
}
RESHAPED: dict[str, Json] = {
    "no key heads": {"num_key_value_heads": None},
    "one key head": {"num_key_value_heads": 1},
    "other head_dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "silent about tying": {"tie_word_embeddings": ABSENT},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "other vocabulary": {"vocab_size": 80},
}
REFUSED: dict[str, tuple[Json, str]] = {
    "activation": ({"hidden_act": "x"}, "hidden_act='x'.*silu is.*transformers' code"),
    "kind of RoPE": ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_type='su'"),
    "no kind of RoPE": ({"rope_scaling": {"rope_type": None}}, "rope_type=None"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "null factor": ({"rope_scaling": {**LINEAR, "factor": None}}, "factor=None"),
    "null original": (scaled(original_max_position_embeddings=None), "transformers"),
    "endless theta": ({"rope_theta": float("inf"), "rope_parameters": {}}, "rope_theta=inf"),
    "words for mscale": (scaled(mscale="x", mscale_all_dim="y"), "mscale='x'"),
    "theta of one": (scaled(rope_theta=1.0), "rope_theta=1.0"),
    "two ways of RoPE": (
        {
            "rope_parameters": {"full_attention": YARN, "rope_type": "default"},
            "layer_types": ["full_attention"],
        },
        r"RoPE settings for \['full_attention'\] do not go",
    ),
    "null for a kind": (
        {"rope_parameters": {"full_attention": None}, "layer_types": ["full_attention"]},
        r"RoPE settings for \['full_attention'\] do not go",
    ),
    "no causal mask": ({"is_causal": False}, "is_causal=False"),
    "layers apart": ({"per_layer_config": {"0": {"intermediate_size": 16}}}, "per_layer_config"),
    "other weights": ({"transformers_weights": "x.safetensors"}, "transformers_weights='x"),
    "odd heads": ({"head_dim": 7}, "even"),
    "no heads": ({"head_dim": 0}, "head_dim=0"),
    "negative heads": ({"num_key_value_heads": -2}, "num_key_value_heads=-2"),
    "endless layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
}


BY_TRANSFORMERS: dict[str, tuple[Json, str]] = {
    "windows": (
        {"layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 8},
        "'sliding_attention'",
    ),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "longrope": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "head_dim": 8,
        },
        "rope_type='longrope'",
    ),
}
"""Settings that the decoder in `nn` does not compute, and what is said of them."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", BY_TRANSFORMERS)
def test_config_that_transformers_code_computes(
    change: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    told, said = BY_TRANSFORMERS[change]
    refill(edited(bases[family], tmp_path, told))
    found = describe_model(tmp_path)
    assert found.model.implementation == "transformers"
    assert said in found.refusal
    assert_same_logits(tmp_path)
    with pytest.raises(UnsupportedSettingError, match=f"{said}.*--model-impl transformers"):
        describe_model(tmp_path, "minisrv")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", MEANT)
def test_config(change: str, family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    told = MEANT[change]
    if "architectures" in told:
        told = {"architectures": f"{family.title()}ForCausalLM"}
    assert_same_logits(edited(bases[family], tmp_path, told))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", RESHAPED)
def test_config_of_other_shapes(
    change: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    refill(edited(bases[family], tmp_path, RESHAPED[change]))
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", REFUSED)
def test_config_that_is_refused(
    change: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    told, said = REFUSED[change]
    with pytest.raises(MinisrvError, match=said):
        describe_model(edited(bases[family], tmp_path, told))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_settings_by_kind_of_layer(
    family: str, key: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Transformers understands such settings, and then fails to make a model of these families.
    Here they mean what the same settings mean for all layers."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    nested = {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}
    found = ours(edited(bases[family], tmp_path / "a", {key: nested}))
    torch.testing.assert_close(found, theirs(edited(bases[family], tmp_path / "b", {key: YARN})))


# ---- weights -------------------------------------------------------------------------------------


def in_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors to two files and an index."""
    names = sorted(tensors)
    weight_map = {name: f"{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in ("0.safetensors", "1.safetensors"):
        held = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    write_files(
        directory, model__safetensors__index__json={"metadata": {}, "weight_map": weight_map}
    )


def in_one(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def beside_a_stale_index(directory: Path, tensors: dict[str, Tensor]) -> None:
    in_shards(directory, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    (directory / "1.safetensors").unlink()
    in_one(directory, tensors)


Tensors = dict[str, Tensor]
WHOLE = "model.safetensors"
SAVED: dict[str, tuple[bool, Callable[[Tensors], Tensors], Callable[[Path, Tensors], None]]] = {
    "shards": (False, dict, in_shards),
    "a stale index": (False, dict, beside_a_stale_index),
    "tied, both equal": (True, lambda w: {**w, HEAD: w[EMBEDDING].clone()}, in_one),
    "tied, both different": (True, dict, in_one),
    "tied, both different in shards": (True, dict, in_shards),
    "tied, the embedding": (True, lambda w: {n: w[n] for n in w if n != HEAD}, in_one),
    "tied, the head": (True, lambda w: {n: w[n] for n in w if n != EMBEDDING}, in_one),
    "tied, the head in another dtype": (
        True,
        lambda w: {**w, EMBEDDING: w[EMBEDDING].bfloat16(), HEAD: w[EMBEDDING].bfloat16().float()},
        in_one,
    ),
    "untied, both equal": (False, lambda w: {**w, HEAD: w[EMBEDDING].clone()}, in_one),
    "inverse frequencies": (
        False,
        lambda w: {
            **w,
            "model.rotary_emb.inv_freq": torch.ones(4),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
        in_one,
    ),
    "bfloat16": (False, lambda w: {n: w[n].bfloat16() for n in w}, in_one),
    "float16": (False, lambda w: {n: w[n].half() for n in w}, in_one),
    "float64 and float32": (False, lambda w: {**w, EMBEDDING: w[EMBEDDING].double()}, in_one),
}


@pytest.mark.parametrize("saved", SAVED)
def test_weights(saved: str, bases: dict[str, Path], tmp_path: Path) -> None:
    tied, change, save = SAVED[saved]
    tensors = load_file(edited(bases["llama"], tmp_path, {"tie_word_embeddings": tied}) / WHOLE)
    (tmp_path / WHOLE).unlink()
    save(tmp_path, change(tensors))
    assert_same_logits(tmp_path)


# ---- generation ----------------------------------------------------------------------------------

GENERATION: dict[str, Json] = {
    "temperature": {"temperature": 0.5},
    "integers": {"temperature": 1, "top_p": 1, "repetition_penalty": 2},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 7},
    "top_k of a float": {"top_k": 7.0},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "max_new_tokens": {"max_new_tokens": 9},
    "min_new_tokens": {"min_new_tokens": 30},
    "stop_strings": {"stop_strings": ["a", "b"]},
    "one stop string": {"stop_strings": "a"},
    "eos": {"eos_token_id": 3},
    "several": {"eos_token_id": [3, 4]},
    "nulls": {"eos_token_id": None, "temperature": None, "top_k": None, "stop_strings": None},
    "not sampled": {"do_sample": False, "temperature": 0.6},
    "nothing": {},
}
NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"}


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("said", GENERATION)
def test_generation(said: str, where: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Each setting is that of the model that transformers loads, which takes those of config.json
    where there is no generation_config.json."""
    told = GENERATION[said]
    if where == "config.json":
        edited(bases["llama"], tmp_path, told)
    else:
        edited(bases["llama"], tmp_path, {"eos_token_id": 5})
        write_files(tmp_path, generation_config__json=told)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    found = describe_model(tmp_path).generation
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", *NAMES):
        value = getattr(expected, name)
        if name == "stop_strings":
            value = (value,) if isinstance(value, str) else tuple(value or ())
        assert getattr(found, NAMES.get(name, name)) == value, name
    # Where generation_config.json names no end token, config.json's counts.
    end = expected.eos_token_id
    if end is None and where == "generation_config.json":
        end = 5
    assert found.eos_token_ids == tuple(end if isinstance(end, list) else [end] if end else [])


def test_an_end_token_that_cannot_come_is_dropped(bases: dict[str, Path], tmp_path: Path) -> None:
    """Some checkpoints write -1 for none, and an id outside of the vocabulary would be no column of
    the logits."""
    edited(bases["llama"], tmp_path, {"eos_token_id": [-1, 63, 64, 10**30]})
    assert describe_model(tmp_path).generation.eos_token_ids == (63,)


@pytest.mark.parametrize(
    "told",
    [{"temperature": 3.0}, {"top_p": 0.0}, {"top_k": 1e400}, {"max_new_tokens": 10**30}],
)
def test_generation_that_no_request_could_ask_for_is_refused(
    told: Json, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Such settings are refused at the start, and not at each request."""
    write_files(edited(bases["llama"], tmp_path, {}), generation_config__json=told)
    name = next(iter(told)).replace("new_", "")
    with pytest.raises(ConfigError, match=name):
        describe_model(tmp_path)

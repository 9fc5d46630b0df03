"""Decoders that transformers' own code computes: logits equal those of transformers with its own
attention, and what is not computed is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from minisrv.checkpoint import describe_model
from minisrv.errors import ConfigError, ModelError, UnknownArchitectureError, WeightsError
from minisrv.nn.loader import load_model
from minisrv.nn.model import Model
from minisrv.nn.transformers_model import TransformersModel
from tests.architectures import (
    ARCHITECTURES,
    INSTALLED,
    REFUSED,
    WINDOW,
    make_transformers_checkpoint,
)
from tests.checkpoints import VARIANTS, make_checkpoint, write_files
from tests.nn.driver import Driver
from tests.nn.test_logits import TOLERANCE, prompt, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    quantization: str | None = None,
) -> Model:
    config = describe_model(directory, "transformers").model
    model = load_model(config, directory, dtype=dtype, device=device)
    assert isinstance(model, TransformersModel)
    model.prepare(quantization=quantization)
    return model


def assert_logits_are_transformers(directory: Path, model: Model) -> None:
    """The steps hold prompts longer than a block and a window, chunks beside decodes, one-token
    prompts, and padding."""
    driver = Driver(model)
    tokens = [prompt(length, seed) for seed, length in enumerate((40, 12))]
    a, b = tokens
    driver.step([(0, a[:17]), (1, b[:1])])
    driver.step([(1, b[1:2]), (0, a[17:30])], pad_tokens=3)
    for i in range(10):
        driver.step([(0, a[30 + i : 31 + i]), (1, b[2 + i : 3 + i])], pad_rows=i % 2)
    for index, row in enumerate(tokens):
        torch.testing.assert_close(driver.logits(index), reference(directory, row), **TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", INSTALLED)
def test_logits_of_every_architecture(name: str, device: str, tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, name)
    assert_logits_are_transformers(directory, load(directory, device=device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_what_minisrv_has_code_for(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, variant)
    assert_logits_are_transformers(directory, load(directory))


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        (
            "llama",
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_scaled_rotation(name: str, rope: dict[str, Any], tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, name, rope_parameters=rope)
    assert_logits_are_transformers(directory, load(directory))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 36,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LENGTHS = (20, 36, 37, 60)


def lengths_as_transformers(directory: Path, context: int) -> list[int]:
    """Return those of `LENGTHS` up to `context` at which a text's logits are those of transformers,
    from an engine that serves that context."""
    config = describe_model(directory, "transformers").model.for_context(context)
    model = load_model(config, directory, dtype=torch.float32)
    model.prepare()
    found = []
    for length in LENGTHS:
        driver, tokens = Driver(model), prompt(length, 3)
        driver.step([(0, tokens)])
        if length <= context and torch.allclose(
            driver.logits(0), reference(directory, tokens), **TOLERANCE
        ):
            found.append(length)
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 36}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {**LONGROPE, "factor": 8.0}}}),
    ],
)
def test_longrope_scales_for_the_context_that_is_served(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """All texts get the frequencies that transformers uses for a text as long as the context: where
    that is longer than the original one, texts that are not have other logits than there."""
    if name == "gemma3_text":
        settings["rope_parameters"]["sliding_attention"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
        }
        settings["head_dim"] = 16
    directory = make_transformers_checkpoint(tmp_path, name, **settings)
    assert lengths_as_transformers(directory, 36) == [20, 36]
    assert lengths_as_transformers(directory, 64) == [37, 60]


def test_dynamic_rotation_scales_for_the_context_that_is_served(tmp_path: Path) -> None:
    """That is so whoever's code computes the model. Only texts as long as the context have the
    logits of transformers, unless the context is not longer than max_position_embeddings."""
    directory = make_checkpoint(
        tmp_path, "llama", rope_parameters=DYNAMIC, max_position_embeddings=36
    )
    assert lengths_as_transformers(directory, 36) == [20, 36]
    assert lengths_as_transformers(directory, 60) == [60]
    found = []
    for implementation in ("minisrv", "transformers"):
        config = describe_model(directory, implementation).model.for_context(100)
        model = load_model(config, directory, dtype=torch.float32)
        model.prepare()
        driver = Driver(model)
        driver.step([(0, prompt(50, 3))])
        found.append(driver.logits(0))
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize(
    "rope",
    [DYNAMIC, {**DYNAMIC, "rope_type": "yarn", "original_max_position_embeddings": 256}],
    ids=["dynamic", "yarn"],
)
def test_contexts_are_as_long_by_both_implementations(rope: dict[str, Any], tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", rope_parameters=rope)
    ours, theirs = (describe_model(directory, name).model for name in ("minisrv", "transformers"))
    assert theirs.default_context == ours.default_context
    assert theirs.longest_context == ours.longest_context > 512


def test_what_a_layer_asks_of_attention(tmp_path: Path) -> None:
    model = load(make_transformers_checkpoint(tmp_path, "gemma2"))
    Driver(model)
    layers = model.attention_layers
    assert [layer.sliding_window for layer in layers] == [WINDOW, None, WINDOW, None]
    assert {layer.logit_soft_cap for layer in layers} == {3.0}
    assert {layer.scale for layer in layers} == {20**-0.5}
    assert {layer.cos_sin for layer in layers} == {None}


@pytest.mark.parametrize("context", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_windows_that_hold_the_whole_context_are_none(context: int, tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, "gemma2")
    config = describe_model(directory).model.for_context(context)
    model = load_model(config, directory, dtype=torch.float32)
    model.prepare()
    driver, tokens = Driver(model), prompt(context, 3)
    windows = [WINDOW if context > WINDOW else None, None]
    assert [layer.sliding_window for layer in model.attention_layers] == 2 * windows
    driver.step([(0, tokens[:5])])
    driver.step([(0, tokens[5:])])
    torch.testing.assert_close(driver.logits(0), reference(directory, tokens), **TOLERANCE)


@pytest.mark.parametrize("window", [0, -1])
@pytest.mark.parametrize(
    "name", ["cohere2", "gemma2", "gpt_oss", "mistral", "phi3", "qwen2", "qwen3_moe"]
)
def test_windows_without_a_token_are_refused(name: str, window: int, tmp_path: Path) -> None:
    """transformers masks every token then, so that a window of 0 does not mean none."""
    settings = {**ARCHITECTURES[name], "sliding_window": window, "use_sliding_window": True}
    settings |= {"max_window_layers": 0, "num_hidden_layers": 4}
    config = AutoConfig.for_model(name, **settings).to_dict()
    write_files(tmp_path, config__json=config | {"architectures": [_decoder_of(name)]})
    with pytest.raises(ConfigError, match=f"sliding window of {window} tokens.*sliding_window in"):
        describe_model(tmp_path)


@pytest.mark.parametrize("model_impl", ["auto", "minisrv", "transformers"])
def test_heads_that_are_too_large_are_refused(model_impl: str, tmp_path: Path) -> None:
    shape = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 2)
    for head_dim in (256, 258, 512):
        config = AutoConfig.for_model("qwen3", **shape, head_dim=head_dim).to_dict()
        write_files(tmp_path, config__json=config | {"architectures": ["Qwen3ForCausalLM"]})
        if head_dim == 256:
            assert describe_model(tmp_path, model_impl).model.head_dim == head_dim
            continue
        with pytest.raises(ConfigError, match=f"head_dim={head_dim} .*; 256 is the most"):
            describe_model(tmp_path, model_impl)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    overrides, said = REFUSED[name]
    settings = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, **overrides}
    config = AutoConfig.for_model(name, **settings).to_dict()
    architectures = {"mistral": "MistralForCausalLM"}
    config["architectures"] = [architectures.get(name) or _decoder_of(name)]
    write_files(tmp_path, config__json=config)
    with pytest.raises((ConfigError, ModelError), match=said):
        describe_model(tmp_path)


def _decoder_of(name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"hidden_size": 0},
        {"hidden_size": 2**40},
        {"vocab_size": 0},
        {"vocab_size": -1},
        {"vocab_size": "384"},
        {"max_position_embeddings": 0},
        {"sliding_window": 0},
        {"sliding_window": "8"},
        {"attn_logit_softcapping": 0.0},
        {"attn_logit_softcapping": -1.0},
        {"query_pre_attn_scalar": 0},
        {"layer_types": ["chunked_attention"] * 4},
        {"layer_types": ["full_attention"]},
        {"rope_parameters": {"rope_type": "unknown"}},
        {"quantization_config": {"bits": 4}},
        {"output_attentions": True},
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "unknown"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Nothing but an error of minisrv is raised, whatever config.json says; one of these settings
    changes nothing in this architecture, and the model is described."""
    shape = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 384}
    shape |= {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 32}
    write_files(tmp_path, config__json={**shape, **change})
    harmless = {"use_bidirectional_attention"}
    try:
        found = describe_model(tmp_path).model
    except (ConfigError, ModelError):
        return
    assert change.keys() <= harmless, found


@pytest.mark.parametrize("number", [0, 4])
def test_mixtures_in_which_a_token_uses_no_expert_are_refused(number: int, tmp_path: Path) -> None:
    settings = {**ARCHITECTURES["mixtral"], "num_local_experts": number, "num_experts_per_tok": 0}
    config = AutoConfig.for_model("mixtral", **settings, num_hidden_layers=2).to_dict()
    write_files(tmp_path, config__json=config | {"architectures": ["MixtralForCausalLM"]})
    with pytest.raises(ConfigError, match="a token uses no expert"):
        describe_model(tmp_path)


def test_architectures_that_are_no_decoders_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, config__json={"architectures": ["T5Model"], "model_type": "t5"})
    with pytest.raises(UnknownArchitectureError, match=r"T5Model.*Llama.*transformers 5"):
        describe_model(tmp_path)


def test_auto_takes_code_of_minisrv_where_there_is_some(tmp_path: Path) -> None:
    llama = make_checkpoint(tmp_path / "llama", "llama")
    mistral = make_transformers_checkpoint(tmp_path / "mistral", "mistral")
    assert describe_model(llama).model.implementation == "minisrv"
    assert describe_model(llama, "transformers").model.implementation == "transformers"
    assert describe_model(mistral).model.implementation == "transformers"
    with pytest.raises(UnknownArchitectureError, match=r"Mistral.*--model-impl transformers"):
        describe_model(mistral, "minisrv")


@pytest.mark.parametrize("variant", ["qwen3", "qwen3-tied", "llama-mqa"])
def test_both_implementations_describe_a_model_alike(variant: str, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, variant)
    ours = describe_model(directory, "minisrv").model
    theirs = describe_model(directory, "transformers").model
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    names += ("num_kv_heads", "head_dim", "max_position_embeddings", "dtype", "architecture")
    for name in (*names, "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    # ours is without norms
    assert 0 <= theirs.num_parameters - ours.num_parameters < 0.02 * ours.num_parameters


@pytest.mark.parametrize(
    ("name", "millions", "used"),
    [
        ("gemma-3-1b", 999.9, 999.9),
        ("granite-3-2b", 2533.5, 2533.5),
        ("olmo-2-1b", 1484.9, 1484.9),
        ("phi-4-mini", 3836.0, 3836.0),
        ("qwen3-30b-a3b", 30532.1, 3353.0),
        ("smollm3-3b", 3075.1, 3075.1),
    ],
)
def test_parameters_are_counted_without_making_any(name: str, millions: float, used: float) -> None:
    """The numbers are those that are published with the models, 3.3 billion used by a token of the
    one with experts."""
    model = describe_model(Path(__file__).parents[2] / "benchmarks" / "configs" / name).model
    assert round(model.num_parameters / 1e6, 1) == millions
    assert round((model.num_parameters - model.unused_parameters) / 1e6, 1) == used
    assert model.counted_parameters == model.num_parameters


@pytest.mark.parametrize(
    "name", [name for name, settings in ARCHITECTURES.items() if "num_experts" in settings]
)
def test_a_step_reads_the_experts_of_one_token_at_least(name: str, tmp_path: Path) -> None:
    """Where a token uses 2 experts, it does not matter how many more there are: only the router,
    [num_experts, hidden] in each of 4 layers and sometimes with a bias, is larger then."""
    read = []
    for number in (4, 8):
        number_of = {"num_experts": number, "num_local_experts": number}
        directory = make_transformers_checkpoint(tmp_path / str(number), name, **number_of)
        read.append(load(directory).bytes_read)
    assert read[1] - read[0] in (4 * 4 * 64 * 4, 4 * 4 * 65 * 4)


def test_int8_leaves_the_weights_of_experts_as_they_are(tmp_path: Path) -> None:
    """What memory is planned for them is what they take."""
    directory = make_transformers_checkpoint(tmp_path, "qwen3_moe")
    model = load(directory, torch.bfloat16, quantization="int8")
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    assert {p.dtype for p in experts} == {torch.bfloat16}
    assert sum(p.numel() for p in experts) == model.config.expert_parameters > 0


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt2"])
def test_bfloat16_and_int8_are_as_close_as_they_allow(
    name: str, quantization: str | None, tmp_path: Path
) -> None:
    directory = make_transformers_checkpoint(tmp_path, name, dtype=torch.bfloat16)
    tokens = prompt(40, 3)
    driver = Driver(load(directory, torch.bfloat16, quantization=quantization))
    driver.step([(0, tokens[:30])])
    for token in tokens[30:]:
        driver.step([(0, [token])])
    exact = reference(directory, tokens)
    theirs = reference(directory, tokens, torch.bfloat16).float()
    ours_off = (driver.logits(0).float() - exact).square().mean().sqrt()
    theirs_off = (theirs - exact).square().mean().sqrt()
    assert ours_off < (1.2 if quantization is None else 2.5) * theirs_off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_copies_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    """A step of many tokens makes no tensor as large as a copy of a weight for each choice of an
    expert."""
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            made.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    directory = make_transformers_checkpoint(tmp_path, "mixtral", dtype=dtype)
    driver = Driver(load(directory, dtype))
    with Sizes():
        driver.step([(0, prompt(100, 1))])
    experts_per_token, expert = 2, 64 * 96
    assert max(made) < 100 * experts_per_token * expert


@pytest.mark.parametrize("width", [4, 33])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        *(("cpu", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_experts_of_any_width(
    device: str, dtype: torch.dtype, name: str, width: int, tmp_path: Path
) -> None:
    """torch's product of groups takes rows of whole units of 16 bytes only. Texts are of so few
    tokens that rounding leads none to other experts."""
    widths = {"intermediate_size": width, "moe_intermediate_size": width}
    directory = make_transformers_checkpoint(tmp_path, name, **widths)
    driver, tokens = Driver(load(directory, dtype, device=device)), prompt(3, 1)
    driver.step([(0, tokens[:1])])
    driver.step([(0, tokens[1:])])
    off = (driver.logits(0).float() - reference(directory, tokens)).abs().mean()
    assert off < 40 * torch.finfo(dtype).eps


# ---- loading ---------------------------------------------------------------------------------

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(K_PROJ), f"1 missing: {K_PROJ}"),
        (lambda w: w.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (lambda w: w.update({K_PROJ: torch.ones(3, 4)}), rf"1 misshapen: {K_PROJ} \[3, 4\]"),
        (
            lambda w: w.update({K_PROJ: w[K_PROJ].to(torch.int32)}),
            f"1 of an unsupported dtype: {K_PROJ} I32",
        ),
        (lambda w: w.pop("lm_head.weight"), "1 missing: lm_head.weight"),
    ],
)
def test_loading_is_strict(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    directory = make_transformers_checkpoint(tmp_path, "mistral")
    edit(directory, change)
    with pytest.raises(WeightsError, match=said):
        load(directory)


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 4}, {"num_hidden_layers": 2}, {"sliding_window": 0}], ids=str
)
def test_a_config_that_changes_before_the_weights_are_read_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """The KV cache is planned by the description, and layers are made by the file."""
    directory = make_transformers_checkpoint(tmp_path, "mistral")
    config = describe_model(directory).model.for_context(100)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, ModelError), match=r"another model|sliding window of 0"):
        load_model(config, directory, dtype=torch.float32, load_format="dummy")


def test_duplicates_are_named(tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, "mistral", max_shard_size="100KB")
    first, *_, last = sorted(directory.glob("model-*.safetensors"))
    tensors = load_file(last)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, last, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"1 duplicate: {name}"):
        load(directory)


def test_a_missing_expert_is_told(tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, "mixtral")
    names = []

    def drop(weights: dict[str, Tensor]) -> None:
        names.append(next(name for name in weights if ".experts.1." in name))
        del weights[names[0]]

    edit(directory, drop)
    with pytest.raises(WeightsError, match="experts"):
        load(directory)


def test_experts_are_merged_across_shards(tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(
        tmp_path, "mixtral", max_shard_size="50KB", num_local_experts=12
    )
    assert len([*directory.glob("model-*.safetensors")]) > 4
    assert_logits_are_transformers(directory, load(directory))


@pytest.mark.parametrize("held", ["embedding", "head", "both", "different"])
def test_weights_are_tied_as_transformers_ties_them(held: str, tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, "mistral", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def change(weights: dict[str, Tensor]) -> None:
        if held != "embedding":
            weights[head] = weights[embedding].clone()
        if held == "head":
            del weights[embedding]
        if held == "different":
            weights[head] += 1.0

    edit(directory, change)
    assert_logits_are_transformers(directory, load(directory))


def test_random_weights_need_a_config_only(tmp_path: Path) -> None:
    directory = make_transformers_checkpoint(tmp_path, "gemma3_text")
    for path in directory.glob("*.safetensors"):
        path.unlink()
    config = describe_model(directory).model
    found = []
    for _ in range(2):
        model = load_model(config, directory, dtype=torch.float32, load_format="dummy", seed=3)
        model.prepare()
        driver = Driver(model)
        driver.step([(0, prompt(12, 1))])
        found.append(driver.logits(0))
    assert torch.equal(*found)
    assert found[0].isfinite().all()
    assert found[0].std() > 0.1

"""The loader is strict: each weight is used once and each parameter filled once, or an error names
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisrv.checkpoint import describe_model
from minisrv.errors import WeightsError
from minisrv.nn import copying
from minisrv.nn.decoder import Decoder
from minisrv.nn.loader import load_model
from tests.checkpoints import VARIANTS, make_checkpoint

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Weights = dict[str, Tensor]


def load(directory: Path, **options: object) -> Decoder:
    options.setdefault("dtype", torch.float32)
    return load_model(describe_model(directory).model, directory, **options)  # type: ignore[arg-type]


def weights(model: Decoder) -> Weights:
    return {name: tensor.clone() for name, tensor in model.destinations()}


def edit(directory: Path, change: Callable[[Weights], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def read_header(directory: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    """Return the header of the weights file, parsed, and the bytes behind it."""
    body = (directory / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(body[:8], "little")
    return json.loads(body[8:end]), body[end:]


def write_header(directory: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    body = size.to_bytes(8, "little") + header + data
    (directory / "model.safetensors").write_bytes(body)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_arrives(variant: str, tmp_path: Path) -> None:
    """Every weight arrives under its own name, merged ones too, and the model has no parameters
    besides."""
    model = load(make_checkpoint(tmp_path, variant))
    found = weights(model)
    stored = load_file(tmp_path / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name
    assert sum(t.numel() for t in found.values()) == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_shards_equal_a_single_file(tmp_path: Path) -> None:
    one = load(make_checkpoint(tmp_path / "one"))
    many_dir = make_checkpoint(tmp_path / "many", max_shard_size="100KB")
    assert len(list(many_dir.glob("*.safetensors"))) > 2
    many = weights(load(many_dir))
    for name, tensor in weights(one).items():
        assert torch.equal(many[name], tensor), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
def test_weights_are_converted(stored: torch.dtype, served: torch.dtype, tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, dtype=stored), dtype=served)
    assert {p.dtype for p in model.parameters()} == {served}
    expected = load_file(tmp_path / "model.safetensors")[K_PROJ].to(served)
    assert torch.equal(weights(model)[K_PROJ], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_same_weights(
    stored: torch.dtype, served: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads copy them, and those that are larger than a buffer in pieces."""
    monkeypatch.setattr(copying, "BUFFER_BYTES", 1000)
    directory = make_checkpoint(tmp_path, dtype=stored, max_shard_size="100KB")
    copied = weights(load(directory, dtype=served, device="cuda"))
    for name, tensor in weights(load(directory, dtype=served)).items():
        assert torch.equal(copied[name].cpu(), tensor), name


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """The loader refuses a merged weight of which one part is missing."""
    edit(make_checkpoint(tmp_path), lambda w: w.pop(K_PROJ))
    with pytest.raises(WeightsError, match=rf"1 missing: {K_PROJ}\."):
        load(tmp_path)


def test_unexpected_weights_are_named(tmp_path: Path) -> None:
    edit(make_checkpoint(tmp_path, "llama"), lambda w: w.update({"model.extra": torch.ones(1)}))
    with pytest.raises(WeightsError, match=r"1 unexpected: model\.extra"):
        load(tmp_path)


def test_a_bias_that_the_config_does_not_announce_is_unexpected(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-biases")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_bias": False}))
    with pytest.raises(WeightsError, match=r"8 unexpected: .*o_proj\.bias"):
        load(tmp_path)


def test_misshapen_weights_are_named_with_both_shapes(tmp_path: Path) -> None:
    """A wrong shape is refused also where it would broadcast."""
    edit(make_checkpoint(tmp_path), lambda w: w.update({K_PROJ: torch.ones(1, 64)}))
    with pytest.raises(WeightsError, match=rf"1 misshapen: {K_PROJ} \[1, 64\], wanted \[64, 64\]"):
        load(tmp_path)


def test_duplicate_weights_are_named(tmp_path: Path) -> None:
    """Two shards hold the same weight, although the index can name only one of them."""
    make_checkpoint(tmp_path, max_shard_size="100KB")
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, file in index.items() if file != last.name)
    tensors = load_file(last)
    source = load_file(tmp_path / index[name])
    save_file({**tensors, name: source[name]}, last)
    with pytest.raises(WeightsError, match=rf"1 duplicate: {name} \(again in {last.name}\)"):
        load(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    edit(make_checkpoint(tmp_path), lambda w: w.update({K_PROJ: w[K_PROJ].to(torch.int8)}))
    with pytest.raises(WeightsError, match=rf"unsupported dtype: {K_PROJ} I8"):
        load(tmp_path)


def test_the_list_of_names_is_bounded(tmp_path: Path) -> None:
    edit(
        make_checkpoint(tmp_path),
        lambda w: [w.pop(n) for n in list(w) if "layers.1." in n] and None,
    )
    with pytest.raises(WeightsError, match=r"missing: .* and \d+ more\.") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 1000


def test_what_is_told_of_a_weight_is_bounded(tmp_path: Path) -> None:
    change = {K_PROJ: torch.ones([1] * 60), "x" * 100_000: torch.ones(1)}
    edit(make_checkpoint(tmp_path), lambda w: w.update(change))
    header, data = read_header(tmp_path)
    header[K_PROJ]["shape"] = [1] * 10_000
    write_header(tmp_path, json.dumps(header).encode(), data)
    with pytest.raises(WeightsError, match=r"1 misshapen: .* 1 unexpected: x+\.\.\.") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "described",
    [
        {"hidden_size": 2**31 - 1},
        {"vocab_size": 10**9},
        {"num_layers": 10_000},
        {"num_heads": 2**30},
    ],
)
def test_nothing_is_made_for_a_config_that_describes_much_more(
    described: dict[str, int], tmp_path: Path
) -> None:
    model = describe_model(make_checkpoint(tmp_path)).model
    with pytest.raises(WeightsError, match="do they belong together"):
        load_model(replace(model, **described), tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**8, 1 << 40])
def test_headers_of_any_length(length: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    write_header(tmp_path, *(json.dumps(part).encode() for part in ({}, {})), length=length)
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({"shape": [2**63, 2]}, {"shape": [-1]}, {"shape": None}, {"dtype": "X"}, {"dtype": 1}),
        *({"data_offsets": [0, 2**64 - 1]}, {"data_offsets": [8, 0]}, {"data_offsets": [1, 9]}),
        *({"dtype": "F8_E4M3"}, {"dtype": "F4"}, {"dtype": "C64"}, {"shape": [], "dtype": "BOOL"}),
    ],
)
@pytest.mark.parametrize("name", [K_PROJ, "model.embed_tokens.weight"])
def test_headers_that_say_anything(name: str, change: dict[str, object], tmp_path: Path) -> None:
    header, data = read_header(make_checkpoint(tmp_path, "llama-tied"))
    header[name] |= change
    write_header(tmp_path, json.dumps(header).encode(), data)
    with pytest.raises(WeightsError):
        load(tmp_path)


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    """Entries that older tools stored beside the weights are ignored."""
    make_checkpoint(tmp_path, "llama-tied")
    [embedding] = load(tmp_path).embed.parameters()
    extras = {
        "lm_head.weight": embedding.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    edit(tmp_path, lambda w: w.update(extras))
    assert load(tmp_path).lm_head is None


def test_an_untied_lm_head_is_needed(tmp_path: Path) -> None:
    edit(make_checkpoint(tmp_path, "llama"), lambda w: w.pop("lm_head.weight"))
    with pytest.raises(WeightsError, match=r"1 missing: lm_head\.weight"):
        load(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(make_checkpoint(tmp_path), progress=lambda done, total: seen.append((done, total)))
    total = len(load_file(tmp_path / "model.safetensors"))
    assert seen == [(i, total) for i in range(1, total + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_need_a_config_only(dtype: torch.dtype, tmp_path: Path) -> None:
    """Random weights are the same for the same seed and others for another seed, and all are
    finite."""
    config = describe_model(make_checkpoint(tmp_path, "qwen3-biases")).model
    first, again, other = (
        weights(load_model(config, None, dtype=dtype, load_format="dummy", seed=seed))
        for seed in (0, 0, 1)
    )
    for name in first:
        assert torch.equal(first[name], again[name]), name
        assert first[name].isfinite().all()
    assert not torch.equal(first[K_PROJ], other[K_PROJ])

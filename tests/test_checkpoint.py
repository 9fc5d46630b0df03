"""Finding a checkpoint and reading its small files, and the errors on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from minisrv import checkpoint
from minisrv.checkpoint import (
    GenerationConfig,
    read_generation_config,
    read_model_config,
    resolve_checkpoint,
    weight_files,
)
from minisrv.errors import ConfigError, ModelError


def write(directory: Path, **files: Any) -> Path:
    """JSON files; `generation_config__json=...` writes generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name.replace("__", ".")).write_text(json.dumps(value))
    return directory


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(write(tmp_path, config__json={}))) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/dir", "./missing", "a/b/c", "../x", "~/nope-nope", ""])
def test_what_is_neither_a_directory_nor_a_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match=r"neither a directory nor a hub id|no config\.json"):
        resolve_checkpoint(name)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelError, match="is a file; name the checkpoint's directory"):
        resolve_checkpoint(str(path))


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    for read in (lambda: resolve_checkpoint(str(tmp_path)), lambda: read_model_config(tmp_path)):
        with pytest.raises(ModelError, match=r"has no config\.json"):
            read()


def test_the_hub_is_asked_for_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, tokenizer and safetensors; never code, never pickles."""
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(write(tmp_path, config__json={}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("org/some-model_1.5") == tmp_path
    assert asked["repo_id"] == "org/some-model_1.5"
    wanted = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    unwanted = ["modeling_x.py", "pytorch_model.bin", "model.pt", "original/model.safetensors"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*wanted, *unwanted[:3]], allow_patterns=asked["allow_patterns"]
    )
    assert list(kept) == wanted


def test_a_failing_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise ConnectionError("name resolution failed\nand a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        resolve_checkpoint("org/model")
    assert str(caught.value).endswith("ConnectionError: name resolution failed")
    assert "no directory 'org/model' here" in str(caught.value)


def test_the_default_model_is_found_in_both_installs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the package (editable); inside it (wheel), which goes first."""
    package = tmp_path / "minisrv"
    monkeypatch.setattr(checkpoint, "__file__", str(package / "checkpoint.py"))
    with pytest.raises(ModelError, match="default model is not installed"):
        resolve_checkpoint(None)
    beside = write(tmp_path / "models" / "minisrv-default", config__json={})
    assert resolve_checkpoint(None) == beside
    inside = write(package / "_models" / "minisrv-default", config__json={})
    assert resolve_checkpoint(None) == inside


def test_generation_config(tmp_path: Path) -> None:
    said = {"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None}
    write(tmp_path, config__json={"eos_token_id": 1}, generation_config__json=said)
    assert read_generation_config(tmp_path) == GenerationConfig((7, 9), 0.6, 0.9, 20, None)


@pytest.mark.parametrize(
    ("eos", "ids"), [(3, (3,)), ([3, 4], (3, 4)), ([], ()), (None, ()), (0, (0,))]
)
def test_eos_falls_back_to_config(eos: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    """Without a generation config, and with one that does not say."""
    write(tmp_path, config__json={"eos_token_id": eos})
    assert read_generation_config(tmp_path) == GenerationConfig(ids)
    write(tmp_path, generation_config__json={"temperature": 1.0})
    assert read_generation_config(tmp_path) == GenerationConfig(ids, temperature=1.0)


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "eos_token_id"])
def test_nonsense_in_generation_config_is_named(field: str, tmp_path: Path) -> None:
    write(tmp_path, config__json={}, generation_config__json={field: "x"})
    with pytest.raises(ConfigError, match=f"{field}='x'"):
        read_generation_config(tmp_path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json must hold a JSON object"):
        read_model_config(tmp_path)


def test_weight_files(tmp_path: Path) -> None:
    """The index decides; without one, the single file."""
    for name in ("model.safetensors", "a.safetensors", "b.safetensors", "stray.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == (tmp_path / "model.safetensors",)
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    write(tmp_path, **{"model__safetensors__index__json": index})
    assert weight_files(tmp_path) == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ModelError, match=r"files that are not there: a\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": {"x": "../x.safetensors"}}]
)
def test_a_bad_index_is_refused(index: Any, tmp_path: Path) -> None:
    write(tmp_path, **{"model__safetensors__index__json": index})
    with pytest.raises(ModelError, match=r"weight_map is missing|outside of the checkpoint"):
        weight_files(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"safetensors only.*pytorch_model\.bin.*never loaded"):
        weight_files(tmp_path)


def test_torch_is_not_imported() -> None:
    """API workers resolve checkpoints too, and start without torch."""
    code = "import sys, minisrv.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

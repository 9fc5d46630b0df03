"""Finding a checkpoint, what its small files say, and what is refused before its weights are there.

That they mean what transformers says is tested in `test_checkpoint_grid` and
`text/test_tokenizer_grid`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from minisrv import cache
from minisrv.checkpoint import (
    Checkpoint,
    GenerationConfig,
    describe_model,
    describe_tokenizer,
    description,
    location,
    open_checkpoint,
    resolve_checkpoint,
    weight_files,
)
from minisrv.checkpoint.location import fetch_weights
from minisrv.checkpoint.schema import Descriptions
from minisrv.config import EngineConfig
from minisrv.errors import ConfigError, MinisrvError, ModelError, UnknownArchitectureError
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tokenizer_description import TokenizerDescription
from tests.checkpoints import make_checkpoint
from tests.test_cache import DAMAGE
from tests.text.tiny_tokenizer import save_chatml

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def write(directory: Path, **files: Any) -> Path:
    """Write JSON files and return the directory; `generation_config__json=...` writes
    generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name.replace("__", ".")).write_text(json.dumps(value))
    return directory


# ---- where it lies -------------------------------------------------------------------------------


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(write(tmp_path, config__json={}))) == tmp_path
    with pytest.raises(ModelError, match="revision='main' is of a repository"):
        resolve_checkpoint(str(tmp_path), "main")


@pytest.mark.parametrize("name", ["/no/such/dir", "./missing", "a/b/c", "../x", "~/nope-nope"])
def test_what_is_neither_a_directory_nor_a_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match=r"neither a directory nor a hub id|no config\.json"):
        resolve_checkpoint(name)


def test_what_the_system_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x" * 5000, str(tmp_path / ("x" * 5000))):
        with pytest.raises(ModelError, match="cannot be read: .*File name too long"):
            open_checkpoint(EngineConfig(model=name))
    with pytest.raises(ModelError, match="'~no-such-user/x': there is no such user"):
        open_checkpoint(EngineConfig(model="~no-such-user/x"))

    def refuse(directory: Path) -> None:
        raise PermissionError(13, "Permission denied", str(directory))

    write(tmp_path, config__json=LLAMA)
    monkeypatch.setattr("minisrv.checkpoint.files.os.scandir", refuse)
    with pytest.raises(ModelError, match=f"Permission denied: '{tmp_path}'"):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


def test_a_name_is_text(tmp_path: Path) -> None:
    """A model's name must be UTF-8 and not empty: an empty name comes from a variable that was not
    set, and means neither `.` nor the default model."""
    with pytest.raises(ModelError, match="the name is empty"):
        resolve_checkpoint("")
    directory = tmp_path / "a\udcff"  # This byte is no UTF-8.
    directory.mkdir()
    with pytest.raises(ModelError, match=r"a\\udcff' is no UTF-8; rename"):
        resolve_checkpoint(str(directory))


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelError, match="is a file; name the checkpoint's directory"):
        resolve_checkpoint(str(path))


def test_gguf_is_named_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model-q4.gguf"
    path.touch()
    for model in (path, tmp_path):
        with pytest.raises(ModelError, match=r"is a GGUF (file|checkpoint).*llama\.cpp"):
            resolve_checkpoint(str(model))


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_checkpoint(str(tmp_path))


class Hub:
    """Stands for the hub's client, with one repository: names of files and their contents."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch, **files: Any) -> None:
        self.snapshot = cache / "0123abc"
        self.files = {name.replace("__", "."): json.dumps(files[name]) for name in files}
        self.revisions: list[str | None] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def add(self, *names: str) -> None:
        self.files |= dict.fromkeys(names, "")

    def download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], **_: Any
    ) -> str:
        self.revisions.append(revision)
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns
        )
        for name in wanted:
            path = self.snapshot / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.files[name])
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        found = (path for path in self.snapshot.rglob("*") if path.is_file())
        return {str(path.relative_to(self.snapshot)) for path in found}


SMALL = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
}


def test_the_hub_is_asked_for_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, tokenizer and safetensors files are fetched, but never code, pickles or other
    weights."""
    hub = Hub(tmp_path, monkeypatch, config__json={})
    hub.add(*SMALL - {"config.json"}, "model.safetensors", "model.fp16.safetensors")
    hub.add("modeling_x.py", "pytorch_model.bin", "model.pt", "original/model.safetensors")
    assert resolve_checkpoint("org/some-model_1.5", "v2") == hub.snapshot
    assert hub.fetched == SMALL
    fetch_weights("org/some-model_1.5", hub.snapshot)
    assert hub.fetched == SMALL | {"model.safetensors"}
    # Weights are fetched from the commit whose config was read, whatever is pushed meanwhile.
    assert hub.revisions == ["v2", "0123abc"]


def test_the_hub_is_asked_for_the_shards_that_the_index_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"weight_map": {"x": "weights-1.safetensors", "y": "weights-2.safetensors"}}
    hub = Hub(tmp_path, monkeypatch, config__json={}, model__safetensors__index__json=index)
    hub.add("weights-1.safetensors", "weights-2.safetensors", "weights-3.safetensors")
    directory = resolve_checkpoint("org/model")
    fetch_weights("org/model", directory)
    names = [path.name for path in weight_files(directory)]
    assert names == ["weights-1.safetensors", "weights-2.safetensors"]
    assert "weights-3.safetensors" not in hub.fetched


def test_an_index_that_is_a_leftover_does_not_hide_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"weight_map": {"x": "gone-1.safetensors"}}
    hub = Hub(tmp_path, monkeypatch, config__json={}, model__safetensors__index__json=index)
    hub.add("model.safetensors")
    directory = resolve_checkpoint("org/model")
    fetch_weights("org/model", directory)
    assert weight_files(directory) == (directory / "model.safetensors",)


def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config, settings, said in (
        ({"architectures": ["MambaForCausalLM"]}, {"model_impl": "minisrv"}, "Mamba"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, {}, "tokenizer|longrope"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, {}, "quantized checkpoints"),
        (LLAMA, {}, "holds no tokenizer"),
        (LLAMA, {"max_model_len": 513}, "max_model_len=513|tokenizer"),
    ):
        hub = Hub(tmp_path, monkeypatch, config__json=config)
        hub.add("model.safetensors")
        with pytest.raises((ModelError, ConfigError), match=said):
            open_checkpoint(EngineConfig(model="org/model", **settings))
        assert hub.fetched == {"config.json"}


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
    """The default model is found beside the package (editable install) and inside it (wheel);
    inside goes first."""
    package = tmp_path / "minisrv"
    monkeypatch.setattr(location, "__file__", str(package / "checkpoint" / "location.py"))
    with pytest.raises(ModelError, match="default model is not installed"):
        resolve_checkpoint(None)
    beside = write(tmp_path / "models" / "minisrv-default", config__json={})
    assert resolve_checkpoint(None) == beside
    inside = write(package / "_models" / "minisrv-default", config__json={})
    assert resolve_checkpoint(None) == inside


def test_weight_files(tmp_path: Path) -> None:
    """The single file is used first, as transformers does it; without one the index decides."""
    for name in ("model.safetensors", "a.safetensors", "b.safetensors", "stray.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == (tmp_path / "model.safetensors",)
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    write(tmp_path, **{"model__safetensors__index__json": index})
    assert weight_files(tmp_path) == (tmp_path / "model.safetensors",)
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path) == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ModelError, match=r"files that are not there: 'a\.safetensors'"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": {"x": "../x.safetensors"}},
        {"weight_map": {"x": "pytorch_model-1.bin"}},
    ],
)
def test_a_bad_index_is_refused(index: Any, tmp_path: Path) -> None:
    write(tmp_path, **{"model__safetensors__index__json": index})
    said = r"weight_map is missing|outside of the checkpoint|safetensors only"
    with pytest.raises(ModelError, match=said):
        weight_files(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"safetensors only.*pytorch_model\.bin.*never loaded"):
        weight_files(tmp_path)


# ---- what it says --------------------------------------------------------------------------------


def test_generation_config(tmp_path: Path) -> None:
    said = {
        "eos_token_id": [7, 9],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.3,
        "max_new_tokens": 99,
        "min_new_tokens": 3,
        "stop_strings": ["END", "\n\n"],
        "do_sample": True,
        "no_repeat_ngram_size": 3,
        "num_beams": 1,
    }
    write(tmp_path, config__json={**LLAMA, "eos_token_id": 1}, generation_config__json=said)
    told = describe_model(tmp_path)
    assert told.generation == GenerationConfig(
        (7, 9), 0.6, 0.9, 20, None, 1.3, max_tokens=99, min_tokens=3, stop=("END", "\n\n")
    )
    assert told.unused == ("no_repeat_ngram_size",)


@pytest.mark.parametrize(
    ("eos", "ids"), [(3, (3,)), ([3, 4], (3, 4)), ([], ()), (None, ()), (0, (0,))]
)
def test_eos_falls_back_to_config(eos: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    """config.json's end token counts without a generation config, and with one that names none."""
    write(tmp_path, config__json={**LLAMA, "eos_token_id": eos})
    assert describe_model(tmp_path).generation == GenerationConfig(ids)
    write(tmp_path, generation_config__json={"temperature": 1.0})
    assert describe_model(tmp_path).generation == GenerationConfig(ids, temperature=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, "x") for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        ("top_k", 2.5),
        ("max_new_tokens", True),
        ("eos_token_id", "x"),
        ("eos_token_id", [1, True]),
        ("stop_strings", [""]),
    ],
)
def test_nonsense_in_generation_config_is_named(field: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, config__json=LLAMA, generation_config__json={field: value})
    with pytest.raises((ConfigError, ModelError), match=field):
        describe_model(tmp_path)


def test_the_tokenizers_end_token_ends_a_sequence(tmp_path: Path) -> None:
    """The tokenizer's end token is all that some checkpoints name; it is ignored if its id is
    outside of the model's vocabulary, because it cannot be sampled then."""
    make_checkpoint(tmp_path, "llama", eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    end = describe_tokenizer(tmp_path).eos_token_id
    assert end is not None
    assert open_checkpoint(EngineConfig(model=str(tmp_path))).generation.eos_token_ids == (end,)
    write(tmp_path, config__json={**LLAMA, "vocab_size": end, "eos_token_id": [1]})
    assert open_checkpoint(EngineConfig(model=str(tmp_path))).generation.eos_token_ids == (1,)


def test_broken_json_is_named(tmp_path: Path) -> None:
    for text, said in (("{", "cannot be read"), ("[]", "must hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"config\.json {said}"):
            open_checkpoint(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, UnknownArchitectureError, "Mamba.*Llama"),
        ({"architectures": None}, UnknownArchitectureError, "None"),
        ({"model_type": "mistral"}, ConfigError, "'mistral' does not go with.*'llama'"),
        ({"hidden_act": "x"}, ModelError, "hidden_act='x'.*silu is.*transformers' code"),
        ({"hidden_size": 65}, ModelError, "multiple"),
        ({"num_attention_heads": "4"}, ModelError, "num_attention_heads"),
        (
            {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            ConfigError,
            "head_dim=2 elements leave dynamic RoPE nothing to scale",
        ),
    ],
)
def test_settings_that_cannot_be_served_are_named(
    change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    write(tmp_path, config__json={**LLAMA, **change})
    save_chatml(tmp_path)
    with pytest.raises(error, match=said):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\x1b[2J\r\x07"], ids=["long", "control"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: {"architectures": [text]},
        lambda text: {"model_type": text},
        lambda text: {"hidden_act": text},
        lambda text: {"layer_types": [text]},
        lambda text: {"hidden_act": "gelu", "dtype": text},
        lambda text: {"rope_parameters": {text: {"rope_type": "default"}}},
        lambda text: {"rope_parameters": {"rope_type": text}},
    ],
)
def test_what_is_said_of_a_config_is_short_and_printable(
    change: Callable[[str], dict[str, Any]], text: str, tmp_path: Path
) -> None:
    """A message may repeat a part of it from both implementations, and goes to a terminal."""
    write(tmp_path, config__json={**LLAMA, **change(text)})
    with pytest.raises(MinisrvError) as caught:
        describe_model(tmp_path)
    assert len(caught.value.message) < 2000
    assert caught.value.message.isprintable()


# ---- other tokenizers and templates --------------------------------------------------------------


def test_another_tokenizer_and_another_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "model", config__json=LLAMA)
    save_chatml(tmp_path / "tokenizer")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    config = EngineConfig(
        model=str(tmp_path / "model"),
        tokenizer=str(tmp_path / "tokenizer"),
        chat_template=template,
        load_format="dummy",
    )
    checkpoint = open_checkpoint(config)
    assert checkpoint.tokenizer.backend == describe_tokenizer(tmp_path / "tokenizer").backend
    tokenizer = Tokenizer.from_description(checkpoint.tokenizer)
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "Hi!"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    write(tmp_path / "model", config__json={**LLAMA, "vocab_size": 300})
    open_checkpoint(config)
    assert f"ids go up to {tokenizer.vocab_size - 1}, and the model's to 299" in caplog.text
    template.write_text("{% for %}")
    with pytest.raises(ConfigError, match="--chat-template .* is not valid: Expected an expr"):
        open_checkpoint(config)
    template.unlink()
    with pytest.raises(ConfigError, match="--chat-template .* cannot be read"):
        open_checkpoint(config)


def test_random_weights_need_a_config_only(tmp_path: Path) -> None:
    """Without weights and tokenizer a stand-in tokenizer has a token for each id, and each of them
    is text."""
    write(tmp_path, config__json=LLAMA)
    with pytest.raises(ModelError, match="holds no tokenizer.*--tokenizer.*dummy"):
        open_checkpoint(EngineConfig(model=str(tmp_path)))
    checkpoint = open_checkpoint(EngineConfig(model=str(tmp_path), load_format="dummy"))
    tokenizer = Tokenizer.from_description(checkpoint.tokenizer)
    assert tokenizer.vocab_size == LLAMA["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("Grüße, 日本")) == "Grüße, 日本"
    assert all(tokenizer.token_text(i)[1] for i in range(tokenizer.vocab_size))
    assert "user: Hi" in tokenizer.render_chat([{"role": "user", "content": "Hi"}])


# ---- the cache -----------------------------------------------------------------------------------


def test_a_second_start_imports_no_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was read before is read from the cache without a process that imports
    transformers, until a file changes or the cache entry is damaged."""
    directory = make_checkpoint(tmp_path / "model", "llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[tuple[Path | None, Path | None]] = []
    ask = description._ask_process

    def counted(model: Path | None, tokenizer: Path | None, implementation: str) -> Descriptions:
        asked.append((model, tokenizer))
        return ask(model, tokenizer, implementation)

    monkeypatch.setattr(description, "_ask_process", counted)
    monkeypatch.delitem(sys.modules, "transformers")
    config = EngineConfig(model=str(directory))
    first = open_checkpoint(config)
    assert open_checkpoint(config) == first
    assert asked == [(directory, directory)]
    (directory / "generation_config.json").write_text('{"top_k": 7}')
    assert open_checkpoint(config).generation.top_k == 7
    assert asked[1:] == [(directory, None)]
    for entry in (tmp_path / "cache" / "minisrv" / "checkpoints").iterdir():
        entry.write_bytes(entry.read_bytes()[:-1] + b"\0")
    assert open_checkpoint(config).tokenizer == first.tokenizer
    assert asked[2:] == [(directory, directory)]


@pytest.mark.parametrize("damage", ["a link", "mode 666", "a directory", "a page of zeros"])
def test_a_description_that_is_not_trusted_is_read_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry that is not trusted, by the rule for all cache entries (see tests/test_cache.py), is
    read anew and replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = make_checkpoint(tmp_path / "model", "llama")
    first = open_checkpoint(EngineConfig(model=str(directory)))
    spoil, reason = DAMAGE[damage]
    for entry in (tmp_path / "cache" / "minisrv" / "checkpoints").iterdir():
        if entry.name.startswith("tokenizer"):
            spoil(entry)
    assert open_checkpoint(EngineConfig(model=str(directory))) == first
    assert reason in caplog.text
    caplog.clear()
    assert open_checkpoint(EngineConfig(model=str(directory))) == first
    assert "is not used" not in caplog.text


def test_the_oldest_descriptions_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(description, "MAX_ENTRIES", 2)
    for size in (64, 128, 192):
        describe_model(write(tmp_path / str(size), config__json={**LLAMA, "hidden_size": size}))
    kept = tmp_path / "cache" / "minisrv" / "checkpoints"
    assert len(list(kept.iterdir())) == 2


def test_a_refusal_is_forgotten_with_the_version_that_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a library may describe a model differently, or compute what this one does
    not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = write(tmp_path / "model", config__json={**LLAMA, "hidden_act": "gelu"})
    asked: list[str] = []
    read = description._read

    def counted(model: Path | None, tokenizer: Path | None, implementation: str) -> Descriptions:
        if model is not None:
            asked.append(implementation)
        return read(model, tokenizer, implementation)

    monkeypatch.setattr(description, "_read", counted)
    for version in ("1", "1", "2"):
        monkeypatch.setattr(description, "version", lambda _, version=version: version)
        description._code_digest.cache_clear()
        assert "gelu" in describe_model(directory).refusal
    description._code_digest.cache_clear()
    assert asked == 2 * ["minisrv", "transformers"]


def test_files_that_change_while_they_are_read_are_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the content before the change would be known by what was read after it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    read = description._read

    def changed(*arguments: Any) -> Descriptions:
        write(directory, config__json={**LLAMA, "hidden_size": 128})
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(description, "_read", changed)
        write(directory, config__json={**LLAMA, "hidden_size": 64})
        assert describe_model(directory).model.hidden_size == 128
    write(directory, config__json={**LLAMA, "hidden_size": 64})
    assert describe_model(directory).model.hidden_size == 64


def test_a_dtype_is_checked_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is there, transformers finds the dtype by its name; in the process that reads the
    files it does not."""
    write(tmp_path, config__json={**LLAMA, "dtype": "\x1b[2J"})
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ConfigError, match=r"dtype='\\x1b\[2J' is not implemented.*float16"):
        describe_model(tmp_path)


def test_a_process_tells_errors_of_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, config__json={**LLAMA, "rope_scaling": {"rope_type": "longrope"}})
    save_chatml(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises((ConfigError, ModelError), match="longrope"):
        open_checkpoint(EngineConfig(model=str(tmp_path)))


def test_code_in_the_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path, "llama")
    for name in ("msgspec", "transformers", "socket", "json"):
        (directory / f"{name}.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "transformers")
    assert describe_model(directory).model.architecture == "LlamaForCausalLM"


def test_the_working_directory_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server starts although its working directory was deleted, as where another version was put
    in its place."""
    directory = make_checkpoint(tmp_path / "model", "llama")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "transformers")
    assert describe_model(directory).model.architecture == "LlamaForCausalLM"


def test_what_an_environment_prints_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "sitecustomize.py").write_text("print('hello', flush=True)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "transformers")
    assert describe_model(directory).model.architecture == "LlamaForCausalLM"


def test_without_a_cache_everything_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minisrv").mkdir(mode=0o777)
    (tmp_path / "minisrv").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(OSError, match="others may write"):
        cache.cache_directory()
    directory = make_checkpoint(tmp_path / "model", "llama")
    assert describe_model(directory).model.num_layers == 2
    assert not list((tmp_path / "minisrv").iterdir())


def test_other_processes_read_what_was_opened(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", "llama-llama3")
    checkpoint = open_checkpoint(EngineConfig(model=str(directory)))
    assert isinstance(checkpoint.tokenizer, TokenizerDescription)
    checkpoint.save(tmp_path / "saved")
    assert Checkpoint.load(tmp_path / "saved") == checkpoint


def test_neither_torch_nor_transformers_is_imported() -> None:
    """API workers read what a checkpoint says too, and start without importing either."""
    code = (
        "import sys, minisrv.checkpoint, minisrv.text.tokenizer; "
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("has_torch", [False, True])
def test_what_an_engine_will_need_is_imported_meanwhile(has_torch: bool, tmp_path: Path) -> None:
    """While another process reads a checkpoint for transformers' code, one that has torch, and so
    will run that code, imports it; a launcher without torch does not."""
    code = (
        "import sys; from pathlib import Path; from minisrv.checkpoint import describe_model\n"
        f"if {has_torch}: import torch\n"
        "describe_model(Path(sys.argv[1]), 'transformers')\n"
        "print(*({'torch', 'transformers'} & sys.modules.keys()))"
    )
    directory = make_checkpoint(tmp_path / "model", "llama")
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    libraries = {"torch", "transformers"} if has_torch else set()
    assert {*done.stdout.split()} == libraries

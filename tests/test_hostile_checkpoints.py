"""A checkpoint is a stranger's: whatever its files hold, it is opened or refused by name, and no
code of it is run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisrv.checkpoint import describe_model, open_checkpoint, weight_files
from minisrv.config import EngineConfig
from minisrv.errors import MinisrvError
from minisrv.nn.rope import inverse_frequencies
from tests.checkpoints import write_files
from tests.text.tiny_tokenizer import byte_level, save

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
FIELDS = (
    *CONFIG,
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias", "eos_token_id"),
    *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "use_sliding_window"),
    *("sliding_window", "max_window_layers", "dtype", "torch_dtype", "quantization_config"),
    *("num_labels", "id2label", "per_layer_config", "is_causal", "auto_map", "text_config"),
    *("original_max_position_embeddings", "partial_rotary_factor", "transformers_version"),
)
ROPE_FIELDS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    *("partial_rotary_factor", "full_attention"),
)
GENERATION_FIELDS = (
    *("eos_token_id", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_new_tokens", "min_new_tokens", "stop_strings", "num_beams", "watermarking_config"),
)
TOKENIZER_FIELDS = (
    *("tokenizer_class", "eos_token", "bos_token", "additional_special_tokens", "chat_template"),
    *("extra_special_tokens", "added_tokens_decoder", "add_bos_token", "model_max_length"),
    *("tokenizer_file", "vocab_file", "auto_map", "split_special_tokens", "add_prefix_space"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2.5, 10**12, 10**40, float("nan"), float("inf"), 1e308),
    *("", "x", "\ud800", [], [None], [[]], {}, {"a": 1}, {"5": {"content": "\ud800"}}),
)


@pytest.fixture(autouse=True)
def quiet_transformers(caplog: pytest.LogCaptureFixture) -> None:
    """It repeats what it finds wrong, lone surrogates included, and a process that runs tests
    cannot send a log that holds one to the process that reports them."""
    caplog.set_level(logging.CRITICAL, "transformers")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "checkpoint"
    save(byte_level(), directory)
    write_files(directory, config__json=CONFIG)
    (directory / "model.safetensors").touch()
    return directory


def opens(directory: Path) -> bool:
    """False if it is refused; what is neither fails the test."""
    try:
        checkpoint = open_checkpoint(EngineConfig(model=str(directory)))
    except MinisrvError:
        return False
    checkpoint.save(directory / "saved")
    model = checkpoint.model.for_context(min(checkpoint.model.longest_context, 1 << 20))
    assert inverse_frequencies(model.rope, min(model.head_dim, 512)).isfinite().all()
    assert all(0 <= end < model.vocab_size for end in checkpoint.generation.eos_token_ids)
    return True


EDITS: dict[str, tuple[tuple[str, ...], Callable[[str, Any], dict[str, Any]]]] = {
    "config": (FIELDS, lambda name, value: {"config__json": {**CONFIG, name: value}}),
    "rope": (
        ROPE_FIELDS,
        lambda name, value: {"config__json": {**CONFIG, "rope_scaling": {**YARN, name: value}}},
    ),
    "generation": (
        GENERATION_FIELDS,
        lambda name, value: {"generation_config__json": {name: value}},
    ),
    "tokenizer": (TOKENIZER_FIELDS, lambda name, value: {"tokenizer_config__json": {name: value}}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_values_of_all_kinds_in_each_field(edit: str, checkpoint: Path) -> None:
    fields, change = EDITS[edit]
    opened = [
        opens(write_files(checkpoint, **change(name, value))) for name in fields for value in VALUES
    ]
    assert 0 < sum(opened) < len(opened)


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config", "tokenizer"])
def test_files_that_hold_no_json(name: str, checkpoint: Path) -> None:
    path = checkpoint / f"{name}.json"
    deep = "[" * 200_000 + "]" * 200_000
    for content in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        deep.encode(),
        b'{"a": 1' + b"0" * 5000,
    ):
        path.write_bytes(content)
        assert not opens(checkpoint), content[:20]
    path.write_text(f'{{"architectures": {deep}}}')
    assert not opens(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_that_are_none(name: str, checkpoint: Path) -> None:
    """Links to nothing, to themselves, to a device and to a pipe, none of which is waited for."""
    path = checkpoint / name
    for target in ("nowhere", name, "/dev/zero", "pipe"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        if target == "pipe":
            os.mkfifo(checkpoint / "pipe")
        assert opens(checkpoint) == (name != "config.json")


def test_names_that_are_no_text(checkpoint: Path) -> None:
    Path(os.fsdecode(os.fsencode(checkpoint) + b"/tokenizer\xff.json")).touch()
    assert opens(checkpoint)


def test_an_index_that_holds_anything(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    for value in VALUES:
        for index in (value, {"weight_map": value}, {"weight_map": {"x": value}}):
            write_files(checkpoint, model__safetensors__index__json=json.dumps(index))
            with pytest.raises(MinisrvError):
                weight_files(checkpoint)


def test_code_of_a_checkpoint_is_never_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither run nor asked about, be it in the checkpoint or on the hub."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked"))
    ran = checkpoint / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    for place in ("evil.Evil", "org/repo--evil.Evil"):
        for kind in ("qwen3", "evil"):
            for tokenizer in ("Qwen2Tokenizer", "EvilTokenizer"):
                write_files(
                    checkpoint,
                    config__json={**CONFIG, "model_type": kind, "auto_map": {"AutoConfig": place}},
                    tokenizer_config__json={
                        "tokenizer_class": tokenizer,
                        "auto_map": {"AutoTokenizer": [place, place]},
                    },
                    generation_config__json={"custom_generate": place, "auto_map": place},
                )
                # A model that transformers knows has a tokenizer of its own there.
                assert opens(checkpoint) == (kind == "qwen3")
    assert not ran.exists()


def test_a_process_without_torch_reads_the_same(checkpoint: Path) -> None:
    """Which is how a server reads it; here torch is imported already."""
    write_files(checkpoint, config__json={**CONFIG, "rope_scaling": YARN, "dtype": "bfloat16"})
    told = describe_model(checkpoint)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from minisrv.checkpoint import by_transformers\n"
        "print(by_transformers.describe_model(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(told)

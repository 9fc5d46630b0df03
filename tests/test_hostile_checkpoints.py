"""A checkpoint may come from a stranger: whatever its files hold, it is opened or refused by name,
and no code of it is run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minisrv.checkpoint import by_transformers, describe_model, open_checkpoint, weight_files
from minisrv.config import EngineConfig
from minisrv.errors import MinisrvError, ModelError, RequestError
from minisrv.nn.rope import inverse_frequencies
from minisrv.text import chat_template
from minisrv.text.tokenizer import Tokenizer
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
    """Silence transformers' log: it repeats what it finds wrong, lone surrogates included, and a
    worker process of pytest cannot send a log with one to the process that reports."""
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
    """Return whether the checkpoint is opened and not refused; any other outcome fails the test."""
    try:
        checkpoint = open_checkpoint(EngineConfig(model=str(directory)))
    except MinisrvError:
        return False
    checkpoint.save(directory / "saved")
    model = checkpoint.model.for_context(min(checkpoint.model.longest_context, 1 << 20))
    assert inverse_frequencies(model.rope, model.head_dim).isfinite().all()
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
    """Links to nothing, to themselves, to a device and to a pipe are refused, or ignored where the
    file is optional; none of them is waited for."""
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
    """A checkpoint's code is neither run nor asked about, be it in the checkpoint or on the hub."""
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
                # For a model type that transformers knows, it has a tokenizer class of its own.
                assert opens(checkpoint) == (kind == "qwen3")
    assert not ran.exists()


def test_a_process_without_torch_reads_the_same(checkpoint: Path) -> None:
    """A process that cannot import torch reads the same. A server reads checkpoints in one; here
    torch is imported already."""
    write_files(checkpoint, config__json={**CONFIG, "rope_scaling": YARN, "dtype": "bfloat16"})
    told = describe_model(checkpoint)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from minisrv.checkpoint import by_transformers\n"
        "by_transformers.bound()\n"
        "try: bytes(by_transformers.schema.MEMORY_BYTES)\n"
        "except MemoryError: print(by_transformers.describe_model(Path(sys.argv[1]), 'minisrv'))"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(told)


def test_a_process_that_takes_too_long_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = checkpoint / "python"
    script.write_text("#!/bin/sh\nkill -XCPU $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ModelError, match="took more than 30 s of processor time"):
        describe_model(checkpoint)


SECRET = "a secret"


@pytest.fixture
def secrets(tmp_path: Path, checkpoint: Path) -> Path:
    """Provide files beside the checkpoint that would be as good as its own."""
    directory = tmp_path / "secrets"
    shutil.copytree(checkpoint, directory)
    write_files(
        directory,
        chat_template__jinja=SECRET,
        added_tokens__json={},
        tool_use__jinja=SECRET,
        **{"tokenizer__4__0__json": (checkpoint / "tokenizer.json").read_text()},
    )
    return directory


@pytest.mark.parametrize("way", ["absolute", "relative", "by a folder"])
def test_a_small_file_that_leads_outside_is_refused(
    way: str, checkpoint: Path, secrets: Path
) -> None:
    place = {"absolute": str(secrets), "relative": "../secrets", "by a folder": "folder"}[way]
    if way == "by a folder":
        (checkpoint / "folder").symlink_to(secrets)
    names = ("config", "generation_config", "tokenizer", "tokenizer_config", "added_tokens")
    for name in (*(f"{name}.json" for name in names), "chat_template.jinja"):
        path, kept = checkpoint / name, checkpoint / "kept"
        (secrets / name).touch()
        if path.exists():
            path.rename(kept)
        path.symlink_to(f"{place}/{name}")
        with pytest.raises(
            ModelError, match=rf"{name} leads to .*outside of the checkpoint.* copy"
        ):
            open_checkpoint(EngineConfig(model=str(checkpoint)))
        path.unlink()
        if kept.exists():
            kept.rename(path)
    (checkpoint / "additional_chat_templates").symlink_to(place)
    assert not opens(checkpoint)
    (checkpoint / "additional_chat_templates").unlink()
    # Only its name tells that it is a tokenizer's file, until somebody reads it.
    (checkpoint / "merges.txt").symlink_to(f"{place}/chat_template.jinja")
    assert not opens(checkpoint)


def test_links_that_people_make_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    """Links that people make are followed: to weights that several checkpoints share, to files
    within the directory, and from the hub's cache to its blobs. The directory itself may be a
    link."""
    (checkpoint / "model.safetensors").rename(tmp_path / "weights")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "weights")
    (checkpoint / "config.json").rename(checkpoint / "config-v1.json")
    (checkpoint / "config.json").symlink_to("config-v1.json")
    assert opens(checkpoint)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(checkpoint.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert opens(snapshot)
    (tmp_path / "current").symlink_to(snapshot)
    assert opens(tmp_path / "current")
    (blobs / "0").unlink()
    (blobs / "0").symlink_to(tmp_path / "weights")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/0")
    assert not opens(snapshot)


@pytest.mark.parametrize("setting", ["vocab", "merges", "gguf_file", "fast_tokenizer_files", "x"])
def test_a_file_that_is_named_must_be_in_the_checkpoint(
    setting: str, checkpoint: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(secrets)
    name = "tokenizer.4.0.json"
    for named in (str(secrets / name), f"../secrets/{name}", f"./{name}", [f"../secrets/{name}"]):
        write_files(checkpoint, tokenizer_config__json={setting: named})
        with pytest.raises(ModelError, match=f"{setting} names .*, a file outside"):
            open_checkpoint(EngineConfig(model=str(checkpoint)))
    (checkpoint / "inner").symlink_to(secrets / name)
    write_files(checkpoint, tokenizer_config__json={setting: {"a": "inner"}})
    assert not opens(checkpoint)
    # This names the place where its author once had the file.
    write_files(checkpoint, tokenizer_config__json={"name_or_path": "/home/author/tokenizer.json"})
    assert opens(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_file_that_is_too_large_is_not_read(name: str, checkpoint: Path) -> None:
    with (checkpoint / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="has 1099511627776 bytes"):
        open_checkpoint(EngineConfig(model=str(checkpoint)))


@pytest.mark.parametrize("value", ["y" * 1_000_000, [[[[[["z" * 900]]]]]] * 900, 10**400])
def test_a_message_quotes_a_part(value: Any, checkpoint: Path) -> None:
    for field in ("architectures", "model_type", "layer_types", "vocab_size", "rope_parameters"):
        told = {"rope_type": value} if field == "rope_parameters" else value
        write_files(checkpoint, config__json={**CONFIG, field: told})
        with pytest.raises(MinisrvError) as caught:
            open_checkpoint(EngineConfig(model=str(checkpoint)))
        assert len(caught.value.message) < 1000


def test_a_token_id_that_is_too_high(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token id that is too high is refused, because code would go through a vocabulary up to it,
    id by id."""
    monkeypatch.setattr(by_transformers, "_MAX_TOKEN_ID", 100)
    with pytest.raises(ModelError, match="a token with the id 341; 100 is the most"):
        open_checkpoint(EngineConfig(model=str(checkpoint)))


DEEP_TEMPLATES = {
    "syntax": "{% if %}",
    "nested": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sums": "{{ " + "1+" * 3000 + "1 }}",
}


@pytest.mark.parametrize("template", DEEP_TEMPLATES.values(), ids=DEEP_TEMPLATES)
def test_a_template_that_is_none_is_told_before_anything_is_started(
    template: str, checkpoint: Path
) -> None:
    write_files(checkpoint, chat_template__jinja=template)
    config = EngineConfig(model=str(checkpoint))
    for _ in range(2):  # The second time the description comes from the cache.
        with pytest.raises(ModelError, match="chat template is not valid: .*--chat-template"):
            open_checkpoint(config)
    other = write_files(checkpoint, other="{{ messages }}") / "other"
    opened = open_checkpoint(replace(config, chat_template=other))
    assert opened.tokenizer.chat_templates == {"default": "{{ messages }}"}


TWICE = "{% set l = [1] %}" + "{% set l = [l, l] %}" * 40
ENDLESS = {
    "loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a recursive loop": TWICE
    + "{% for x in l recursive %}{{ loop(x) if x is iterable }}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a test": "{{ range(99999)|select('in', range(99999)|list)|list }}",
    "a filter": "{{ range(99999)|map('float')|list|length }}" * 60,
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end(
    template: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that does not end is refused at the start; if it spares short messages, the
    request with which it does not end is refused."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.02)
    write_files(checkpoint, chat_template__jinja=template)
    with pytest.raises(ModelError, match=r"takes more than 0\.02 s .*--chat-template"):
        open_checkpoint(EngineConfig(model=str(checkpoint)))
    spares = "{% if messages[0].content == 'go' %}" + template
    write_files(checkpoint, chat_template__jinja=spares + "{% endif %}{{ messages[0].content }}")
    opened = open_checkpoint(EngineConfig(model=str(checkpoint)))
    tokenizer = Tokenizer.from_description(opened.tokenizer)
    with pytest.raises(RequestError, match=r"takes more than 0\.02 s of processor time"):
        tokenizer.render_chat([{"role": "user", "content": "go"}])
    assert tokenizer.render_chat([{"role": "user", "content": "stay"}]) == "stay"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**9 }}", "too large"),
        ("{{ 10**9 * [1] }}", "too large"),
        ("{{ 7 ** (10**8) }}", "too large"),
        ("{{ range(9)|slice(10**9)|list }}", "number of slices is too large"),
        ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
        ("{% include '/etc/hostname' %}", "TypeError"),
        ("{% import '../x' as y %}", "TypeError"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception('x' * 100000) }}", "x{300}"),
    ],
)
def test_what_a_template_may_not_do(template: str, reason: str) -> None:
    made = chat_template.ChatTemplate({"default": template}, {})
    made.try_out()
    with pytest.raises(RequestError, match=reason) as caught:
        made.render([{"role": "user", "content": "x"}], True)
    assert len(caught.value.message) < 1000


def test_a_template_that_takes_too_much_memory() -> None:
    spares = "{% if messages[0].content == 'go' %}{{ 'a'|center(10**17) }}{% endif %}"
    made = chat_template.ChatTemplate({"default": spares}, {})
    made.try_out()
    with pytest.raises(RequestError, match="takes more memory"):
        made.render([{"role": "user", "content": "go"}], True)
    with pytest.raises(ModelError, match="takes more memory"):
        chat_template.ChatTemplate({"default": "{{ 'a'|center(10**17) }}"}, {}).try_out()

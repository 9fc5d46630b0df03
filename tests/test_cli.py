"""The command line: its flags are the fields of the settings, and a flag that does not exist gets a
hint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisrv import cli
from minisrv.cli import engine_config, main
from minisrv.compile.modes import CompilationMode
from minisrv.config import (
    BenchConfig,
    ChatConfig,
    EngineConfig,
    ServerConfig,
    TraceConfig,
    read_text,
)
from minisrv.engine.builder import dtype_name, resolve_dtype
from minisrv.engine.platforms import CPUPlatform
from minisrv.errors import ConfigError
from minisrv.flags import field_docs, flag_name
from minisrv.vllm_flags import FLAGS, why_not_here

COMMANDS = cli._parser()._subparsers._group_actions[0].choices


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run a command that must be refused by the parser, and return the lines it wrote: the usage
    first, then what is wrong."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is vLLM's, and not here: one"),
        (["m", "-tp", "2"], "-tp is vLLM's, and not here: one engine serves from one GPU"),
        (["--trust-remote-code"], "code of a checkpoint is never run"),
        (["-cc.mode=3"], "-cc.mode is vLLM's, and not here: compilation is set by"),
        (["--compilation-config", "{}"], "--cudagraph-mode"),
        (["--compilation-config.cudagraph_mode=FULL"], "--cudagraph-mode"),
        (["--no-enable-chunked-prefill"], "prompts are always computed in chunks"),
        (["--enable_chunked_prefill=True"], "prompts are always computed in chunks"),
        (["--data-parallel-size-local", "2"], "one engine serves from one GPU"),
        (["--kv-cache-memory-bytes", "9"], "it is called --kv-cache-memory here."),
        (["--max_model_len", "9"], "--max_model_len is spelled --max-model-len here."),
        (["--gpu-mem-util", "0.5"], "did you mean --gpu-memory-utilization?"),
        (["--max-num", "9"], "did you mean --max-num-seqs or --max-num-batched-tokens?"),
        (["--no-enforce-eager"], "--enforce-eager is off unless it is given; leave both out."),
        (["--no-port"], "there is no --no-port; did you mean --port?"),
        (["--served"], "did you mean --served-model-name?"),
        (["--max-m", "9"], "did you mean --max-model-len?"),
        (["--measure"], "--measure is a flag of plan, ladder, not of this command."),
        (["--rounds", "9"], "--rounds is a flag of bench, launch-cost, not of this command."),
        (["--frobnicate"], "there is no --frobnicate; see --help."),
        (["model", "another"], "nothing takes 'another'"),
        (["--cudagraph-capture-sizes", "1,x"], "'1,x' is no size; write 1 2 4,8"),
        (["--max-model-len", "-1"], "'-1' is no length; write 4096, 4K or auto"),
        (["--max-model-len", "4.x"], "'4.x' is no length; write 4096, 4K or auto"),
        (["--kv-cache-memory", "much"], "'much' is no size; write 500M or 2G"),
    ],
)
def test_what_is_no_flag(capsys: pytest.CaptureFixture[str], given: list[str], hint: str) -> None:
    usage, *_, last = refused(capsys, "serve", *given)
    assert usage.startswith("usage: minisrv serve ")
    assert last.startswith("minisrv serve: error: ")
    assert hint in last


def test_every_flag_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "bench", "--port", "1", "--swap-space", "4", "--rund", "2")
    assert lines[0].startswith("usage: minisrv bench ")
    assert "--port is a flag of serve" in lines[-3]
    assert "--swap-space is vLLM's" in lines[-2]
    assert "did you mean --rounds?" in lines[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_of_ours_is_said_to_be_missing(command: str) -> None:
    names = COMMANDS[command]._option_string_actions
    assert not names.keys() & FLAGS
    assert not [name for name in names if why_not_here(name)]


def test_reasons_are_sentences() -> None:
    for flag in FLAGS:
        reason = why_not_here(flag)
        assert reason is not None
        assert reason.endswith("."), flag


def test_reasons_name_flags_that_exist() -> None:
    ours = set(COMMANDS["serve"].flags)
    for flag in FLAGS:
        words = str(why_not_here(flag)).replace(";", " ").replace(",", " ").split()
        named = {word.rstrip(".:") for word in words if word.startswith("--")}
        assert named <= ours, flag


def test_docstrings_may_be_dropped() -> None:
    """The command works without docstrings, as PYTHONOPTIMIZE=2, which some containers set, drops
    them; the help of flags is shorter then."""
    command = [sys.executable, "-OO", "-m", "minisrv.cli", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-num-seqs" in done.stdout


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        (EngineConfig, "serve"),
        (ServerConfig, "serve"),
        (BenchConfig, "bench"),
        (ChatConfig, "chat"),
        (TraceConfig, "trace"),
    ],
)
def test_every_setting_is_documented_and_a_flag(kind: type, command: str) -> None:
    names = [field.name for field in fields(kind)]
    assert set(field_docs(kind)) == set(names)
    actions = {action.dest: action for action in COMMANDS[command]._actions}
    for name in names:
        assert actions[name].help
        assert actions[name].default is None
        assert "None" not in actions[name].help


def test_flags_become_settings() -> None:
    given = ["m", "--max-num-seqs", "8", "--kv-cache-memory", "2G", "--no-async-scheduling"]
    given += ["--cudagraph-capture-sizes", "1", "2,4", "8", "--enforce-eager", "--dtype", "half"]
    given += ["--compilation-mode", "vllm_compile", "-O2", "--compile-wait"]
    assert engine_config(given) == EngineConfig(
        model="m",
        max_num_seqs=8,
        kv_cache_memory=2 << 30,
        async_scheduling=False,
        cudagraph_capture_sizes=(1, 2, 4, 8),
        enforce_eager=True,
        dtype="half",
        compilation_mode=CompilationMode.MINISRV_COMPILE,
        optimization_level=2,
        compile_wait=True,
    )
    for level in (["-O1"], ["-O", "1"], ["-O=1"], ["--optimization-level", "1"]):
        assert engine_config(level).optimization_level == 1
    assert engine_config([]) == EngineConfig()
    assert engine_config(["--model", "m"]) == EngineConfig(model="m")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("4k", 4000), ("4K", 4096), ("25.6k", 25600), ("auto", None)],
)
def test_a_context_is_given_as_for_vllm(text: str, tokens: int | None) -> None:
    assert engine_config(["--max-model-len", text]).max_model_len == tokens


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("float", "float32")])
def test_dtypes_have_two_names(name: str, dtype: str) -> None:
    config, model = EngineConfig(dtype=name), SimpleNamespace(dtype="bfloat16")
    resolved = resolve_dtype(config, model, CPUPlatform())
    assert resolved is getattr(torch, dtype)
    assert dtype_name(resolved) == dtype


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS = [
    (command, kind, setting.name)
    for command, kind in (
        ("serve", EngineConfig),
        ("serve", ServerConfig),
        ("bench", BenchConfig),
        ("chat", ChatConfig),
    )
    for setting in fields(kind)
    if {"int", "float"} & set(re.findall(r"\w+", str(setting.type)))
]
HUGE = ("1" + 20 * "0", "1" + 40 * "0", "9" * 5000, "1e300", "inf", "Infinity")
BELOW = ("-1", "-1" + 20 * "0", "-inf", "nan", "-1e300")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return the exit status of a command, and the last line of its stderr."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(ended.code)
    return status, capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object) -> int:
        raise AssertionError("it was not refused")

    for place in ("server.launcher.serve", "tools.bench.bench", "chat.terminal.Terminal"):
        monkeypatch.setattr(f"minisrv.{place}", started)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(("command", "kind", "name"), NUMBERS)
def test_numbers_out_of_bounds(
    command: str, kind: type, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number has a lower and an upper bound, and a value outside of them is refused at once,
    by name."""
    for value in (*HUGE, *BELOW):
        if (name, value) == ("seed", "-1"):
            continue
        status, said = answer(capsys, command, f"{flag_name(name)}={value}")
        assert status in (1, 2), value
        assert name in said or flag_name(name) in said, value
        assert ": error: " in said


@pytest.mark.parametrize(("command", "kind", "name"), NUMBERS)
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 10**400, -(10**400), "8", True],
    ids=["nan", "inf", "huge", "low", "text", "bool"],
)
def test_settings_that_are_no_numbers(command: str, kind: type, name: str, value: object) -> None:
    """Values of such types can come from Python code that makes the settings."""
    given = (value,) if str(kind.__dataclass_fields__[name].type).startswith("tuple") else value
    with pytest.raises(ConfigError, match=name):
        kind(**{name: given})


@pytest.mark.parametrize("text", ["9" * 400 + "k", "1" * 16 + "K"], ids=["400", "16"])
def test_a_length_too_long_to_be_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no length" in refused(capsys, "plan", "--max-model-len", text)[-1]


def test_a_graph_larger_than_any_step(capsys: pytest.CaptureFixture[str]) -> None:
    """A capture size beyond any step is refused. It took all memory, because the first size that
    holds a full batch is captured."""
    status, said = answer(capsys, "plan", "--cudagraph-capture-sizes", "1", "999999")
    assert status == 1
    assert "cudagraph_capture_sizes name 999999" in said
    assert "max_num_batched_tokens=512" in said


def test_a_file_that_a_flag_names_is_read_within_bounds(tmp_path: Path) -> None:
    pipe, keys = tmp_path / "pipe", "first\nsecond\n"
    os.mkfifo(pipe)  # The shell's <(...) is such a pipe.
    thread = threading.Thread(target=pipe.write_text, args=(keys,))
    thread.start()
    assert read_text("--api-key-file", pipe) == keys
    thread.join()
    with pytest.raises(ConfigError, match="--api-key-file /dev/zero cannot be read: it has more"):
        read_text("--api-key-file", Path("/dev/zero"))
    with pytest.raises(ConfigError, match="/nowhere cannot be read: .*No such file"):
        read_text("--chat-template", Path("/nowhere"))


def test_a_compilation_that_is_interrupted_is_an_error(monkeypatch, capsys):
    def interrupt(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minisrv.tools.compile.build_engine", interrupt)
    assert main(["compile"]) == 1
    assert (
        "minisrv: error: interrupted: the model has not been compiled." in capsys.readouterr().err
    )

"""The modes of compilation: how they are named, what a kind of device serves, and what is chosen
where nothing is asked for."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from minisrv import machine
from minisrv.compile.modes import CompilationMode
from minisrv.compile.toolchain import choose_cxx
from minisrv.config import EngineConfig
from minisrv.device_kind import CPU, CUDA, DeviceKind, choose_compilation
from minisrv.errors import CompilationError, ConfigError
from minisrv.machine import missing_to_compile
from minisrv.modes import CUDAGraphMode
from minisrv.tools.plan import print_modes

OFF, STOCK, ONCE, PIECES = CompilationMode
NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
MOST = CUDAGraphMode.FULL_AND_PIECEWISE
ALL = set(CUDAGraphMode)
SERVED = {
    ("cpu", OFF): ALL - {FULL},
    ("cpu", STOCK): {NONE},
    ("cpu", ONCE): {NONE},
    ("cpu", PIECES): ALL - {FULL},
    ("cuda", OFF): ALL,
    ("cuda", STOCK): ALL,
    ("cuda", ONCE): ALL,
    ("cuda", PIECES): ALL,
}
"""The modes of graphs that each kind of device serves each compilation mode with."""
KINDS = {"cpu": CPU, "cuda": CUDA}


@pytest.mark.parametrize("mode", CompilationMode)
def test_a_mode_has_a_number_and_a_name(mode: CompilationMode) -> None:
    name = mode.name
    for text in (int(mode), str(int(mode)), name, name.lower(), name.title().replace("_", "-")):
        assert CompilationMode.parse(text) is mode


def test_the_last_mode_has_two_names_and_there_is_no_other() -> None:
    assert CompilationMode.parse("VLLM_compile") is PIECES
    for text in ("4", -1, "", "O3", "inductor", True):
        with pytest.raises(ConfigError, match=r"none of: 0 \(NONE\), 1 \(STOCK_TORCH_COMPILE\), 2"):
            CompilationMode.parse(text)


@pytest.mark.parametrize(
    ("device", "mode", "graphs"), [*product(KINDS, CompilationMode, CUDAGraphMode)]
)
def test_every_pair_of_modes_is_served_or_refused_by_name(
    device: str, mode: CompilationMode, graphs: CUDAGraphMode
) -> None:
    kind, config = KINDS[device], EngineConfig(compilation_mode=mode, cudagraph_mode=graphs)
    if graphs in SERVED[device, mode]:
        resolved = kind.resolve(config)
        assert (resolved.compilation_mode, resolved.cudagraph_mode) == (mode, graphs)
        assert kind.resolve(resolved) == resolved
        return
    with pytest.raises(ConfigError) as refused:
        kind.resolve(config)
    names = [f"compilation_mode={mode.name}", f"cudagraph_mode={graphs.value}"]
    assert any(name in refused.value.message for name in names)
    assert f"device={device}" in refused.value.message
    assert "; use " in refused.value.message
    eager = kind.resolve(replace(config, enforce_eager=True))
    assert (eager.compilation_mode, eager.cudagraph_mode) == (OFF, NONE)


def test_plan_prints_every_pair(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_modes(ONCE, "as asked for")
    first, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("Compilation 2 DYNAMO_TRACE_ONCE: as asked for.")
    printed = {}
    for row in rows:
        device, mode, graphs = re.split(r"\s{2,}", row.strip())
        names = [] if graphs == "not served" else graphs.split(", ")
        printed[device, CompilationMode.parse(mode.split()[0])] = {*map(CUDAGraphMode.parse, names)}
    assert printed == SERVED


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        ({}, CPU, (None, MOST)),
        ({}, CUDA, (None, FULL)),
        ({"compilation_mode": STOCK}, CPU, (STOCK, NONE)),
        ({"compilation_mode": STOCK}, CUDA, (STOCK, FULL)),
        ({"optimization_level": 0}, CPU, (OFF, NONE)),
        ({"optimization_level": 0}, CUDA, (OFF, NONE)),
        ({"optimization_level": 0, "cudagraph_mode": PIECEWISE}, CPU, (OFF, PIECEWISE)),
        ({"optimization_level": 0, "compilation_mode": ONCE}, CPU, (ONCE, NONE)),
        ({"optimization_level": 1}, CPU, (PIECES, PIECEWISE)),
        ({"optimization_level": 2}, CPU, (PIECES, MOST)),
        ({"optimization_level": 3}, CPU, (PIECES, MOST)),
        ({"optimization_level": 1}, CUDA, (PIECES, PIECEWISE)),
        ({"optimization_level": 3}, CUDA, (PIECES, FULL)),
        ({"optimization_level": 3, "cudagraph_mode": NONE}, CPU, (PIECES, NONE)),
        ({"optimization_level": 1, "compilation_mode": OFF}, CUDA, (OFF, PIECEWISE)),
        ({"optimization_level": 3, "compilation_mode": OFF}, CUDA, (OFF, FULL)),
        ({"optimization_level": 3, "enforce_eager": True}, CUDA, (OFF, NONE)),
    ],
)
def test_a_level_stands_for_modes_and_a_mode_goes_before_it(
    given: dict[str, Any],
    kind: DeviceKind,
    expected: tuple[CompilationMode | None, CUDAGraphMode],
) -> None:
    resolved = kind.resolve(EngineConfig(**given))
    assert (resolved.compilation_mode, resolved.cudagraph_mode) == expected


@pytest.mark.parametrize(
    ("given", "implementation", "missing", "mode", "why"),
    [
        ({}, "minisrv", None, OFF, "this code of minisrv's is fused by hand"),
        ({}, "transformers", None, PIECES, "the default for transformers' code"),
        ({}, "transformers", "C++ compiler", OFF, "there is no C++ compiler"),
        ({"compilation_mode": PIECES}, "minisrv", "C++ compiler", PIECES, "as asked for"),
        ({"compilation_mode": STOCK}, "minisrv", None, STOCK, "as asked for"),
        ({"compilation_mode": 2, "enforce_eager": True}, "minisrv", "all", OFF, "enforce_eager"),
    ],
)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_mode_is_chosen_for_a_reason(
    given: dict[str, Any],
    implementation: str,
    missing: str | None,
    mode: CompilationMode,
    why: str,
    kind: DeviceKind,
) -> None:
    config = kind.resolve(EngineConfig(**given))
    assert choose_compilation(config, implementation, missing=missing) == (mode, why)


def test_what_needs_a_compiler_is_refused_without_one() -> None:
    config = EngineConfig(compilation_mode=ONCE)
    with pytest.raises(ConfigError, match=r"DYNAMO_TRACE_ONCE compiles C\+\+ here.*install g\+\+"):
        choose_compilation(CPU.resolve(config), "minisrv", missing="C++ compiler")
    # Triton compiles what a GPU runs.
    chosen = choose_compilation(CUDA.resolve(config), "minisrv", missing="C++ compiler")
    assert chosen == (ONCE, "as asked for")


def test_a_machine_says_what_it_cannot_compile_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CXX_CANDIDATES", ("no-such-compiler",))
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert missing_to_compile("cpu") == missing_to_compile("cuda") == "C++ compiler"
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert missing_to_compile("cpu") is None
    assert missing_to_compile("cuda") == "CUDA toolkit with its headers"
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").touch()
    assert missing_to_compile("cuda") is None


def test_a_compiler_that_would_compile_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose compiler is called c++, or has a CXX that does not exist beside its g++, was
    said to have none, though the process that compiles would have found it. One that lies in the
    working directory was said to be there, and would not have been used."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor name in "$@"; do :; done\necho libstdc++.so > "$name"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(machine, "CXX_CANDIDATES", ("g++", "c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for named in ("", "no-such-compiler", "'"):
        monkeypatch.setenv("CXX", named)
        assert missing_to_compile("cpu") is None
        assert choose_cxx() == str(compiler)
    monkeypatch.setenv("CXX", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ":/nowhere")
    assert missing_to_compile("cpu") == "C++ compiler"
    with pytest.raises(CompilationError):
        choose_cxx()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_num_batched_tokens": 2, "max_num_seqs": 1}, "needs steps of 3 tokens; raise"),
        ({"simulate_launch_us": 10.0}, "simulate_launch_us .* leave one of the two out"),
    ],
)
@pytest.mark.parametrize("mode", [STOCK, ONCE])
def test_settings_with_which_no_whole_model_is_compiled(
    mode: CompilationMode, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        CPU.resolve(EngineConfig(compilation_mode=mode, **given))
    CPU.resolve(EngineConfig(compilation_mode=OFF, **given))

"""Mode 3 from the settings to the tokens: an engine compiles its model in another process and
serves by it, and the next start finds what was compiled."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minisrv import LLM, SamplingParams
from minisrv.cli import main
from minisrv.compile import artifacts
from minisrv.compile.modes import CompilationMode
from minisrv.compile.pieces import PieceCompiler
from minisrv.compile.values import Description
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.compilation import timed_steps
from minisrv.engine.memory import MemoryPlan
from minisrv.engine.messages import CompilationState
from minisrv.engine.platforms import CPUPlatform
from minisrv.errors import CompilationError, ConfigError
from tests.checkpoints import make_checkpoint
from tests.compile.test_worker import with_another_library
from tests.nn.test_logits import prompt

PROMPTS = [{"prompt_token_ids": prompt(length, length)} for length in (3, 20, 1, 9)]
PLAN_MEMORY = CPUPlatform.plan_memory
LIMITS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "num_kv_blocks": 33,
    "device": "cpu",
    "dtype": "float32",
    "model_impl": "transformers",
}

FLAGS = [
    word for name, value in LIMITS.items() for word in (f"--{name.replace('_', '-')}", str(value))
]


def tokens(llm: LLM) -> tuple[list[list[int]], set[str]]:
    """Return the tokens of each prompt, and the modes in which their steps ran."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    modes = {mode for output in outputs for mode in output.outputs[0].graph_steps}
    return [[*output.outputs[0].token_ids] for output in outputs], modes


@pytest.mark.compiler
def test_what_is_compiled_serves_now_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A model of this size is not surely faster compiled.
    monkeypatch.setattr("minisrv.engine.compilation.LEAST_SPEEDUP", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    planned: list[int] = []

    def plan_memory(*given: Any) -> MemoryPlan:
        planned.append(given[5])
        return PLAN_MEMORY(*given)

    monkeypatch.setattr(CPUPlatform, "plan_memory", plan_memory)
    checkpoint = str(make_checkpoint(tmp_path / "model", "llama"))
    expected, own = tokens(LLM(checkpoint, compilation_mode=0, **LIMITS))

    llm = LLM(checkpoint, compile_wait=True, **LIMITS)
    report = llm.engine.info.compilation
    assert (report.state, report.generation) == (CompilationState.COMPILED, 1), report.reason
    said = "compilation MINISRV_COMPILE (the default for transformers' code)"
    assert said in llm.engine.info.summary
    found, modes = tokens(llm)
    assert found == expected
    assert modes == {f"{mode}/compiled" for mode in own}

    def compile_again(*_: Any) -> Any:
        raise AssertionError("a restart compiles nothing")

    monkeypatch.setattr("minisrv.compile.pieces.CompileProcess", compile_again)
    assert main(["compile", checkpoint, *FLAGS]) == 0
    told = capsys.readouterr().out
    assert re.match(
        r"compiled code would serve \(load \S+ s, certify \S+ s\)\. It is kept in", told
    )
    again = LLM(checkpoint, **LIMITS)
    assert again.engine.info.compilation.state is CompilationState.COMPILED
    assert tokens(again) == (expected, modes)
    # Only a start that compiles has graphs of both codes.
    assert planned == [1, 2, 1, 1]

    # Two engines die of a package, as one may have been killed; what is left of the program is
    # not compiled.
    [description] = (tmp_path / "cache").rglob(artifacts.PROGRAM)
    whole = description.read_bytes()
    crash(description.parent, tmp_path)
    for _ in range(artifacts.MOST_DEATHS):
        ended = subprocess.run([sys.executable, "-c", START, checkpoint, repr(LIMITS)], cwd=ROOT)
        assert ended.returncode == -signal.SIGABRT
    crashed = LLM(checkpoint, **LIMITS)
    report = crashed.engine.info.compilation
    assert report.refusals == {"load": 1}
    assert "2 engines have ended while they tried the package" in report.reason
    assert tokens(crashed) == (expected, own)
    assert planned[4:] == [1]

    # A damaged program is compiled again, unless an earlier start has found it too slow.
    description.write_bytes(whole[:-1])
    [aside] = (tmp_path / "cache").rglob("*.crashed")
    aside.unlink()
    monkeypatch.setattr(PieceCompiler, "start", refuse_to_start)
    LLM(checkpoint, **LIMITS)
    monkeypatch.setattr("minisrv.engine.compilation.LEAST_SPEEDUP", 1.02)
    slow = artifacts.Slowness(timed_steps(llm.engine.runner.ladders), 0.9)
    artifacts.write_slowness(description.parent, slow)
    known = LLM(checkpoint, **LIMITS)
    assert known.engine.info.compilation.refusals == {"slower": 1}
    waited = LLM(checkpoint, compile_wait=True, **LIMITS)
    assert waited.engine.info.compilation.refusals == {"compile": 1}
    assert planned[5:] == [2, 1, 2]


ROOT = Path(__file__).parents[2]

START = """
import ast, sys
from minisrv import LLM
LLM(sys.argv[1], **ast.literal_eval(sys.argv[2]))
"""


def crash(directory: Path, scratch: Path) -> None:
    """Have a program name a package that ends the process which loads it."""
    described = msgspec.msgpack.decode(artifacts.read_description(directory), type=Description)
    first, *others = described.pieces
    package = with_another_library(artifacts.read_package(first.key), scratch)
    digest = artifacts.write_package(first.key, package)
    changed = msgspec.structs.replace(
        described, pieces=[msgspec.structs.replace(first, digest=digest), *others]
    )
    artifacts.write_description(directory, msgspec.msgpack.encode(changed))


def refuse_to_start(compiler: PieceCompiler) -> Any:
    raise CompilationError("that is enough.")


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE])
def test_code_that_is_measured_beside_the_models_own_has_memory_for_both(
    mode: CompilationMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`minisrv bench` captures the graphs of a model's own code too, for which a GPU had left no
    memory where the model was compiled as a whole."""

    def plan_memory(*given: Any) -> MemoryPlan:
        assert given[5] == (1 if mode is CompilationMode.NONE else 2)
        raise ConfigError("that is enough.")

    monkeypatch.setattr(CPUPlatform, "plan_memory", plan_memory)
    checkpoint = str(make_checkpoint(tmp_path, "llama"))
    with pytest.raises(ConfigError, match="that is enough"):
        build_engine(EngineConfig(checkpoint, compilation_mode=mode, **LIMITS), serve_slower=True)


def test_only_what_is_compiled_in_pieces_is_compiled_ahead(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags in (["--compilation-mode", "2"], ["--enforce-eager"]):
        assert main(["compile", *flags]) == 1
        assert "leave out --compilation-mode and --enforce-eager" in capsys.readouterr().err


def test_code_is_compiled_ahead_for_as_many_threads_as_a_server_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of threads is part of the key, so with another number the server would compile
    again."""
    left_free: list[int] = []
    monkeypatch.setattr("minisrv.threads.limit", lambda beside=0: left_free.append(beside))
    monkeypatch.setattr("minisrv.tools.compile.build_engine", lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        main(["compile"])
    assert left_free == [1]

"""Triton's kernels are compiled ahead: those that launches ask for, and a start is right without
them."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from minisrv.checkpoint import describe_model
from minisrv.config import EngineConfig
from minisrv.core.ladder import ladders_of
from minisrv.device_kind import CUDA
from minisrv.engine import kernel_process, kernels
from minisrv.engine.builder import EngineParts, build_engine
from minisrv.engine.kernel_process import KernelProcess, lists_directory, start_early
from minisrv.engine.kernels import Compiled, KernelJob, compiled_kernels, compiled_meanwhile
from minisrv.engine.platforms import CUDAPlatform
from minisrv.kernels.gpu import GPU
from minisrv.progress import StartupProgress
from minisrv.tools import compile as compile_tool
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
"""Linux's numbers of the call and the capability by which root loses its right to write to files
whose mode forbids it."""


def obey_modes() -> None:
    """Let the program that is executed next obey the modes of files, also as root."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what was logged, without what is only told."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def run(script: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this directory, in which Triton compiles."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name(script), *arguments]
    return subprocess.run(
        command, env=env, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=obey_modes
    )


@pytest.mark.parametrize(
    ("implementation", "mode"),
    [("minisrv", "full"), ("minisrv", "piecewise"), ("transformers", "full")],
)
def test_the_kernels_that_are_rehearsed_are_those_that_launches_ask_for(
    implementation: str, mode: str, tmp_path: Path
) -> None:
    """The keys in Triton's cache say so, which depend on types, constants, alignments, launch
    options and the GPU."""
    checkpoint = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    rehearsed, made = (
        set(json.loads(run("launches.py", what, checkpoint, implementation, mode).stdout))
        for what in ("rehearsed", "made")
    )
    assert made
    assert made <= rehearsed
    if mode == "full":  # where rows are not padded, a step of more rows is rehearsed too
        assert made == rehearsed


def test_the_kernels_of_a_program_are_known_before_its_first_step(tmp_path: Path) -> None:
    """Other processes compile them before requests would wait for that: those that the program asks
    for between its pieces, and those that it asks for within them, which were not known once, so
    that one turn took a quarter of a second. The product of the first layer, whose argument the
    compiler norms, is here so wide that no other one is computed by its kernel."""
    wide = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3", dtype=torch.bfloat16, **wide)
    program = tmp_path / "program"
    program.mkdir()
    how = checkpoint, "transformers", "full", program
    made, rehearsed = (
        set(json.loads(run("launches.py", what, *how, XDG_CACHE_HOME=str(tmp_path)).stdout))
        for what in ("made", "rehearsed")
    )
    assert made
    assert made == rehearsed


def start(checkpoint: Path, caches: Path) -> list[str]:
    """Start an engine whose caches are in a directory, and return what it logs."""
    variables = {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "XDG_CACHE_HOME": str(caches / "xdg"),
        "TMPDIR": str(caches / "tmp"),
    }
    return run("compile_kernels.py", checkpoint, **variables).stdout.splitlines()


@pytest.fixture(scope="module")
def first_start(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The caches behind a start on a machine that has compiled nothing, and what it logged."""
    caches = tmp_path_factory.mktemp("caches")
    (caches / "tmp").mkdir()
    return caches, start(checkpoint, caches)


@pytest.fixture
def caches(first_start: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the caches that the first start left."""
    return Path(shutil.copytree(first_start[0], tmp_path / "caches"))


def test_a_second_start_compiles_nothing_and_a_damaged_kernel_again(
    checkpoint: Path, first_start: tuple[Path, list[str]], caches: Path
) -> None:
    [first] = first_start[1]
    assert first.startswith("compiled ")
    in_place = [f"the kernels are in {caches / 'triton'}"]
    assert start(checkpoint, caches) == in_place
    damaged = next(caches.rglob("*.cubin"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:10])
    assert start(checkpoint, caches)[0].startswith("compiled ")
    assert damaged.read_bytes() == whole
    assert start(checkpoint, caches) == in_place


def test_a_cache_that_is_read_only_is_used_and_others_than_its_kernels_are_compiled(
    checkpoint: Path, caches: Path
) -> None:
    cache = caches / "triton"

    def set_mode(mode: int) -> None:
        for directory in (cache, *cache.iterdir()):
            directory.chmod(mode)

    [unlisted] = cache.rglob("unlisted.cubin")
    shutil.rmtree(unlisted.parent)
    before = sorted(cache.rglob("*"))
    set_mode(0o500)
    try:
        assert start(checkpoint, caches) == [f"the kernels are in {cache}"]
        next(cache.rglob("*.cubin")).write_bytes(b"cut off")
        warning, done = start(checkpoint, caches)
    finally:
        set_mode(0o700)
    assert warning.startswith(f"kernels cannot be kept in {cache}")
    assert done.startswith("compiled ")
    assert sorted(cache.rglob("*")) == before
    assert not list((caches / "tmp").iterdir())


def job_of(directory: Path, **changes: Any) -> KernelJob:
    config = CUDA.resolve(EngineConfig(device="cuda", max_num_seqs=1, max_num_batched_tokens=8))
    job = {
        "model": describe_model(directory, "minisrv").model,
        "directory": directory,
        "dtype": "bfloat16",
        "quantization": None,
        "ladders": ladders_of(config),
        "block_size": 16,
        "gpu": GPU((9, 0), 132),
    }
    return KernelJob(**{**job, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for the cache of Triton."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "triton"


def test_a_start_goes_on_where_nothing_can_be_compiled(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next start tries again."""
    ran = 0
    for _ in range(2):
        with compiled_kernels(job_of(checkpoint, dtype="no dtype"), lambda done, total: None):
            ran += 1
    assert ran == 2
    warned = warnings(caplog)
    assert len(warned) == 2
    for record in warned:
        assert "are when they first run" in record.message
        assert "no dtype" in record.message


def test_kernels_are_compiled_while_an_engine_serves(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on meanwhile, also while the process ends, and is told of a failure. A CPU
    needs no process."""
    close = KernelProcess.close

    def close_at_once(process: KernelProcess) -> None:
        assert process._process.exit_status is not None, "requests would wait for its end"
        close(process)

    monkeypatch.setattr(KernelProcess, "close", close_at_once)
    whys: list[str] = []

    def turns() -> Iterator[None]:
        whys.append((yield from compiled_meanwhile(job_of(checkpoint, dtype="no dtype"))))

    for _ in turns():
        time.sleep(0.01)
    [why] = whys
    assert "no dtype" in why
    assert len(warnings(caplog)) == 1
    assert list(compiled_meanwhile(job_of(checkpoint, gpu=None))) == []


def test_the_death_of_the_process_is_told(checkpoint: Path, tmp_path: Path) -> None:
    process = KernelProcess()
    try:
        process.compile(job_of(checkpoint), tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        assert "ended by SIGKILL" in str(process.wait(lambda done, total: None))
    finally:
        process.close()


def test_nothing_is_waited_for_longer_than_the_timeout(checkpoint: Path, tmp_path: Path) -> None:
    process = KernelProcess(timeout=0.0)
    try:
        process.compile(job_of(checkpoint), tmp_path)
        assert process.wait(lambda done, total: None) == "it took longer than 0 s"
    finally:
        process.close()


FILES = {"key/kernel.cubin": 3, "key/kernel.json": 2}


class Ready:
    """Stands for a process that has compiled everything, or nothing."""

    made: Compiled | str = Compiled(FILES, 3, [], [], 1.5, 2)
    closed = 0

    def compile(self, job: KernelJob, cache: Path) -> None:
        self.job = job

    def wait(self, progress: kernels.Progress) -> Compiled | str:
        return self.made

    def close(self) -> None:
        type(self).closed += 1


def test_what_was_compiled_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "KernelProcess", Ready)
    with (
        caplog.at_level(logging.INFO, logger="minisrv"),
        compiled_kernels(job_of(checkpoint), lambda done, total: None),
    ):
        pass
    assert [record.message for record in caplog.records] == [
        "compiled 3 kernels in 1.5 s by 2 processes"
    ]


def test_a_process_that_was_started_early_is_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends also if nothing is to be compiled, and if that cannot be found out."""
    for made, listed in ((Ready.made, False), (Ready.made, True), ("of no use", False)):
        early = KernelProcess()
        monkeypatch.setattr(early, "wait", lambda progress, made=made: made)
        monkeypatch.setattr(kernels, "_listed", lambda path, listed=listed: {} if listed else None)
        monkeypatch.setattr(kernels, "KernelProcess", None)
        with compiled_kernels(job_of(checkpoint), lambda done, total: None, early):
            pass
        with pytest.raises(ProcessLookupError):
            os.kill(early.pid, 0)
    [record] = warnings(caplog)
    assert record.message.endswith("of no use")


def test_a_process_is_started_early_on_a_machine_that_has_compiled_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_process, "KernelProcess", Ready)
    config = EngineConfig(str(checkpoint))
    monkeypatch.setattr(kernel_process, "has_driver", lambda: False)
    assert start_early(config) is None
    monkeypatch.setattr(kernel_process, "has_driver", lambda: True)
    assert start_early(replace(config, device="cpu")) is None
    assert start_early(config) is not None
    (lists_directory() / "a-list.msgpack").touch()
    assert start_early(config) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert start_early(config) is None


@pytest.mark.parametrize(
    "compiled",
    [
        Compiled(FILES, 3, [], ["RuntimeError: no ptxas"], 1.5, 2),
        Compiled({}, 0, ["RuntimeError: no ptxas"], [], 1.5, 2),
    ],
    ids=["some failed", "none is known"],
)
def test_a_kernel_that_could_not_be_compiled_is_tried_again_at_the_next_start(
    compiled: Compiled,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Ready):
        made = compiled

    monkeypatch.setattr(kernels, "KernelProcess", Broken)
    for _ in range(2):
        with compiled_kernels(job_of(checkpoint), lambda done, total: None):
            pass
    warned = [record.message for record in warnings(caplog)]
    assert len(warned) == 2
    assert all(message.endswith("RuntimeError: no ptxas") for message in warned)


def test_a_launch_that_cannot_be_rehearsed_is_told_once(
    checkpoint: Path,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next start would find out the same, and be late by it."""

    class Partial(Ready):
        made = Compiled({"key/kernel.json": 2}, 3, ["RuntimeError: no values here"], [], 1.5, 2)

    monkeypatch.setattr(kernels, "KernelProcess", Partial)
    (empty_cache / "key").mkdir(parents=True)
    (empty_cache / "key/kernel.json").write_text("{}")
    for _ in range(2):
        with compiled_kernels(job_of(checkpoint), lambda done, total: None):
            pass
    [record] = warnings(caplog)
    assert record.message.endswith("RuntimeError: no values here")


def test_an_error_while_weights_load_ends_the_process(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unwanted(Ready):
        closed = 0

        def wait(self, progress: kernels.Progress) -> Compiled | str:
            raise AssertionError("nobody needs the kernels any more")

    monkeypatch.setattr(kernels, "KernelProcess", Unwanted)
    with (
        pytest.raises(MemoryError),
        compiled_kernels(job_of(checkpoint), lambda done, total: None),
    ):
        raise MemoryError
    assert Unwanted.closed == 1


def test_a_cache_that_cannot_be_written_is_replaced_for_this_start(
    checkpoint: Path,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    empty_cache.write_text("a file where the directory should be")
    monkeypatch.setattr(kernels, "KernelProcess", Ready)
    with compiled_kernels(job_of(checkpoint), lambda done, total: None):
        pass
    used = Path(os.environ["TRITON_CACHE_DIR"])
    assert used != empty_cache
    assert used.is_dir()
    [record] = warnings(caplog)
    assert record.message.startswith(f"kernels cannot be kept in {empty_cache}")


def test_a_kernel_that_another_server_compiles_loses_none_of_its_files(
    checkpoint: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a damaged kernel only the list of its files is removed, without which Triton compiles it
    again."""
    monkeypatch.setattr(kernels, "KernelProcess", Ready)
    kernel = empty_cache / "key"
    kernel.mkdir(parents=True)
    (kernel / "__grp__kernel.json").write_text("{}")
    (kernel / "kernel.json").write_text("{}")
    (kernel / "kernel.cubin").write_bytes(b"abc")
    with compiled_kernels(job_of(checkpoint), lambda done, total: None):
        pass
    (kernel / "kernel.json").unlink()
    with compiled_kernels(job_of(checkpoint), lambda done, total: None):
        assert [path.name for path in kernel.iterdir()] == ["kernel.cubin"]


@pytest.mark.parametrize(
    ("compiled", "list_directory", "status"),
    [
        (Compiled(FILES, 3, [], [], 1.5, 2), "xdg", 0),
        (Compiled(FILES, 3, [], [], 1.5, 2), "file", 1),
        (Compiled(FILES, 3, [], ["RuntimeError: no ptxas"], 1.5, 2), "xdg", 1),
        (Compiled({"key/missing": 2}, 3, [], [], 1.5, 2), "xdg", 1),
        ("it took longer than 300 s", "xdg", 1),
    ],
    ids=["all kept", "no list", "some failed", "some missing", "timeout"],
)
def test_minisrv_compile_succeeds_only_if_all_kernels_are_kept(
    compiled: Compiled | str,
    list_directory: str,
    status: int,
    checkpoint: Path,
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The engine is that of a CPU, with the kernels of one on a GPU."""

    class Done(Ready):
        made = compiled

    def build(config: EngineConfig, progress: StartupProgress) -> EngineParts:
        engine = build_engine(config, progress)
        with compiled_kernels(engine.kernels, lambda done, total: None):
            pass
        return engine

    monkeypatch.setattr(kernels, "KernelProcess", Done)
    monkeypatch.setattr(compile_tool, "build_engine", build)
    gpu = CUDAPlatform(torch.device("cpu"))
    monkeypatch.setattr(compile_tool, "platform_of", lambda config: gpu)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / list_directory))
    (empty_cache / "key").mkdir(parents=True)
    for name, size in FILES.items():
        (empty_cache / name).write_bytes(bytes(size))
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 64}
    config = EngineConfig(str(checkpoint), device="cpu", num_kv_blocks=33, **limits)
    assert compile_tool.run_compile(config) == status
    said = capsys.readouterr().out
    assert (f"the kernels are kept in {empty_cache}," in said) == (status == 0)
    assert (f"not all kernels are kept in {empty_cache};" in said) == (status == 1)

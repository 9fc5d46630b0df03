"""The process that compiles: its priority, its memory, its end, and its answers."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from multiprocessing import Pipe
from pathlib import Path
from zipfile import ZipFile

import msgspec
import pytest

from minisrv.compile import artifacts, inductor, program, worker
from minisrv.compile.artifacts import Package, read_description, read_package
from minisrv.compile.toolchain import choose_cxx
from minisrv.compile.values import Description
from minisrv.compile.worker import CompileProcess, Progress, compile_model, share
from minisrv.errors import CompilationError
from minisrv.processes import ChildProcess
from tests.checkpoints import make_checkpoint
from tests.compile.compiled import Compiled, job_of, run


def test_a_failure_is_an_answer(tmp_path: Path):
    directory = make_checkpoint(tmp_path)
    job = replace(job_of(directory, "minisrv"), dtype="float33")
    answer = run(CompileProcess(job))
    assert isinstance(answer, CompilationError)
    assert "float33" in answer.message


def test_a_reason_in_words_has_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(worker, "choose_cxx", refuse)
    answers, theirs = Pipe(duplex=False)
    monkeypatch.setattr(worker, "_prepared", lambda scratch, errors, yields: nullcontext())
    worker._main(job_of(make_checkpoint(tmp_path), "minisrv"), tmp_path, False, True, theirs)
    assert answers.recv().message == "the model was not compiled: there is no compiler."


def refuse() -> str:
    raise CompilationError("there is no compiler.")


def test_who_gets_an_answer_need_not_wait_for_the_end_of_the_process(tmp_path: Path):
    """The answer comes when the process and its helper have ended, and it has left few files to be
    removed."""
    job = replace(job_of(make_checkpoint(tmp_path), "minisrv"), dtype="float33")
    process = CompileProcess(job)
    process._helper = ChildProcess("compile2", time.sleep, 60, private_dir=None)
    while isinstance(process.poll(), Progress):
        time.sleep(0.05)
    assert process._process.exit_status is not None
    assert process._helper.exit_status is not None
    assert [path.name for path in Path(process._scratch.name).iterdir()] == ["stderr"]
    process.close()


def test_a_kept_piece_that_cannot_be_loaded_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was tried again at each start once, and the model was never compiled."""
    broken = set[bytes]()

    def compile_piece(*_: object, **__: object) -> Package:
        return Package([], body)

    def load(package: Package, _: int) -> None:
        if package.body in broken:
            raise RuntimeError("this machine has another libstdc++")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program, "LoadedPiece", load)
    monkeypatch.setattr(inductor, "compile_piece", compile_piece)
    monkeypatch.setattr(worker, "choose_cxx", lambda: "g++")
    job = job_of(make_checkpoint(tmp_path), "minisrv")
    for body in (b"first", b"second"):
        directory = compile_model(job, lambda progress: None, tmp_path)
        described = msgspec.msgpack.decode(read_description(directory), type=Description)
        kept = {read_package(file.key, file.digest).body for file in described.pieces}
        assert kept == {body}
        broken.add(body)


CRASHING = """
#include <cstdlib>
struct Crash { Crash() { std::abort(); } } crash;
"""


@pytest.mark.compiler
def test_a_package_that_crashes_is_set_aside_and_in_the_end_not_made_again(
    one_program: Compiled, own_cache: Path, tmp_path: Path
):
    """The library of a package runs code when it is loaded, which no check can rule out. Such a
    package ended the process that compiles at each start."""
    description = read_description(own_cache / "programs" / one_program.directory.name)
    key = msgspec.msgpack.decode(description, type=Description).pieces[0].key
    good = read_package(key)
    bad = with_another_library(good, tmp_path)

    artifacts.write_package(key, bad)
    told = run(CompileProcess(one_program.job))
    assert isinstance(told, CompilationError)
    path = own_cache / "pieces" / f"{key}.crashed"
    assert "by SIGABRT" in told.message
    assert f"the package of the piece {key}, which is set aside as {path}" in told.message
    assert artifacts.read_aside(key) == artifacts.PackageAside(bad, times=1)
    with pytest.raises(CompilationError):
        read_package(key)

    # The piece is made again, and crashes once more: here by a package that comes from elsewhere.
    artifacts.write_package(key, bad)
    assert isinstance(run(CompileProcess(one_program.job)), CompilationError)
    assert artifacts.read_aside(key) == artifacts.PackageAside(bad, times=2)
    told = run(CompileProcess(one_program.job))
    assert isinstance(told, CompilationError)
    assert f"packages of the piece {key} have crashed 2 processes" in told.message
    assert "by SIG" not in told.message

    assert run(CompileProcess(one_program.job, again=True)).name == one_program.directory.name
    assert read_package(key).written == good.written
    assert artifacts.read_aside(key) is None


def with_another_library(package: Package, scratch: Path) -> Package:
    """Return a package with a library that ends the process when it is loaded."""
    source, library, file = (scratch / name for name in ("crash.cpp", "crash.so", "crash.pt2"))
    source.write_text(CRASHING)
    command = [choose_cxx(), "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    with ZipFile(BytesIO(package.body)) as before, ZipFile(file, "w") as after:
        for info in before.infolist():
            is_library = info.filename.endswith(".so")
            after.writestr(info, library.read_bytes() if is_library else before.read(info))
    return Package(package.written, file.read_bytes())


def test_a_death_is_an_answer(tmp_path: Path):
    process = CompileProcess(job_of(make_checkpoint(tmp_path), "minisrv"))
    os.kill(process.pid, 9)
    answer = run(process)
    assert isinstance(answer, CompilationError)
    assert "by SIGKILL" in answer.message


def test_a_program_by_other_code_than_that_of_the_server_is_an_error(tmp_path: Path):
    """An upgrade had changed the files under a server, whose process that compiles imports them
    anew: the server loaded what was compiled for the version that it was not."""
    job = job_of(make_checkpoint(tmp_path), "minisrv", dtype="float33")
    for name, is_taken in ((job.key(), True), ("0" * 32, False)):
        process = CompileProcess(job)
        process._answers.close()
        process._answers, theirs = Pipe(duplex=False)
        theirs.send(tmp_path / name)
        answer = run(process)
        theirs.close()
        assert isinstance(answer, Path) == is_taken
        assert is_taken or "by other code" in answer.message


def test_who_helps_takes_what_nobody_makes_from_the_last_on(tmp_path: Path):
    """What the other process has claimed is left to it, and made after its end if it has not."""
    made: list[int] = []
    keys = ["a", "b", "c", "d"]
    with (tmp_path / "c.claim").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        share(keys, tmp_path, made.append, helps=True)
        assert made == [3, 1, 0]
        made.clear()

        def make(index: int) -> None:
            made.append(index)
            if index == 3:
                fcntl.flock(other, fcntl.LOCK_UN)

        share(keys, tmp_path, make, helps=False)
    assert made == [0, 1, 3, 2]


@pytest.mark.compiler
def test_it_has_limited_time_and_the_lowest_priority(tmp_path: Path):
    job = job_of(make_checkpoint(tmp_path), "transformers", threads=3)
    process = CompileProcess(job, timeout=20)
    while process.poll() == Progress("starting", 0, 0):
        time.sleep(0.05)
    assert isinstance(process.poll(), Progress)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    process._deadline = time.monotonic()
    answer = run(process)
    assert isinstance(answer, CompilationError)
    assert "longer than 20 s" in answer.message


def test_a_compilation_that_gets_no_core_goes_on_at_a_higher_priority(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Where others used every core, the process that yields to them starved until its time was
    over, at each start. It starts again, once, and ends as another does."""
    process = CompileProcess(job_of(make_checkpoint(tmp_path), "minisrv", dtype="float33"))
    before = process._process
    process.poll()
    assert process.pid == before.pid
    process._heard -= worker.PATIENCE
    while process.pid == before.pid:
        assert isinstance(process.poll(), Progress)
        time.sleep(0.01)
    assert before.exit_status == -signal.SIGKILL
    assert "has made no progress for 300 s" in caplog.text
    assert "starts again as a usual process" in caplog.text
    while os.getpriority(os.PRIO_PROCESS, process.pid) != 19:
        time.sleep(0.01)
    process._heard -= worker.PATIENCE
    answer = run(process)
    assert isinstance(answer, CompilationError)
    assert "float33" in answer.message
    assert len([record for record in caplog.records if "no progress" in record.message]) == 1


@pytest.mark.parametrize(("yields", "policy"), [(True, os.SCHED_IDLE), (False, os.SCHED_OTHER)])
def test_the_priority_is_the_lowest_of_its_policy(yields: bool, policy: int):
    """Also where memory runs out: the kernel ended the largest process, which is the engine."""
    told = subprocess.run(
        [sys.executable, "-c", PRIORITY.format(yields)], check=True, capture_output=True, text=True
    )
    assert told.stdout.split() == ["19", str(policy), "1000"]


PRIORITY = """
import os
from minisrv.compile import worker
worker._lower_priority({})
adjusted = open("/proc/self/oom_score_adj").read().strip()
print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), adjusted)
"""


@pytest.mark.compiler
def test_a_second_compilation_makes_no_pieces(one_program: Compiled):
    began = os.stat(one_program.directory / "program.msgpack").st_mtime_ns
    assert run(CompileProcess(one_program.job)) == one_program.directory
    assert os.stat(one_program.directory / "program.msgpack").st_mtime_ns > began


PARENT = """
import sys, time
from pathlib import Path
from minisrv.compile import worker
from minisrv.compile.worker import CompileProcess
from tests.compile.compiled import job_of
if __name__ == "__main__":
    process = CompileProcess(job_of(Path(sys.argv[1]), "transformers", threads=3))
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_it_ends_with_its_parent(tmp_path: Path):
    make_checkpoint(tmp_path / "model")
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path / "model"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.stdout.close()


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


WEIGHTS = """
import resource, sys
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from multiprocessing import Pipe
from pathlib import Path
from zipfile import ZipFile
from tests.compile.compiled import job_of, schedule_of
job = job_of(Path(sys.argv[1]), "minisrv")
model = replace(job.model, vocab_size=256_000, hidden_size=4096)
assert len(schedule_of(replace(job, model=model)).pieces) == 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_a_trace_takes_no_memory_for_weights(tmp_path: Path):
    """The embedding alone is 4 GiB."""
    make_checkpoint(tmp_path)
    root = Path(__file__).parents[2]
    told = subprocess.run(
        [sys.executable, "-c", WEIGHTS, tmp_path], check=True, capture_output=True, cwd=root
    )
    assert int(told.stdout) < 2048

"""Engines that die of a package do so twice: the next one finds the notes that they have left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minisrv.cache import cache_directory
from minisrv.compile import artifacts
from minisrv.compile.artifacts import Package
from minisrv.compile.program import LoadedPiece
from minisrv.compile.worker import keep_piece
from minisrv.errors import CrashError
from tests.compile.compiled import Compiled

KEY = 16 * "0a"
PACKAGE = Package([1], b"machine code")
ROOT = Path(__file__).parents[2]

DIES = """
import os, signal
from minisrv.compile import artifacts
with artifacts.tried({key!r}):
    os.kill(os.getpid(), signal.{signal})
"""

DIES_IN_ITS_FIRST_RUN = """
import os, sys
from minisrv.compile import artifacts
from minisrv.compile.program import LoadedPiece
key = sys.argv[1]
piece = LoadedPiece(artifacts.read_package(key), 99, key)
artifacts.read_package(key)
class Code:
    def boxed_run(self, arguments):
        os.abort()
piece._package = Code()
piece.run([None] * 99, [None] * 99)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the pieces, of which there is one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    artifacts.write_package(KEY, PACKAGE)
    return cache_directory("compiled", "pieces")


def run(script: str, *arguments: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script, *arguments], env=environment).returncode


def die(by: str = "SIGSEGV") -> None:
    assert run(DIES.format(key=KEY, signal=by)) == -getattr(signal, by)


@pytest.mark.parametrize("by", ["SIGSEGV", "SIGKILL"])
def test_a_package_of_which_two_engines_have_died_is_not_tried_again(cache: Path, by: str):
    for _ in range(artifacts.MOST_DEATHS):
        assert artifacts.read_package(KEY) == PACKAGE
        die(by)
    for _ in range(2):
        with pytest.raises(CrashError, match=f"set aside as {cache / KEY}.crashed"):
            artifacts.read_package(KEY)
        assert [path.name for path in cache.iterdir()] == [f"{KEY}.crashed"]
    assert artifacts.read_aside(KEY) == artifacts.PackageAside(PACKAGE, times=1, engine=True)


def test_it_is_not_made_again_either(cache: Path, tmp_path: Path):
    """A process that compiles can load it, and would give it to the next engine to die of."""
    die()
    die()
    for again in (False, True):
        with pytest.raises(CrashError):
            keep_piece(KEY, 2, lambda: PACKAGE, tmp_path, again=again)
    artifacts.write_package(KEY, PACKAGE)  # by a server that had made it before
    with pytest.raises(CrashError):
        artifacts.read_package(KEY)
    (cache / f"{KEY}.crashed").unlink()
    assert artifacts.read_package(KEY) == PACKAGE


def test_an_engine_that_was_killed_while_it_tried_a_package_is_forgotten(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """A server that is stopped while it loads kills its engine. No later start served compiled
    code then, until somebody removed a file by hand."""
    monkeypatch.setattr("torch._C._aoti.AOTIModelPackageLoader", Loader)
    for _ in range(3):
        die("SIGKILL")
        piece = LoadedPiece(artifacts.read_package(KEY), 2, KEY)
        assert len(list(cache.glob("*.tried"))) == 1, "it may crash when it first runs"
        piece.run([torch.empty(0)], [torch.empty(0)])
        assert [path.name for path in cache.iterdir()] == [f"{KEY}.pt2"]


class Loader:
    """Stands for a package that is loaded."""

    def __init__(self, *_: object) -> None:
        """Load it."""

    def boxed_run(self, _: list[object]) -> None:
        """Run it."""


def test_a_package_that_crashes_again_elsewhere_is_still_the_one_that_ended_an_engine():
    artifacts.set_aside(KEY, PACKAGE, engine=True)
    artifacts.set_aside(KEY, PACKAGE)
    assert artifacts.read_aside(KEY) == artifacts.PackageAside(PACKAGE, times=2, engine=True)


def test_an_engine_that_lives_is_not_taken_for_a_dead_one(cache: Path):
    """Two servers may load the same package at the same time, and a package may be refused."""
    with artifacts.tried(KEY):
        with artifacts.tried(KEY):
            assert len(list(cache.iterdir())) == 3
            assert artifacts.read_package(KEY) == PACKAGE
        assert artifacts.read_package(KEY) == PACKAGE
    with pytest.raises(RuntimeError), artifacts.tried(KEY):
        raise RuntimeError("this machine has another libstdc++")
    assert artifacts.read_package(KEY) == PACKAGE
    assert [path.name for path in cache.iterdir()] == [f"{KEY}.pt2"]


def test_without_a_cache_a_package_is_tried_all_the_same(cache: Path):
    cache.chmod(0o777)
    ran = False
    with artifacts.tried(KEY):
        ran = True
    assert ran
    cache.chmod(0o700)
    assert [path.name for path in cache.iterdir()] == [f"{KEY}.pt2"]


@pytest.mark.compiler
def test_the_first_run_is_a_trial_too(
    one_program: Compiled, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """A process that compiles only loads packages. One with an instruction that the processor does
    not have would crash each engine when it first runs."""
    monkeypatch.undo()
    [key, *_] = [path.stem for path in (one_program.directory.parents[1] / "pieces").glob("*.pt2")]
    package = artifacts.read_package(key)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[2]))
    artifacts.write_package(key, package)
    for _ in range(artifacts.MOST_DEATHS):
        assert run(DIES_IN_ITS_FIRST_RUN, key) == -signal.SIGABRT
    with pytest.raises(CrashError):
        artifacts.read_package(key)


def test_later_runs_leave_no_notes(cache: Path, monkeypatch: pytest.MonkeyPatch):
    notes: list[int] = []

    class Counts(Loader):
        def __init__(self, *_: object) -> None:
            self.boxed_run([])

        def boxed_run(self, _: list[object]) -> None:
            notes.append(len(list(cache.glob("*.tried"))))

    monkeypatch.setattr("torch._C._aoti.AOTIModelPackageLoader", Counts)
    piece = LoadedPiece(PACKAGE, 2, KEY)
    for _ in range(3):
        piece.run([torch.empty(0)], [torch.empty(0)])
    assert notes == [1, 1, 0, 0]

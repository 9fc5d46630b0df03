"""What is known of programs that were found too slow is kept, trusted like all artifacts, and
forgotten when the model is compiled again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minisrv.compile import artifacts, pieces
from minisrv.compile.pieces import PieceCompiler
from minisrv.compile.worker import CompileJob
from tests.checkpoints import make_checkpoint
from tests.compile.compiled import job_of, make

STEPS = "FULL 64, FULL 1"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompileJob:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return job_of(make_checkpoint(tmp_path / "model"), "minisrv")


@pytest.fixture
def directory(job: CompileJob) -> Path:
    """Return the directory of a program that was found too slow."""
    found = job.program_directory()
    assert found is not None
    artifacts.write_description(found, b"a program")
    compiler(job).remember_slowness(found, STEPS, 0.5)
    return found


def compiler(job: CompileJob, *, again: bool = False) -> PieceCompiler:
    return PieceCompiler(job, make(job), again=again)


def test_slowness_is_kept_for_the_steps_that_were_measured(
    job: CompileJob, directory: Path
) -> None:
    assert not (directory / artifacts.PROGRAM).exists()
    assert compiler(job).find() is None
    assert compiler(job).slowness(STEPS) == 0.5
    assert compiler(job).slowness("NONE 64") is None
    assert compiler(job, again=True).slowness(STEPS) is None


def test_other_code_is_measured(job: CompileJob, directory: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(artifacts, "code_digest", lambda parts: "another version")
    assert compiler(job).slowness(STEPS) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.chmod(0o666),
        lambda path: path.rename(path.with_name("other")),
        lambda path: artifacts.write_cached(path, b"0" * 32 + path.read_bytes()[32:-32]),
        lambda path: artifacts.write_cached(path, path.parent.name.encode() + b"nothing"),
    ],
    ids=["cut", "open", "missing", "of another key", "nothing"],
)
def test_what_is_not_trusted_is_measured_again(
    job: CompileJob, directory: Path, damage: Any
) -> None:
    damage(directory / artifacts.SLOWNESS)
    assert compiler(job).slowness(STEPS) is None


def test_a_new_compilation_voids_it(
    job: CompileJob, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CompileProcess", lambda *_, **__: None)
    compiler(job, again=True).start()
    assert compiler(job).slowness(STEPS) is None


def test_without_a_cache_nothing_is_remembered(
    job: CompileJob, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = compiler(job)
    directory.parent.chmod(0o777)
    assert compiler(job).slowness(STEPS) is None
    directory.parent.chmod(0o700)
    (directory / artifacts.SLOWNESS).unlink()
    directory.rename(directory.with_name("away"))
    one.remember_slowness(directory, STEPS, 0.5)
    assert "the next start compiles this model again" in caplog.text

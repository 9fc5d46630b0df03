"""The C kernels: compiled once, kept, and done without where they cannot be had."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minisrv.kernels import native as module
from minisrv.kernels.attention import _compiled
from minisrv.kernels.native import native

HAS_COMPILER = shutil.which(os.environ.get("CC", "cc")) is not None


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    yield tmp_path / "minisrv"
    native.cache_clear()


def executable(path: Path, script: str) -> str:
    path.write_text(script)
    path.chmod(0o755)
    return str(path)


def test_they_are_there_wherever_a_compiler_is() -> None:
    assert (native() is not None) is HAS_COMPILER
    assert (_compiled(torch.bfloat16, 1, 64) is not None) is HAS_COMPILER
    assert _compiled(torch.float16, 1, 64) is None
    assert _compiled(torch.float32, 1, 24) is None, "no whole vectors"


def test_no_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "no C compiler" in caplog.text
    assert "Install gcc" in caplog.text


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    script = '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "unknown flag" >&2; exit 1\n'
    monkeypatch.setenv("CC", executable(tmp_path / "broken", script))
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "unknown flag" in caplog.text
    assert not list(fresh.glob("*")), "nothing half made is kept"


def test_a_compiler_that_hangs(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", executable(tmp_path / "slow", "#!/bin/sh\nexec sleep 100\n"))
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "timed out" in caplog.text


def test_a_compiler_that_speaks_latin_1(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    script = '#!/bin/sh\n[ "$1" = --version ] && exit 0\nprintf "\\351rreur" >&2; exit 1\n'
    monkeypatch.setenv("CC", executable(tmp_path / "gaulois", script))
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "rreur" in caplog.text


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_a_damaged_library_is_compiled_again(fresh: Path, tmp_path: Path) -> None:
    """In processes of their own: what is loaded here must not be cut off."""
    program = "import torch; from minisrv.kernels.native import native; assert native()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    [library] = fresh.iterdir()
    library.write_bytes(b"")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert library.stat().st_size > 1000


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_a_compiler_with_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -g0")
    assert native() is not None


def test_a_directory_that_cannot_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CC", executable(tmp_path / "any", "#!/bin/sh\nexit 0\n"))
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "by torch's operations" in caplog.text


def test_a_directory_that_others_may_write_is_not_trusted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    monkeypatch.setenv("CC", executable(tmp_path / "any", "#!/bin/sh\nexit 0\n"))
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "others may write" in caplog.text


def test_no_home(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A container may run as a user that no file knows."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(module.Path, "home", nobody)
    monkeypatch.setenv("CC", executable(tmp_path / "any", "#!/bin/sh\nexit 0\n"))
    with caplog.at_level(logging.WARNING):
        assert native() is None
    assert "home directory" in caplog.text


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_compiled_once_by_any_number_of_processes(fresh: Path) -> None:
    program = "from minisrv.kernels.native import native; import torch; assert native()"
    racers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [racer.wait(120) for racer in racers] == [0, 0, 0]
    [library] = fresh.iterdir()
    made = library.stat().st_mtime_ns
    assert native() is not None
    assert library.stat().st_mtime_ns == made


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_what_is_kept_is_of_this_source_and_processor(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native() is not None
    monkeypatch.setattr(module, "_processor", lambda: b"another")
    native.cache_clear()
    assert native() is not None
    assert len(list(fresh.iterdir())) == 2

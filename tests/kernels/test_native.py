"""The C kernels: compiled once and kept, and replaced by torch's operations where they cannot be
had."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minisrv import cache
from minisrv.cache import write_cached
from minisrv.kernels import native as module
from minisrv.kernels.attention import _compiled
from minisrv.kernels.native import native
from tests.test_cache import DAMAGE

HAS_COMPILER = shutil.which(os.environ.get("CC", "cc")) is not None


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Provide an empty cache directory, with no library loaded."""
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


@pytest.fixture(scope="module")
def library() -> bytes:
    """The library that the compiler makes, compiled once for all tests that are not about
    compiling."""
    compiler = module._compiler()
    assert compiler is not None
    return module._compile(compiler, [*module.FLAGS, *module._vector_flags()])


@pytest.fixture
def compiled(library: bytes, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Stand in for the compiler; the list grows by one entry each time that it would have run."""
    times: list[bytes] = []

    def compile_at_once(compiler: list[str], flags: list[str]) -> bytes:
        times.append(library)
        return library

    monkeypatch.setattr(module, "_compile", compile_at_once)
    return times


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_library_that_is_not_trusted_is_compiled_again(
    damage: str, fresh: Path, compiled: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert native() is not None
    [kept] = fresh.iterdir()
    spoil, reason = DAMAGE[damage]
    spoil(kept)
    for _ in range(2):  # Compiling it again once is enough.
        native.cache_clear()
        found = native()
        assert found is not None
        assert found["attention_float32"]
    assert len(compiled) == 2
    [record] = caplog.records
    assert reason in record.getMessage()


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_a_library_that_was_cut_off_stops_no_start(fresh: Path) -> None:
    """A library file that was cut off is compiled again, in processes of their own: running code
    whose pages are missing from the file would kill the process."""
    program = "import torch; from minisrv.kernels.native import native; assert native()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    [kept] = fresh.iterdir()
    body = kept.read_bytes()
    kept.write_bytes(body[: len(body) // 2])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert len(kept.read_bytes()) == len(body)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_a_library_for_another_machine_is_compiled_again(
    fresh: Path, compiled: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is whole but cannot be loaded is compiled again: a home directory may be shared
    by machines with other C libraries."""
    assert native() is not None
    [path] = fresh.iterdir()
    write_cached(path, b"no library at all")
    native.cache_clear()
    assert native() is not None
    assert len(compiled) == 2
    assert "cannot be loaded and is compiled again" in caplog.text


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
def test_a_compiler_with_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{os.environ.get('CC') or 'cc'} -g0")
    assert native() is not None


@pytest.mark.parametrize("name", ['cc "', "no-such-compiler", "./no-such-compiler"])
def test_a_compiler_that_cannot_be(name: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", name)
    assert native() is None


def test_the_working_directory_holds_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler is looked for in the working directory, which an empty item of PATH stands for,
    and what a compiler starts is not looked for there either."""
    executable(tmp_path / "cc", "#!/bin/sh\nexit 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f":.:{tmp_path / 'missing'}")
    monkeypatch.delenv("CC", raising=False)
    assert module._compiler() is None
    monkeypatch.setenv("CC", "./cc -O1")  # It is used if it was asked for by this path.
    assert module._compiler() == [str(tmp_path / "cc"), "-O1"]
    assert module._run(["/bin/pwd"]) == "/\n"


@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")
@pytest.mark.parametrize("trouble", ["no directory", "not trusted", "no home", "full"])
def test_without_a_cache_it_is_compiled_at_each_start(
    trouble: str,
    fresh: Path,
    compiled: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Without a usable cache the library is compiled at each start: a container may run as a user
    without an entry in the user database, or on a disk that is read-only or full."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if trouble == "no directory":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif trouble == "not trusted":
        fresh.mkdir()
        fresh.chmod(0o777)
    elif trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(module.Path, "home", nobody)
    else:
        monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", full)
    for _ in range(2):
        native.cache_clear()
        assert native() is not None
    assert len(compiled) == 2
    reasons = {
        "no directory": "Not a directory",
        "not trusted": "others may write to",
        "no home": "home directory",
        "full": "No space left",
    }
    assert reasons[trouble] in caplog.text


def test_a_compiler_without_a_place_for_its_files(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", executable(tmp_path / "any", "#!/bin/sh\nexit 0\n"))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "missing"))
    assert native() is None
    assert "by torch's operations" in caplog.text


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
    monkeypatch.setattr(module, "processor", lambda: b"another")
    native.cache_clear()
    assert native() is not None
    assert len(list(fresh.iterdir())) == 2

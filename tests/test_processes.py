"""A child process starts without importing anything from the working directory, which may be a
stranger's checkpoint with a module named as one of the standard library; and its end is
reported."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minisrv import import_path
from minisrv.errors import ConfigError
from minisrv.import_path import ROOT, without_working_directory
from minisrv.processes import (
    ChildProcess,
    bound_resource,
    map_shared,
    raise_descriptor_limit,
    safe_path,
)
from tests.traps import set_traps


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an own, empty directory the working directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize("search", ["", "here", "python path", "empty item"])
def test_a_child_runs_no_code_of_the_working_directory(
    search: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child runs no code of the working directory, also where this process looks for modules
    there, as with `python -m`, or the environment says so."""
    traps = set_traps(here, {"enum", "struct", "logging", "encodings", "sitecustomize"})
    if search == "here":
        monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    elif search:
        place = {"python path": str(here), "empty item": ""}[search]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([place, ROOT]))
    before, path = dict(os.environ), list(sys.path)
    child = ChildProcess("test", os.getpid, private_dir=tmp_path / "private")
    try:
        assert child.wait() == 0
    finally:
        child.stop()
    assert traps.sprung() == set()
    assert (dict(os.environ), sys.path) == (before, path)


@pytest.mark.parametrize(
    ("limits", "most", "bounded"),
    [
        ((-1, -1), 1000, (1000, -1)),
        ((-1, 500), 1000, (500, 500)),
        ((300, 500), 1000, (300, 500)),
        ((2000, 3000), 1000, (1000, 3000)),
        ((0, -1), 1000, (0, -1)),
    ],
)
def test_a_resource_is_bounded_below_what_is_set(
    limits: tuple[int, int], most: int, bounded: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", found.__setitem__)
    bound_resource(resource.RLIMIT_DATA, most)
    assert found == {resource.RLIMIT_DATA: bounded}


def test_a_hard_limit_on_descriptors_that_cannot_be_set_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hard limit may be above /proc/sys/fs/nr_open, if that was lowered since; then the limit
    stays as it is."""

    def refuse(kind: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()


def test_a_command_started_in_a_safe_path_runs_none_either(here: Path) -> None:
    traps = set_traps(here, {"json", "decimal"})
    with safe_path():
        subprocess.run([sys.executable, "-c", "import json, decimal"], check=True)
    assert traps.sprung() == set()


def test_what_is_left_of_a_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ["", ".", str(here), "../here", "/elsewhere", "../missing"]
    assert without_working_directory(path) == ["/elsewhere", "../missing"]
    monkeypatch.chdir(ROOT)
    assert without_working_directory(["", ROOT, "/elsewhere"]) == [ROOT, "/elsewhere"]


@pytest.mark.parametrize("package", [False, True])
def test_the_directory_of_the_users_program_stays(here: Path, package: bool) -> None:
    """The directory of a user's program that uses minisrv stays in the import path of a child: the
    program has modules beside it, and may be started from that directory."""
    name = "app" if package else ""
    (here / name).mkdir(exist_ok=True)
    (here / name / "beside.py").touch()
    (here / name / "main.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        f"import {'app.' if package else ''}beside\n"
        "from minisrv.processes import ChildProcess\n"
        "if __name__ == '__main__':\n"
        "    child = ChildProcess('test', os.getpid, private_dir=Path('private'))\n"
        "    sys.exit(child.wait())\n"
    )
    program = ["-m", "app.main"] if package else ["main.py"]
    env = os.environ | {"PYTHONPATH": ROOT}
    subprocess.run([sys.executable, *program], check=True, env=env)


@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_script_without_a_guard_runs_once(from_stdin: bool, tmp_path: Path) -> None:
    """A spawned process imports the main module, if it is not hidden."""
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from minisrv.processes import ChildProcess\n"
        "print('script', flush=True)\n"
        "print(ChildProcess('test', os.getpid, private_dir=Path('private')).wait())\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-" if from_stdin else "script.py"],
        input=script,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    assert done.stdout == "script\n0\n"


def test_only_the_command_changes_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_ours(argv: list[str], started_as: list[str]) -> bool:
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", started_as)
        return import_path._is_program()

    assert is_ours(["/usr/bin/minisrv", "serve"], ["python", "/usr/bin/minisrv", "serve"])
    assert is_ours(["-m", "serve", "."], ["python", "-m", "minisrv.cli", "serve", "."])
    assert is_ours(["-m"], ["python", "-mminisrv.cli"])
    assert not is_ours(["-m", "minisrv"], ["python", "-m", "app", "minisrv"])
    assert not is_ours(["-c"], ["python", "-c", "import minisrv"])
    assert not is_ours([""], ["python"])


def test_temporary_files_of_a_child_go_with_the_directory_of_its_parent(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    child = ChildProcess("test", tempfile.mkdtemp, private_dir=private)
    assert child.wait() == 0
    assert len(list(private.iterdir())) == 1


def end_by(how: int) -> None:
    """Exit with a status, or, if it is negative, die of that signal."""
    if how < 0:
        signal.raise_signal(-how)
    os._exit(how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (0, "with status 0"),
        (3, "with status 3"),
        (-signal.SIGKILL, "by SIGKILL (the kernel's log, dmesg,"),
        (-signal.SIGBUS, "by SIGBUS (the kernel's log, dmesg,"),
        (-(signal.SIGRTMIN + 3), f"by signal {signal.SIGRTMIN + 3} ("),
    ],
)
def test_how_a_child_has_ended(how: int, words: str, tmp_path: Path) -> None:
    """How a child has ended is known before it is waited for, and its process id stays its own
    until then, because other processes watch it by that id."""
    child = ChildProcess("test", end_by, how, private_dir=tmp_path / "private")
    assert child.describe_exit().startswith(words)
    os.close(os.pidfd_open(child.pid))
    assert child.wait() == how
    assert child.describe_exit().startswith(words)


def test_a_shared_file_has_its_room_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk space for a mapped file is allocated when it is made: a write to a page for which none
    is left would end the process by SIGBUS."""
    first, second = (map_shared(tmp_path / "file", 8) for _ in range(2))
    first[3] = 7
    assert second[:] == bytes([0, 0, 0, 7, 0, 0, 0, 0])
    assert (tmp_path / "file").stat().st_blocks > 0
    with pytest.raises(ConfigError, match="No such file .*; set TMPDIR"):
        map_shared(tmp_path / "missing" / "file", 8)

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left .*; set TMPDIR"):
        map_shared(tmp_path / "another", 8)

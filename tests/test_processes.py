"""How a child process starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minisrv.processes import ChildProcess


def test_a_child_runs_no_code_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a stranger's checkpoint, with a module named as one of the standard library."""
    for name in ("enum", "signal", "struct"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(9)")
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    child = ChildProcess("test", os.getpid, private_dir=tmp_path / "private")
    try:
        assert child.wait() == 0
    finally:
        child.stop()
    assert dict(os.environ) == before

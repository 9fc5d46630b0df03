"""A C++ compiler is used if its libraries share the standard library with the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from minisrv import machine
from minisrv.compile.toolchain import choose_cxx
from minisrv.errors import CompilationError


def compiler(path: Path, library: str) -> str:
    """Return a program that, as a compiler, makes a library with that content."""
    path.write_text(f'#!/bin/sh\nfor name in "$@"; do :; done\necho {library} > "$name"\n')
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_links_its_own_copy_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package made by such a compiler once crashed the process that loaded it."""
    static = compiler(tmp_path / "static", "operator new")
    shared = compiler(tmp_path / "shared", "needs libstdc++.so.6")
    monkeypatch.setattr(machine, "CXX_CANDIDATES", (str(tmp_path / "none"), shared))
    monkeypatch.setenv("CXX", static)
    assert choose_cxx() == shared
    monkeypatch.setenv("CXX", f"{shared} -O2")
    monkeypatch.setattr(machine, "CXX_CANDIDATES", (static,))
    assert choose_cxx() == shared


def test_without_a_compiler_the_error_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = compiler(tmp_path / "static", "operator new")
    monkeypatch.setattr(machine, "CXX_CANDIDATES", (static,))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompilationError, match=rf"of \S*false, {static}, none makes .* install g"):
        choose_cxx()
    monkeypatch.setattr(machine, "CXX_CANDIDATES", ("no-such-compiler",))
    monkeypatch.delenv("CXX")
    with pytest.raises(CompilationError, match="of CXX and no-such-compiler, none makes"):
        choose_cxx()

"""A user who changes into the directory of a stranger's checkpoint and serves it there runs none of
the code in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minisrv.import_path import ROOT
from tests.e2e.server import SMALL, Server
from tests.traps import NAMES, Traps, install_command, loaded_before_dash_m, set_traps

DASH_M = ("-m", "minisrv.cli")


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a checkpoint of which nothing is in the cache so far."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def traps_for(program: tuple[str, ...], directory: Path) -> Traps:
    """Set traps for every module that can be kept from being imported from the directory. `python
    -m` looks there before any code of minisrv runs, even for minisrv itself, so those modules are
    left out."""
    lost = loaded_before_dash_m() | {"minisrv"} if program == DASH_M else frozenset()
    assert len(NAMES - lost) > 200
    return set_traps(directory, NAMES - lost)


@pytest.mark.parametrize("dash_m", [False, True])
def test_a_server_from_start_to_end(
    start: Callable[..., Server], checkpoint: Path, tmp_path: Path, dash_m: bool
) -> None:
    """A whole run of the server imports nothing from there, with everything that starts a process:
    transformers reads the checkpoint, kernels are compiled, and a grammar is tried."""
    program = DASH_M if dash_m else (install_command(tmp_path / "bin"),)
    traps = traps_for(program, checkpoint)
    server = start(*SMALL, ".", program=program, directory=checkpoint).wait_ready()
    grammar = {"structured_outputs": {"regex": "[ab]{3}"}}
    assert set(server.complete("x", max_tokens=5, **grammar)["choices"][0]["text"]) <= set("ab")
    server.process.terminate()
    assert server.wait() == 0
    assert traps.sprung() == set()


@pytest.mark.parametrize("dash_m", [False, True])
def test_a_plan(checkpoint: Path, tmp_path: Path, dash_m: bool) -> None:
    """`minisrv plan` imports nothing from the directory either."""
    program = DASH_M if dash_m else (install_command(tmp_path / "bin"),)
    traps = traps_for(program, checkpoint)
    planned = [sys.executable, *program, "plan", "."]
    subprocess.run(planned, cwd=checkpoint, check=True, stdout=subprocess.DEVNULL)
    assert traps.sprung() == set()

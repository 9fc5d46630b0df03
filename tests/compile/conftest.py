"""One compiled model for each of the implementations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minisrv.cache import cache_directory
from tests.compile.compiled import Compiled, compiled


@pytest.fixture(scope="session", params=["transformers", "minisrv"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="session")
def one_program(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(tmp_path_factory.mktemp("model"), "minisrv")


@pytest.fixture
def own_cache(one_program: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the cache of compiled code, which the test uses from then on. It has no
    notes, which last for as long as a test in another process tries a package."""
    cache = cache_directory("compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = cache_directory("compiled")
    shutil.copytree(cache, mine, ignore=shutil.ignore_patterns("*.tried"), dirs_exist_ok=True)
    return mine

"""One compiled model for each of the implementations."""

from __future__ import annotations

import pytest

from tests.compile.compiled import Compiled, compiled


@pytest.fixture(scope="session", params=["transformers", "minisrv"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="session")
def one_program(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(tmp_path_factory.mktemp("model"), "minisrv")

"""Fixtures that start servers: shared ones for tests that only send requests, and fresh ones for
tests that end them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.server import SMALL, Server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that loads in no time and runs a step in half a millisecond."""
    from tests.checkpoints import make_checkpoint  # imports transformers, which takes seconds

    return make_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1 << 15)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server with the default modes, shared by the session; each test leaves it idle."""
    yield from _serve()


@pytest.fixture(scope="session")
def cpu_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server on the CPU of which all graphs serve, for tests that count steps by captured size:
    on a GPU another size may be measured as cheaper."""
    if torch.cuda.is_available():
        for server in _serve("--device", "cpu"):
            yield server.wait_filled()
    else:
        yield request.getfixturevalue("server").wait_filled()


@pytest.fixture(scope="session")
def eager_server() -> Iterator[Server]:
    """A shared server that captures no graphs."""
    yield from _serve("--enforce-eager")


@pytest.fixture(scope="session")
def async_server() -> Iterator[Server]:
    """A shared server that schedules one step ahead."""
    yield from _serve("--async-scheduling")


def _serve(*flags: str) -> Iterator[Server]:
    # The answers of these servers are compared, and how their batches form is left to chance. In
    # bfloat16 a matrix product of another batch size rounds differently often enough to decide a
    # near tie otherwise.
    mode = ("--cudagraph-mode", "full-and-piecewise")  # on a GPU as well
    server = Server(*SMALL, *mode, "--dtype", "float32", *flags)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """A function that starts servers, with the arguments of `Server`; they are stopped after the
    test."""
    servers: list[Server] = []

    def start(*flags: str, **options: Any) -> Server:
        servers.append(Server(*flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        print(server.log)  # shown with a failure
        server.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, Any, pytest.TestReport]:
    """Show the shared servers' logs with a failure."""
    report: pytest.TestReport = yield
    if report.failed:
        for name, value in item.funcargs.items():
            if isinstance(value, Server):
                report.sections.append((f"log of {name}", value.log))
    return report

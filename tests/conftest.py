"""Selects the tests that run here, on a GPU or with Triton's kernels in Triton's interpreter.

A verdict must not depend on how busy the machine is, so this file sets torch to compute in one
thread, as several tests run at a time, and Hypothesis to measure no times.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from minisrv import threads
from minisrv.device_kind import CPU

# It is set before torch reads it, and for processes that tests start.
os.environ.setdefault(threads.COUNT, "1")

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which an import of some test may do.
    os.environ["TRITON_INTERPRET"] = "1"

# Files that tests keep in the cache stay out of the user's own, and are there for the next run.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xdg")

settings.register_profile(
    "minisrv", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("minisrv")

MOST_WORKERS = 4
"""Maximum number of processes that run tests at a time. Each holds torch, models and servers, about
2 GiB."""

QUICK = ("core", "graph", "nn", "runner", "server", "text", "tools")
"""Directories whose tests start no servers, run no model for long and interpret no kernels."""

NOT_QUICK = ("test_compile.py", "test_transformers_model.py")
"""Files in these directories that compile models, or make one of every architecture."""


@pytest.fixture
def tape_holds_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the refusal of mode `full` on a CPU, so that the parts of it that need no GPU are
    tested: a CPU tape calls the attention op again at each replay, so the op sees the lengths of
    that moment."""
    monkeypatch.setattr(
        "minisrv.engine.platforms.CPUPlatform.kind", replace(CPU, captures_mixed=True)
    )


@pytest.fixture
def collections() -> Iterator[None]:
    """Leave the garbage collector as it was. Where objects stay frozen, those of each graph that is
    captured are frozen with them, and no engine's memory is ever free again."""
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.fixture(autouse=True)
def nothing_stays_frozen() -> Iterator[None]:
    """Where one test leaves objects to which the garbage collector pays no attention any more, the
    engines of all tests after it stay in memory, as each capture adds to those objects."""
    yield
    num_frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert num_frozen < 10_000  # from Python 3.12 on, what is never freed counts: some hundreds


@pytest.fixture(autouse=True, scope="session")
def kernels_are_compiled_by_launches() -> Iterator[None]:
    """Let engines in the process of a test compile the few kernels that they launch: a process that
    does it ahead takes longer to start."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            ahead = "minisrv.engine.platforms.cuda.compiled_kernels"
            patch.setattr(ahead, lambda *arguments: nullcontext())
        yield


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of worker processes of pytest-xdist. Tests on a GPU measure its memory, so
    they run alone."""
    return 0 if torch.cuda.is_available() else min(threads.cores(), MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        quick = item.path.parent == here or item.path.relative_to(here).parts[0] in QUICK
        if quick and item.path.name not in NOT_QUICK:
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

"""Which tests run here, and on what: with a GPU, or Triton's kernels in Triton's interpreter.

Where the verdict would depend on how busy the machine is, it is settled here that it does not: one
thread computes, as several tests run at a time, and Hypothesis measures nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from minisrv import threads

os.environ.setdefault(threads.COUNT, "1")  # before torch reads it, and for what tests start

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which some test's imports may do.
    os.environ["TRITON_INTERPRET"] = "1"

# What tests keep is not the user's, and stays for the next run.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xdg")

settings.register_profile(
    "minisrv", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("minisrv")

MOST_WORKERS = 4
"""Processes that run tests at a time. Each holds torch, models and servers, about 2 GiB."""

QUICK = ("bench", "core", "graph", "nn", "runner", "server", "text")
"""Directories without servers to start, models to run for long, or kernels to interpret."""


@pytest.fixture
def tape_holds_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifts the refusal of mode `full` on a CPU, so that what of it is no GPU's business is tested:
    a tape calls the attention op again, which looks at the lengths of then, wherever they are."""
    monkeypatch.setattr("minisrv.core.ladder.captures_mixed", lambda device: True)


def pytest_xdist_auto_num_workers() -> int:
    """Tests on a GPU measure its memory, so they have it to themselves."""
    return 0 if torch.cuda.is_available() else min(threads.cores(), MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here or item.path.relative_to(here).parts[0] in QUICK:
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

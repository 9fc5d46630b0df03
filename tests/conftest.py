"""Which tests run here, and on what: with a GPU, or Triton's kernels in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which some test's imports may do.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def tape_holds_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifts the refusal of mode `full` on a CPU, so that what of it is no GPU's business is tested:
    a tape calls the attention op again, which looks at the lengths of then, wherever they are."""
    monkeypatch.setattr("minisrv.engine.core.captures_mixed", lambda device: True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

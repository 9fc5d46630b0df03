"""A decode step is a short list of operations, and a graph can hold each of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.checkpoint import describe_model
from minisrv.graph.cpu_tape import is_launch
from minisrv.graph.forward_context import set_forward_context
from minisrv.nn.loader import load_model
from tests.checkpoints import make_checkpoint
from tests.nn.driver import Driver, forward


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen[str(func)] += is_launch(func, (args, kwargs or {}), result)
        return result


def count(directory: Path, layers: int, dtype: torch.dtype) -> Counter[str]:
    make_checkpoint(directory, num_hidden_layers=layers)
    config = describe_model(directory).model
    model = load_model(config, None, dtype=dtype, load_format="dummy")
    model.prepare()
    ids, positions, context = Driver(model).context([(0, [3]), (1, [4])])
    with torch.inference_mode(), set_forward_context(context), Counting() as counting:
        forward(model, ids, positions)
    return counting.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_per_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    """A layer has four products, of which three are copied to their place, one attention, two norms
    and SwiGLU."""
    one, three = (count(tmp_path / str(layers), layers, dtype) for layers in (1, 3))
    assert (three - one).total() <= 2 * (4 + 3 + 1 + 2 + 1)
    assert three["minisrv.attention.default"] == 3
    assert three["minisrv.rms_norm.default"] == 2 * 3 + 1
    assert three["minisrv.silu_and_mul.default"] == 3

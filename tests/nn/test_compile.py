"""A compiler traces the forward of a model as one graph, which computes the same hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisrv.checkpoint import describe_model, resolve_checkpoint
from minisrv.graph.attention import attention_op
from minisrv.graph.forward_context import set_forward_context
from minisrv.nn.decoder import Decoder
from minisrv.nn.loader import load_model
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.nn.driver import Driver

SERVED = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")]
"""Dtype and quantisation of models that a CPU serves."""


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def load(directory: Path, dtype: torch.dtype, quantization: str | None = None) -> Decoder:
    model = load_model(describe_model(directory).model, directory, dtype=dtype)
    model.prepare(quantization=quantization)
    return model


def hidden_states(model: Any, driver: Driver) -> Tensor:
    """Return the hidden states of a step with a decode, two chunks and padding."""
    ids, positions, context = driver.context([(0, [6]), (1, [7, 8, 9]), (2, [10])], pad_tokens=2)
    hidden = torch.empty(len(ids), driver.model.config.hidden_size, dtype=driver.model.dtype)
    with torch.no_grad(), set_forward_context(context):
        model(ids, positions, hidden)
    return hidden


def assert_traces_as_one_graph(model: Decoder) -> None:
    driver = Driver(model)
    driver.step([(0, [3, 4, 5])])
    expected = hidden_states(model, driver)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(hidden_states(compiled, driver), expected)
    [graph] = graphs
    breaks = [node for node in graph.graph.nodes if node.target == attention_op]
    assert len(breaks) == model.config.num_layers


@pytest.mark.parametrize(("dtype", "quantization"), SERVED, ids=str)
def test_the_default_model_is_traced_as_one_graph(
    dtype: torch.dtype, quantization: str | None
) -> None:
    assert_traces_as_one_graph(load(resolve_checkpoint(None), dtype, quantization))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_traced_as_one_graph(variant: str, tmp_path: Path) -> None:
    assert_traces_as_one_graph(load(make_checkpoint(tmp_path, variant), torch.float32))


def test_a_trace_holds_for_the_steps_after_it(tmp_path: Path) -> None:
    """A traced forward takes the metadata of each step, and the KV cache that is bound then."""
    model = load(make_checkpoint(tmp_path, "qwen3"), torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        driver = Driver(model)
        driver.step([(0, [3 + seed, 4, 5])])
        expected = hidden_states(model, driver)
        assert torch.equal(hidden_states(compiled, driver), expected)

"""Each pass changes what its pattern describes and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from minisrv.compile.passes import apply_passes, merged_projections
from minisrv.compile.passes.no_op_views import remove_no_op_views
from minisrv.compile.trace import fake_mode, trace
from minisrv.compile.values import Merged
from minisrv.kernels import linear
from minisrv.kernels.linear import LINEAR_METHODS, LinearMethod, methods_of_one_input
from minisrv.kernels.linear_op import linear_op
from tests.checkpoints import make_checkpoint
from tests.compile.compiled import job_of, make


def test_views_that_change_nothing_are_removed():
    def forward(x: Tensor) -> Tensor:
        same = x.view(4, 6).to(torch.float32).contiguous()
        return same.view(6, 4).transpose(0, 1).contiguous()

    graph = fx.symbolic_trace(forward).graph
    with fake_mode():
        values: dict[fx.Node, Tensor] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = torch.empty(4, 6)
            elif node.op == "call_method":
                given = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                args, kwargs = given  # type: ignore[misc]
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        for node, value in values.items():
            node.meta["example_value"] = value
    assert remove_no_op_views(graph, {}) == 3
    left = [node.target for node in graph.nodes if node.op == "call_method"]
    assert left == ["view", "transpose", "contiguous"]
    x = torch.randn(4, 6)
    module = fx.GraphModule({}, graph)
    assert torch.equal(module(x), forward(x))


def test_the_products_of_one_input_are_merged_in_each_layer(tmp_path: Path):
    """The outputs of attention are in one buffer, which is another input in each layer."""
    layers = 3
    directory = make_checkpoint(tmp_path, num_hidden_layers=layers)
    job = job_of(directory, "transformers")
    traced = trace(lambda: make(job, "dummy"), "cpu")
    assert apply_passes(traced)["merged projections"] == 2 * layers
    products = [node for node in traced.graph.graph.nodes if node.target == linear_op]
    assert len(products) == 4 * layers
    merged = [source.methods for source in traced.sources.values() if isinstance(source, Merged)]
    names = {tuple(path[-2] for path in paths) for paths in merged}
    assert names == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert all(len({path[2] for path in paths}) == 1 for paths in merged), "of one layer"


def test_large_products_are_merged_only_where_their_weights_lie_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merged_projections, "MOST_BYTES", 0)
    job = job_of(make_checkpoint(tmp_path, num_hidden_layers=1), "transformers")

    def merged() -> int:
        return apply_passes(trace(lambda: make(job, "dummy"), "cpu"))["merged projections"]

    assert merged() == 0, "in the layout of oneDNN"
    monkeypatch.setattr(linear, "onednn_takes", lambda dtype: False)
    assert merged() == 2


@pytest.mark.parametrize("bias", [True, False])
def test_the_merged_weight_of_one_input_takes_no_memory(
    bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear, "onednn_takes", lambda dtype: False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, generator=generator)
    weights = [torch.randn(width, 32, generator=generator) for width in (48, 16, 8)]
    biases = [torch.randn(len(w), generator=generator) if bias else None for w in weights]
    methods = methods_of_one_input(weights, biases, None)
    for method, weight, added in zip(methods, weights, biases, strict=True):
        torch.testing.assert_close(method.apply(x), torch.nn.functional.linear(x, weight, added))
    for some in (methods, methods[1:]):
        merged = type(some[0]).merged(some)
        assert torch.equal(merged.apply(x), torch.cat([method.apply(x) for method in some], 1))
        assert merged.weight.data_ptr() == some[0].weight.data_ptr()
    others = [methods[0], methods[2]]
    copied = type(others[0]).merged(others)
    assert copied.weight.data_ptr() != others[0].weight.data_ptr(), "others are between"
    torch.testing.assert_close(copied.apply(x), torch.cat([m.apply(x) for m in others], 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")],
    ids=str,
)
def test_a_merged_method_multiplies_by_the_weights_side_by_side(
    dtype: torch.dtype, quantization: str | None, rows: int, bias: bool
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 32, generator=generator).to(dtype)
    methods: list[LinearMethod] = []
    for width in (48, 16):
        weight = torch.randn(width, 32, generator=generator).to(dtype)
        added = torch.randn(width, generator=generator).to(dtype) if bias else None
        methods.append(LINEAR_METHODS[quantization](weight, added))
    merged = type(methods[0]).merged(methods).apply(x)
    expected = torch.cat([method.apply(x) for method in methods], 1)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(merged, expected, atol=tolerance, rtol=0)

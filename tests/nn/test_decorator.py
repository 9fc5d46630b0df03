"""The decorator of model classes: what runs in place of a forward, and what else is unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minisrv.compile.decorator import Compiled, support_torch_compile


@support_torch_compile(dynamic_dims={"input_ids": 0, "positions": 0, "out": 0})
class Sum(nn.Module):
    def forward(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
        out.copy_(input_ids + positions)


def difference(input_ids: Tensor, positions: Tensor, out: Tensor) -> None:
    out.copy_(input_ids - positions)


def run(model: nn.Module) -> list[int]:
    ids, positions, out = torch.arange(3), torch.ones(3, dtype=torch.int64), torch.zeros(3)
    assert model(ids, positions, out) is None
    return [int(value) for value in out]


def test_an_instance_runs_its_forward_until_something_takes_its_place():
    model, other = Sum(), Sum()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    assert run(model) == [1, 2, 3]
    model.compiled = difference
    assert run(model) == [-1, 0, 1]
    assert run(other) == [1, 2, 3], "another instance of the class"
    model.compiled = None
    assert run(model) == [1, 2, 3]
    assert calls == ["forward"] * 2, "hooks are called as before"


def test_what_is_compiled_is_no_part_of_the_model():
    """Loaders and `prepare` walk through the modules of a model, and must not come upon it."""
    model = Sum()
    model.compiled = lambda ids, positions, out: None
    assert [*model.modules()] == [model]
    assert model.state_dict() == {}
    assert Sum.dynamic_dims == {"input_ids": 0, "positions": 0, "out": 0}


def test_compiled_code_may_describe_its_attention_layers_in_another_way():
    model = Sum()
    model.own_attention_layers = ["own"]
    assert model.attention_layers == ["own"]

    class Other(Compiled):
        def __call__(self, input_ids: Tensor, positions: Tensor, out: Tensor) -> None: ...

        def attention_layers(self, own: Any) -> Any:
            return [*own, "other"]

    model.compiled = Other()
    assert model.attention_layers == ["own", "other"]
    model.compiled = None
    assert model.attention_layers == ["own"]

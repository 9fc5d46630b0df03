"""The graph wrapper: which calls replay a graph, which pass through to the model, and what crosses
a break between pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minisrv.errors import GraphError
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.forward_context import (
    ForwardContext,
    get_forward_context,
    set_forward_context,
)
from minisrv.graph.wrapper import CUDAGraphWrapper
from minisrv.kernels import AttentionMetadata
from minisrv.modes import BatchDescriptor, CUDAGraphMode

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


class Model:
    """A model of two layers, each of which doubles its input, attends and adds. Attention doubles
    its argument and records the context of each call.
    """

    def __init__(self) -> None:
        ints = torch.zeros(4, dtype=torch.int32)
        self.attn = AttentionMetadata(
            slot_mapping=ints,
            block_table=ints,
            seq_lens=ints,
            query_start_loc=ints,
            max_query_len=1,
        )
        self.qkv, self.out = torch.zeros(4), torch.zeros(4)
        self.x, self.result = torch.ones(4), torch.zeros(4)
        self.calls: list[str] = []
        self.attended: list[ForwardContext] = []

    def attention(self) -> None:
        context = get_forward_context()
        if context.graph_break is not None:
            context.graph_break(self.attention)
            return
        self.attended.append(context)
        torch.mul(self.qkv, 2, out=self.out)

    def layer(self, residual: torch.Tensor) -> torch.Tensor:
        torch.mul(residual, 2, out=self.qkv)
        self.attention()
        return residual + self.out

    def __call__(self, x: torch.Tensor) -> None:
        self.calls.append("model")
        self.result.copy_(self.layer(self.layer(x)))

    def context(self, mode: CUDAGraphMode, tokens: int = 4) -> ForwardContext:
        return ForwardContext(mode, BatchDescriptor(tokens), self.attn)


@pytest.mark.parametrize("mode", [PIECEWISE, FULL])
def test_replay_gives_what_the_runnable_gives(mode):
    model = Model()
    wrapper = CUDAGraphWrapper(model, mode, CPUTapeBackend())
    with set_forward_context(model.context(mode)):
        graph = wrapper.capture(model.x)
        wrapper.install(BatchDescriptor(4), graph)
        model.x.fill_(3)
        model.calls.clear()
        wrapper(model.x)
    assert model.calls == [], "no Python of the model runs"
    assert torch.equal(model.result, torch.full((4,), 75.0))
    assert len(graph.calls) == (5 if mode is PIECEWISE else 1)


def test_attention_is_skipped_under_piecewise_capture_and_sees_the_current_context():
    model = Model()
    wrapper = CUDAGraphWrapper(model, PIECEWISE, CPUTapeBackend())
    with set_forward_context(model.context(PIECEWISE)):
        wrapper.install(BatchDescriptor(4), wrapper.capture(model.x))
    assert model.attended == []
    current = model.context(PIECEWISE)
    with set_forward_context(current):
        wrapper(model.x)
    assert model.attended == [current, current]


def test_a_graph_that_is_not_installed_runs_only_where_the_context_names_it():
    model = Model()
    wrapper = CUDAGraphWrapper(model, FULL, CPUTapeBackend())
    context = model.context(FULL)
    with set_forward_context(context):
        graph = wrapper.capture(model.x)
        model.calls.clear()
        with pytest.raises(GraphError, match="no FULL graph is installed"):
            wrapper(model.x)
    model.x.fill_(3)
    with set_forward_context(replace(context, graph=graph)):
        wrapper(model.x)
    assert model.calls == []
    assert torch.equal(model.result, torch.full((4,), 75.0))
    assert not wrapper.graphs


@pytest.mark.parametrize("mode", [NONE, FULL])
def test_another_mode_passes_through(mode):
    model = Model()
    wrapper = CUDAGraphWrapper(model, PIECEWISE, CPUTapeBackend())
    with set_forward_context(model.context(mode)):
        wrapper(model.x)
    assert model.calls == ["model"]
    assert torch.equal(model.result, torch.full((4,), 25.0))


def test_a_key_that_was_not_captured_is_an_error_not_an_eager_run():
    """A descriptor without a captured graph raises an error and does not run eagerly unnoticed."""
    model = Model()
    wrapper = CUDAGraphWrapper(model, PIECEWISE, CPUTapeBackend())
    with (
        set_forward_context(model.context(PIECEWISE, tokens=8)),
        pytest.raises(GraphError, match="num_tokens=8"),
    ):
        wrapper(model.x)
    assert model.calls == []


def test_an_error_under_capture_leaves_no_graph_and_no_recording():
    model = Model()
    backend = CPUTapeBackend()

    def fails(x: torch.Tensor) -> None:
        x.sum().item()

    wrapper = CUDAGraphWrapper(fails, FULL, backend)
    with set_forward_context(model.context(FULL)), pytest.raises(GraphError):
        wrapper.capture(model.x)
    assert not wrapper.graphs
    assert model.x.sum().item() == 4


def test_contexts_nest_and_are_restored():
    model = Model()
    outer, inner = model.context(FULL), model.context(NONE)
    with set_forward_context(outer):
        with set_forward_context(inner):
            assert get_forward_context() is inner
        assert get_forward_context() is outer
    with pytest.raises(AssertionError):
        get_forward_context()

"""The attention op: what recorders and compilers see of it, where its arguments come from, and how
graphs are captured around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.errors import GraphCaptureError
from minisrv.graph.attention import attention_op
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.forward_context import set_forward_context
from minisrv.graph.wrapper import CUDAGraphWrapper
from minisrv.kernels import attention
from minisrv.modes import CUDAGraphMode
from tests.kernels.attention_cases import Case, make_case

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_recorders_see_one_op():
    """A recorder sees one operation, which gives the same bits as the kernel under it."""
    case = make_case([(5, 1), (0, 7)], pad_tokens=1)
    expected = case.copy().run(attention)
    with Recorder() as recorder:
        found = case.run_op()
    assert recorder.seen == [attention_op]
    assert torch.equal(found, expected)


def test_schema_tells_which_argument_is_written():
    case = make_case([(5, 1), (0, 7)], poison=0.0)
    args = (case.args["qkv"], case.args["positions"], case.args["out"], 0)
    with set_forward_context(case.context):
        torch.library.opcheck(attention_op, args, test_utils=("test_schema", "test_faketensor"))


def decode_case() -> Case:
    return make_case([(5, 1), (2, 1)], head_dim=64)


def model_of(case: Case) -> Callable[[], None]:
    """Return a model of one layer: a product into the op's argument, attention, and a product of
    its result."""
    args = case.args
    source, result = args["qkv"].clone(), torch.zeros_like(args["out"])

    def run() -> None:
        torch.mul(source, 0.5, out=args["qkv"])
        attention_op(args["qkv"], args["positions"], args["out"], 0)
        torch.mul(args["out"], 2.0, out=result)

    run.result = result
    return run


@pytest.mark.parametrize(("mode", "pieces"), [(FULL, 1), (PIECEWISE, 2)])
def test_a_graph_is_captured_around_the_op(mode, pieces):
    """The op breaks a capture in pieces, and is part of a FULL one; a replay gives the bits of an
    eager run."""
    eager, case = decode_case(), decode_case()
    run = model_of(eager)
    with set_forward_context(eager.context):
        run()
    model = model_of(case)
    wrapper = CUDAGraphWrapper(model, mode, CPUTapeBackend())
    with set_forward_context(replace(case.context, mode=mode)):
        graph = wrapper.capture()
        model.result.zero_()
        wrapper.install(case.context.descriptor, graph)
        wrapper()
    assert len(graph.calls) == 2 * pieces - 1
    assert torch.equal(model.result, run.result)


@pytest.mark.parametrize("mode", [FULL, PIECEWISE])
def test_only_pieces_take_the_metadata_of_their_replay(mode):
    """Between pieces attention takes the metadata of the replay. A FULL graph keeps those of its
    capture, as a CUDA graph does, so it is wrong for others."""
    case, later = decode_case(), decode_case()
    later.args["seq_lens"] = later.args["seq_lens"] - 1
    model = model_of(case)
    wrapper = CUDAGraphWrapper(model, mode, CPUTapeBackend())
    found = []
    with set_forward_context(replace(case.context, mode=mode)):
        wrapper.install(case.context.descriptor, wrapper.capture())
    for metadata in (case.metadata, later.metadata):
        with set_forward_context(replace(case.context, mode=mode, attn_metadata=metadata)):
            wrapper()
        found.append(model.result.clone())
    assert torch.equal(*found) == (mode is FULL)


@pytest.mark.parametrize("name", ["qkv", "positions", "out"])
def test_an_intermediate_of_the_capture_cannot_cross_a_break(name):
    """An intermediate has no address yet while pieces are captured, so it is refused as an argument
    of the op there. A FULL graph gives it one."""
    case = decode_case()

    def run() -> None:
        args = case.args | {name: case.args[name] * 1}
        attention_op(args["qkv"], args["positions"], args["out"], 0)

    full, pieces = (CUDAGraphWrapper(run, mode, CPUTapeBackend()) for mode in (FULL, PIECEWISE))
    with set_forward_context(replace(case.context, mode=FULL)):
        full.capture()
    with (
        set_forward_context(replace(case.context, mode=PIECEWISE)),
        pytest.raises(GraphCaptureError, match="pass it in a static buffer"),
    ):
        pieces.capture()
    assert not pieces.graphs


def test_an_error_between_pieces_leaves_nothing_recording():
    """The backend can be used again after a capture that failed within the op."""
    case, backend = decode_case(), CPUTapeBackend()

    def fails(between: Callable[[], None]) -> None:
        backend.end()
        raise RuntimeError("stopped between two pieces")

    backend.begin()
    with (
        set_forward_context(replace(case.context, graph_break=fails)),
        pytest.raises(RuntimeError, match="stopped between"),
    ):
        model_of(case)()
    backend.abandon()
    x = torch.ones(2)
    backend.begin()
    x.add_(1)
    replay = backend.end()
    backend.finish()
    replay()
    assert x.tolist() == [3, 3]
    assert len(replay.calls) == 1

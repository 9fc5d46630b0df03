"""A compiled program computes what the model's own forward computes, and a graph holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minisrv.compile.program import LoadedPiece, Program, pieces_by_number
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.forward_context import ForwardContext, set_forward_context
from minisrv.graph.wrapper import CUDAGraphWrapper
from minisrv.modes import CUDAGraphMode
from tests.compile.compiled import Compiled
from tests.nn.driver import Driver

pytestmark = pytest.mark.compiler

BATCHES = {1: [1], 2: [1, 1], 3: [3], 7: [1, 2, 4], 128: [32, 32, 32, 32]}
"""Numbers of tokens of the requests in a step, by their sum; 128 are the most."""

Step = tuple[Tensor, Tensor, ForwardContext]


def step_of(driver: Driver, rows: int) -> Step:
    batch = [(i, [3 + 7 * i + j for j in range(count)]) for i, count in enumerate(BATCHES[rows])]
    return driver.context(batch)


def as_compiled(step: Step, program: Program, driver: Driver) -> Step:
    """Return a step with the attention layers that a program calls the op for."""
    layers = program.attention_layers(driver.model.attention_layers)
    return (*step[:2], replace(step[2], layers=layers))


def run(function: Callable[..., None], step: Step, width: int) -> Tensor:
    """Return the hidden states of a step."""
    ids, positions, context = step
    out = torch.full((len(ids), width), torch.nan)
    with torch.inference_mode(), set_forward_context(context):
        function(ids, positions, out)
    return out


@pytest.fixture
def driver(program: Compiled) -> Driver:
    return Driver(program.model, max_len=32)


@pytest.fixture
def loaded(driver: Driver, program: Compiled) -> Program:
    found = Program.load(program.directory, program.model)
    assert found is not None
    return found


@pytest.mark.parametrize("rows", BATCHES)
def test_a_step_is_that_of_the_models_own_forward(driver: Driver, loaded: Program, rows: int):
    model, step = driver.model, step_of(driver, rows)
    width = model.config.hidden_size
    expected = run(model.forward, step, width)
    step = as_compiled(step, loaded, driver)
    computed = run(loaded, step, width)
    torch.testing.assert_close(computed, expected, atol=1e-4, rtol=0)
    with torch.inference_mode():
        tokens = [model.compute_logits(hidden).argmax(-1) for hidden in (expected, computed)]
    assert torch.equal(*tokens)
    for value in loaded.buffers:
        value.fill_(torch.nan)
    assert torch.equal(run(loaded, step, width), computed), "nothing is left over from a step"


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_replay_is_bit_equal_to_the_run(
    driver: Driver, loaded: Program, mode: CUDAGraphMode, rows: int
):
    ids, positions, context = as_compiled(step_of(driver, rows), loaded, driver)
    width = driver.model.config.hidden_size
    expected = run(loaded, (ids, positions, context), width)
    wrapper = CUDAGraphWrapper(loaded, mode, CPUTapeBackend())
    out = torch.empty_like(expected)
    with torch.inference_mode(), set_forward_context(replace(context, mode=mode)):
        wrapper.install(context.descriptor, wrapper.capture(ids, positions, out))
        out.fill_(torch.nan)
        for value in loaded.buffers:
            value.fill_(torch.nan)
        wrapper(ids, positions, out)
    assert torch.equal(out, expected)
    layers = driver.model.config.num_layers
    [graph] = wrapper.graphs.values()
    pieces = layers + 1 if mode is CUDAGraphMode.PIECEWISE else 1
    assert len(graph.calls) == 2 * pieces - 1


def test_too_many_rows_are_refused_before_a_package_runs(
    driver: Driver, loaded: Program, monkeypatch: pytest.MonkeyPatch
):
    calls: list[object] = []
    monkeypatch.setattr(LoadedPiece, "run", lambda *_: calls.append(1))
    rows = torch.zeros(129, dtype=torch.int64)
    with pytest.raises(AssertionError, match="129 rows"):
        loaded(rows, rows, torch.empty(129, driver.model.config.hidden_size))
    assert not calls


def test_a_program_that_is_forgotten_leaves_no_packages(one_program: Compiled):
    Driver(one_program.model)
    before = len(pieces_by_number)
    found = Program.load(one_program.directory, one_program.model)
    assert found is not None
    assert len(pieces_by_number) == before + 2
    del found
    assert len(pieces_by_number) == before


def test_loading_leaves_no_files(
    one_program: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An engine is ended by a signal, and could remove nothing then."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    Driver(one_program.model)
    found = Program.load(one_program.directory, one_program.model)
    assert found is not None
    assert not list(tmp_path.iterdir())
    assert os.environ["TMPDIR"] == str(tmp_path)


def test_loading_imports_no_compiler(one_program: Compiled):
    code = f"""
import sys, torch
from pathlib import Path
from minisrv.checkpoint import describe_model
from minisrv.compile.program import Program
from minisrv.nn.loader import load_model
directory = Path({str(one_program.job.directory)!r})
model = load_model(describe_model(directory, "minisrv").model, directory, dtype=torch.float32)
model.prepare()
model.allocate_buffers(8)
assert Program.load(Path({str(one_program.directory)!r}), model) is not None
found = {{"torch._inductor", "torch._dynamo", "triton", "sympy"}} & sys.modules.keys()
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)

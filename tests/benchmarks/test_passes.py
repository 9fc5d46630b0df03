"""benchmarks/passes.py: passes are added one after the other, and all codes run the same step."""

from __future__ import annotations

import pytest

from benchmarks.passes import Measurement, Way, capture, jobs_of, steps_of
from minisrv.certification.batches import BatchRow
from minisrv.compile.modes import CompilationMode
from minisrv.compile.passes import PASSES, apply_passes
from minisrv.compile.program import Program
from minisrv.compile.split import split
from minisrv.compile.trace import trace
from minisrv.compile.values import Description
from minisrv.config import EngineConfig
from minisrv.engine.builder import EngineParts, build_engine
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.modes import CUDAGraphMode
from minisrv.runner.generation import Generation
from tests.checkpoints import make_checkpoint
from tests.compile.compiled import make
from tests.compile.interpreted import InterpretedPiece

LAYERS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    settings = {"num_hidden_layers": LAYERS, "head_dim": 32, "max_position_embeddings": 256}
    directory = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", **settings)
    return EngineConfig(
        model=str(directory),
        model_impl="transformers",
        dtype="float32",
        device="cpu",
        max_num_seqs=2,
        max_num_batched_tokens=32,
        cudagraph_capture_sizes=(2, 32),
        compilation_mode=CompilationMode.NONE,
    )


@pytest.fixture(scope="module")
def parts(config: EngineConfig) -> EngineParts:
    return build_engine(config)


def test_each_program_has_one_more_pass(parts: EngineParts, config: EngineConfig) -> None:
    jobs = jobs_of(parts, config)
    passes = [job.passes for job in jobs.values()]
    assert passes == [tuple(PASSES)[:count] for count in range(len(PASSES) + 1)]
    assert len({job.key() for job in jobs.values()}) == len(jobs)


def test_the_steps_are_full_and_run_by_the_graphs_that_a_server_has(parts: EngineParts) -> None:
    batch, prompt = steps_of(parts, [2], [32])
    assert (batch.name, batch.key[0], batch.key[1].num_tokens) == ("batch 2", CUDAGraphMode.FULL, 2)
    assert [row.is_decode for row in batch.batch] == [True, True]
    assert (prompt.key[0], prompt.key[1].num_tokens) == (CUDAGraphMode.PIECEWISE, 32)
    assert prompt.batch == (BatchRow(0, 32),)


NO_MATCH = {"normed products added to residuals"}
"""The passes for what the model of this test does not have: norms behind products."""


def test_every_pass_leaves_fewer_operations(parts: EngineParts, config: EngineConfig) -> None:
    """Pieces are run by torch's operations here, which count one by one. Every graph is certified
    when it is captured."""
    steps, runner = steps_of(parts, [2], [32]), parts.runner
    ways = {"mode 0": Way(Generation.in_service(runner))}
    operations = []
    for name, job in jobs_of(parts, config).items():
        traced = trace(lambda job=job: make(job, "dummy"), "cpu")
        matches = apply_passes(traced, job.passes)
        assert list(matches) == [one for one in PASSES if one in (job.passes or ())]
        assert all(matches[one] for one in matches if one not in NO_MATCH), name
        schedule = split(traced)
        pieces = [InterpretedPiece(piece) for piece in schedule.pieces]
        description = Description(job.max_rows, matches, [], schedule.calls)
        program = Program(description, pieces, runner.model)
        ways[name] = Way(Generation.empty(runner, CPUTapeBackend(), program))
        capture(parts, ways[name].generation, steps)
        operations.append(sum(len(piece.graph.graph.nodes) for piece in schedule.pieces))
    assert operations == sorted(operations, reverse=True)
    for step in steps:
        found = Measurement(parts, ways, rounds=1).measure(step)
        assert list(found) == list(ways)
        assert all(len(result["all_ms"]) == 2 for result in found.values())
        counts = {name: result["operations"] for name, result in found.items()}
        assert counts["mode 0"] > counts["no passes"], "the call of a piece is one"
        assert {result["kernels"] for result in found.values()} == {None}
    assert runner.model.compiled is None

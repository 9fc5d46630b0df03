"""Print as JSON the keys in Triton's cache that an engine on an H100, which need not be there, asks
for.

It is a process of its own because Triton's interpreter, in which other tests run kernels without a
GPU, compiles nothing, and because a process that has recorded launches nothing any more.
Arguments: "rehearsed", for the launches that are rehearsed before a start, or "made", for those of
the trials of a start-up and of steps with penalties, whose tensors have memory, that of the CPU;
the checkpoint; the implementation of the model; the graph mode; the directory of a program that
computes the model, if one does. It is "made" first: the model is traced as on a GPU, what the
pieces do is done by torch's operations and ops of the server, and its description is left in the
directory.
"""

# ruff: noqa: E402, the ops are defined by an import

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

H100 = (9, 0), 132
LIMITS = {"max_num_seqs": 12, "max_num_batched_tokens": 96}

_impl = torch.library.impl


def _impl_of_gpu(op: str, device: str, function: Callable[..., None]) -> None:
    """Have the implementation for CUDA take the tensors of the CPU."""
    if device != "cpu":
        _impl(op, "default", function)


if sys.argv[1] == "made":
    torch.library.impl = _impl_of_gpu
    import minisrv.graph.attention  # noqa: F401, which defines all ops

    torch.library.impl = _impl

from minisrv.certification.batches import full_batch, short_batch
from minisrv.certification.compare import InitialState
from minisrv.certification.rehearsal import with_changed_logits
from minisrv.certification.trial import StepTrial, reserved_space
from minisrv.checkpoint import describe_model
from minisrv.compile import artifacts
from minisrv.compile.program import Program
from minisrv.compile.values import Description, PieceFile
from minisrv.compile.worker import CompileJob
from minisrv.config import EngineConfig
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import ladders_of
from minisrv.device_kind import CUDA
from minisrv.engine.kernels import KernelJob, prefer_native_meta, record
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.kernels import (
    attention,
    gluon_attention,
    linear,
    triton_attention,
    triton_launch,
    triton_step_inputs,
)
from minisrv.kernels.gpu import GPU
from minisrv.kernels.triton_recording import Recording
from minisrv.modes import BatchDescriptor, CUDAGraphMode, StageOutput
from minisrv.nn.loader import load_model
from minisrv.runner import input_buffers
from minisrv.runner.model_runner import ModelRunner

if sys.argv[1] == "made":  # they import torch's compiler
    from tests.compile.compiled import schedule_of
    from tests.compile.interpreted import InterpretedPiece


def job_of(
    directory: Path, implementation: str, mode: str, program: str | None = None, **changes: int
) -> KernelJob:
    """Return the job of an engine that serves a checkpoint."""
    config = CUDA.resolve(
        EngineConfig(device="cuda", cudagraph_mode=CUDAGraphMode(mode), **{**LIMITS, **changes})
    )
    model = describe_model(directory, implementation).model.for_context(256)
    ladders, kept = ladders_of(config), None if program is None else Path(program)
    return KernelJob(model, directory, "bfloat16", None, ladders, 16, GPU(*H100), kept)


def make_program(job: KernelJob, directory: Path) -> tuple[Description, list[InterpretedPiece]]:
    """Return the program of a model that its pieces compute without a compiler, and leave it in a
    directory, where only the packages have nothing in them."""
    model, rows = job.model, LIMITS["max_num_batched_tokens"]
    schedule = schedule_of(
        CompileJob(model, job.directory, job.dtype, job.quantization, "cpu", 1, rows)
    )
    files = []
    for piece in schedule.pieces:
        key = piece.digest("launches")
        digest = artifacts.write_package(key, artifacts.Package([], b""))
        files.append(PieceFile(key, digest, piece.kernels))
    description = Description(rows, {}, files, schedule.calls)
    artifacts.write_description(directory, msgspec.msgpack.encode(description))
    return description, list(map(InterpretedPiece, schedule.pieces))


def made(job: KernelJob) -> dict[str, Any]:
    """Return the kernels that the trials of a start-up launch."""
    assert job.gpu is not None
    for module in (gluon_attention, linear, triton_launch):
        module.gpu_of = lambda device: job.gpu  # type: ignore[attr-defined]
    sys.modules[attention.__module__].attention_on_cpu = triton_attention.attention
    input_buffers.write_values = triton_step_inputs.write_values
    traced = None if job.program is None else make_program(job, job.program)
    cpu, dtype, blocks = torch.device("cpu"), torch.bfloat16, 120
    with Recording(job.gpu) as recording, torch.no_grad():
        model = load_model(job.model, job.directory, dtype=dtype, load_format="dummy")
        model.prepare()
        runner = ModelRunner(
            model,
            job.model,
            job.ladders,
            CPUTapeBackend(),
            num_blocks=blocks,
            block_size=job.block_size,
            max_model_len=job.model.max_position_embeddings,
            dtype=dtype,
            device=cpu,
        )
        if traced is not None:
            model.compiled = Program(*traced, model)
        with reserved_space(runner, BlockPool(blocks, job.block_size)) as space:
            limits = space.limits(runner)
            largest = BatchDescriptor(job.ladders.max_num_batched_tokens)
            trials = [((CUDAGraphMode.NONE, largest), full_batch(largest, limits))]
            trials += [(key, short_batch(key[1], limits)) for key in job.ladders.keys()]  # noqa: SIM118
            for key, batch in trials:
                trial = StepTrial(runner, space, key, batch)
                trial.reset(InitialState.CLEAN)
                trial.run(None)
                if key[1].output is StageOutput.LOGITS:
                    trial.output = with_changed_logits(trial.output)
                    runner.processors.update_requests(trial.output)
                    trial.run(None)
    return recording.kernels


if __name__ == "__main__":
    what, directory, *how = sys.argv[1:]
    job = job_of(Path(directory), *how)
    if what == "rehearsed":
        prefer_native_meta()
    kernels = made(job) if what == "made" else record(job)[0]
    if what == "rehearsed" and job.model.implementation == "minisrv":
        assert not {"sympy", "torch._dynamo"} & sys.modules.keys(), "they take long to import"
    print(json.dumps(sorted(kernels)))

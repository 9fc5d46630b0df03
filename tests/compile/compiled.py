"""Small models that are compiled once for all tests and all processes that run them."""

from __future__ import annotations

import fcntl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minisrv.cache import cache_directory
from minisrv.checkpoint import describe_model
from minisrv.compile.passes import apply_passes
from minisrv.compile.split import Schedule, split
from minisrv.compile.trace import trace
from minisrv.compile.worker import CompileJob, CompileProcess, Progress
from minisrv.nn.loader import load_model
from tests.checkpoints import make_checkpoint

SHAPE = {"num_hidden_layers": 3, "head_dim": 32}


@dataclass
class Compiled:
    """A compiled program, the job of which it was made, and the model."""

    job: CompileJob
    directory: Path
    model: Any


def job_of(directory: Path, implementation: str, **changes: Any) -> CompileJob:
    model = describe_model(directory, implementation).model
    settings: dict[str, Any] = {
        "model": model,
        "directory": directory,
        "dtype": "float32",
        "quantization": None,
        "device": "cpu",
        "threads": 1,
        "max_num_tokens": 64,
    }
    return CompileJob(**{**settings, **changes})


def make(job: CompileJob, load_format: str = "auto") -> Any:
    model = load_model(
        job.model,
        job.directory,
        dtype=getattr(torch, job.dtype),
        device=job.device,
        load_format=load_format,
    )
    model.prepare(quantization=job.quantization)
    return model


def schedule_of(job: CompileJob) -> Schedule:
    """Return the pieces of a model and their calls, which takes no compiler of C++."""
    traced = trace(lambda: make(job, "dummy"), "cpu")
    apply_passes(traced)
    return split(traced)


def compiled(directory: Path, implementation: str) -> Compiled:
    """Return a model with its compiled program, which is kept for later runs of the tests."""
    make_checkpoint(directory, "qwen3", **SHAPE)
    job = job_of(directory, implementation)
    with (cache_directory() / "compiling.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = job.kept_program()
        if kept is None:
            kept = run(CompileProcess(job))
    return Compiled(job, kept, make(job))


def run(process: CompileProcess) -> Any:
    """Wait for a process that compiles, and return its answer."""
    try:
        while isinstance(answer := process.poll(), Progress):
            time.sleep(0.05)
    finally:
        process.close()
    return answer

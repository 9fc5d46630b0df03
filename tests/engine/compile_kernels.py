"""Compile the kernels of a small engine on an H100, which need not be there, as a start does, and
print what is logged. Then compile a kernel that no engine has, as a launch does of a kernel
that was not compiled ahead.

It is a process of its own because Triton's interpreter, in which other tests run kernels without a
GPU, compiles nothing. Argument: the checkpoint.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minisrv.checkpoint import describe_model
from minisrv.config import EngineConfig
from minisrv.core.ladder import ladders_of
from minisrv.device_kind import CUDA
from minisrv.engine import kernels
from minisrv.engine.kernels import KernelJob, compiled_kernels
from minisrv.kernels.gpu import GPU


@triton.jit
def unlisted(pointer):
    """Do what no kernel of an engine does."""
    tl.store(pointer, 1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    kernels.logger.setLevel(logging.INFO)
    directory = Path(sys.argv[1])
    config = CUDA.resolve(EngineConfig(device="cuda", max_num_seqs=1, max_num_batched_tokens=8))
    model = describe_model(directory, "minisrv").model
    ladders = ladders_of(config)
    job = KernelJob(model, directory, "bfloat16", None, ladders, 16, GPU((9, 0), 132))
    with compiled_kernels(job, lambda done, total: None):
        pass
    triton.compile(ASTSource(unlisted, {"pointer": "*i32"}, {}), target=GPUTarget("cuda", 90, 32))

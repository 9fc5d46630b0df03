"""Triton's kernels are compiled by other processes while the weights load.

Triton compiles a kernel when it is first launched, one after the other, and graphs are captured of
kernels that have been launched. All launches of an engine follow from its settings, so one process
rehearses them without a GPU (`certification.rehearsal`), and as many as there are cores, within
limits, compile what it has recorded into Triton's cache. A list of what has been compiled is kept;
a start that finds all of it in Triton's cache starts no process.

Nothing depends on it: a kernel that is not in the cache is compiled when it is first launched. So
whatever fails here is told as a warning.

Knows: Triton's cache, and the processes that fill it. Knows nothing of what a kernel computes.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, _meta_registrations
from torch._decomp import global_decomposition_table
from torch._ops import OpOverload
from torch.library import Library

from minisrv import threads
from minisrv.cache import read_cached, write_cached
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.engine.kernel_process import (
    TRITON_CACHE,
    Compiled,
    KernelProcess,
    Progress,
    lists_directory,
)
from minisrv.kernels.gpu import GPU
from minisrv.machine import available_memory
from minisrv.model_config import ModelConfig
from minisrv.processes import die_with_parent

logger = logging.getLogger(__name__)

MOST_PROCESSES = 16
"""Maximum number of processes that compile at a time: with more, the kernel that takes longest
would determine the time."""

PROCESS_BYTES = 128 << 20
"""Number of bytes of memory that a process, with the assembler that it runs, takes for itself."""


@dataclass(frozen=True)
class KernelJob:
    """What decides which kernels an engine launches.

    directory: the checkpoint, of which config.json is read.
    dtype: torch's name of the dtype of serving.
    quantization: a key of `LINEAR_METHODS`.
    gpu: the GPU that launches them; None for a CPU, whose kernels are the same for all models.
    program: the directory of the compiled program that computes the model; None for its own code.
    """

    model: ModelConfig
    directory: Path
    dtype: str
    quantization: str | None
    ladders: Ladders
    block_size: int
    gpu: GPU | None
    program: Path | None = None

    def key(self) -> str:
        """Return the key of the list of what was compiled for this job, among the lists of the same
        code. Raises OSError if the checkpoint cannot be read."""
        code = version("transformers") if self.model.implementation == "transformers" else ""
        parts = repr(self), code
        described = (self.directory / "config.json").read_bytes()
        return hashlib.sha256("\0".join(parts).encode() + described).hexdigest()[:32]


@contextmanager
def compiled_kernels(
    job: KernelJob, progress: Progress, early: KernelProcess | None = None
) -> Iterator[None]:
    """Compile the kernels of a job beside the block, and wait for them behind it. If an error ends
    the block, nothing is waited for.

    early: a process that was started before the job was known; None starts one if need be. It has
        ended when this returns.
    """
    process = None
    try:
        process = _start(job, early)
    except Exception as error:  # as on a machine where no process can be started
        _warn(f"{type(error).__name__}: {error}")
    if process is None:
        if early is not None:
            early.close()
        yield
        return
    try:
        yield
        found = process.wait(progress)
    finally:
        process.close()
    _tell(job, found)


def compiled_meanwhile(job: KernelJob) -> Generator[None, None, str]:
    """Compile the kernels of a job while an engine serves: yield as long as other processes do, and
    return why they could not, or an empty text. A CPU needs none."""
    if job.gpu is None:
        return ""
    try:
        process = _start(job, None)
    except Exception as error:  # as on a machine where no process can be started
        _warn(_said(error))
        return _said(error)
    if process is None:
        return ""
    try:
        while (found := process.poll(lambda done, total: None)) is None:
            yield
        while not process.kill():
            yield
    finally:
        process.close()
    _tell(job, found)
    return found if isinstance(found, str) else " ".join(found.failed)


def _tell(job: KernelJob, found: Compiled | str) -> None:
    """Log what was compiled, or why nothing was, and keep the list of it."""
    if isinstance(found, str):
        _warn(found)
        return
    text = "compiled %d kernels in %.1f s by %d processes"
    logger.info(text, found.kernels, found.seconds, found.processes)
    for why in (*found.unknown, *found.failed):
        _warn(why)
    if found.files and not found.failed:
        _keep(job, found)


def kernel_cache() -> Path:
    """Return the directory of Triton's cache, which may not exist yet. Raises ImportError without
    Triton."""
    from triton import knobs

    return Path(knobs.cache.dir)


def kept_list(job: KernelJob, directory: Path) -> Path | None:
    """Return the file that lists the kernels of a job, if there is one and all of them are in a
    directory of Triton's cache."""
    path = _list_path(job)
    listed = _listed(path)
    return None if listed is None or _damaged(directory, listed) else path


def _warn(why: str) -> None:
    logger.warning("not all kernels were compiled ahead, and are when they first run: %s", why)


def _start(job: KernelJob, early: KernelProcess | None) -> KernelProcess | None:
    """Start to compile, by a process that has been started early or else by a new one; return None
    if everything is in the cache."""
    directory = kept = kernel_cache()
    if not _is_writable(kept):  # whatever the list says, a launch may need a kernel besides
        directory = _use_scratch(kept)
    if (listed := _listed(_list_path(job))) is not None:
        damaged = _damaged(directory, listed)
        if not damaged:
            logger.info("the kernels are in %s", kept)
            return None
        _forget(directory, damaged)
    if directory != kept:
        logger.warning(
            "kernels cannot be kept in %s, and are compiled again at the next start; set %s to a "
            "directory that can be written to.",
            kept,
            TRITON_CACHE,
        )
    process = early or KernelProcess()
    process.compile(job, directory)
    return process


def _use_scratch(kept: Path) -> Path:
    """Have Triton use a directory of this process in place of its cache, in which it finds
    everything that the cache has. The directory is removed when the process exits."""
    scratch = Path(tempfile.mkdtemp(prefix="minisrv-triton-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ[TRITON_CACHE] = str(scratch)
    # The directories are new, because Triton writes to that of a kernel that is not whole.
    for path in kept.glob("*/*"):
        if path.is_file():
            link = scratch / path.parent.name / path.name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.absolute())
    return scratch


def _listed(path: Path | None) -> dict[str, int] | None:
    """Return the list of what was compiled for a job, if there is one."""
    body = None if path is None else read_cached(path)
    if body is None:
        return None
    try:
        return msgspec.msgpack.decode(body, type=dict[str, int])
    except msgspec.MsgspecError:
        return None


def _keep(job: KernelJob, compiled: Compiled) -> None:
    if (path := _list_path(job)) is not None:
        write_cached(path, msgspec.msgpack.encode(compiled.files))


def _list_path(job: KernelJob) -> Path | None:
    try:
        return lists_directory() / f"{job.key()}.msgpack"
    except (OSError, RuntimeError) as error:
        logger.warning("no list of compiled kernels can be kept: %s", error)
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _damaged(directory: Path, listed: dict[str, int]) -> list[str]:
    """Return the files that are not whole."""
    return [name for name, size in listed.items() if _size(directory / name) != size]


def _forget(directory: Path, damaged: list[str]) -> None:
    """Have Triton compile kernels again that are not whole.

    Only the list is removed by which Triton finds a kernel's files. Triton replaces each file as a
    whole and writes the list last, so a process that compiles the same kernel meanwhile loses none
    of the files that its list names.
    """
    for name in damaged:
        for path in (directory / name).parent.glob("__grp__*.json"):
            with suppress(OSError):
                path.unlink()


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


# ---- in the process ------------------------------------------------------------------------------

_recorded: list[Callable[[], Any]] = []
"""The recorded kernels, which the processes that compile have from the one that forks them."""


def run(line: Connection) -> None:
    """Run in the process: import what is needed, compile the job that comes, and send progress and
    the result."""
    try:
        _import_ahead()
        gc.freeze()  # so that processes that are forked do not copy what they do not change
        gc.enable()
        job: KernelJob
        job, cache = line.recv()
        os.environ[TRITON_CACHE] = str(cache)
        try:
            prefer_native_meta()
        except AttributeError:  # another version of torch may have other names
            logger.debug("recording imports torch's compiler", exc_info=True)
        line.send(compile_kernels(job, lambda done, total: line.send((done, total))))
    except EOFError:
        return  # nothing is to be compiled
    except Exception as error:
        line.send(_said(error))


def _said(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def prefer_native_meta() -> None:
    """Let operations on tensors without memory be torch's own in C++, where it has them.

    In front of these torch has others in Python. They give the same, but at the first call they
    import torch's compiler and sympy, which takes longer than recording all kernels. They stay for
    operations that have no others. To be called once, in a process that ends soon.
    """
    _meta_registrations._meta_lib_dont_use_me_use_register_meta._destroy()
    for table in ("meta", "post_autograd", "pre_autograd"):
        for op, function in global_decomposition_table[table].items():
            if isinstance(op, OpOverload) and op.namespace == "aten" and not op.is_view:
                name = op.name()
                if not any(_has_kernel(name, key) for key in _META):
                    _python_meta.impl(op, _SHORT.get(name, function))


def _index_select(source: Tensor, dim: int, index: Tensor) -> Tensor:
    shape = list(source.shape)
    shape[dim] = index.numel()
    return source.new_empty(shape)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return one + other + condition  # of the shape and the dtype of the result


_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

_META = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
"""The dispatch keys of what an operation does on tensors without memory."""

_SHORT: dict[str, Callable[..., Tensor]] = {
    "aten::index_select": _index_select,
    "aten::where.self": _where,
}
"""Operations that engines use and torch has in Python only, without its compiler."""

_python_meta = Library("aten", "IMPL", "Meta")


def _import_ahead() -> None:
    """Import what recording kernels needs, and compute what is the same for all of them, before it
    is known which are to be compiled."""
    for name in ("minisrv.certification.rehearsal", "minisrv.kernels.triton_recording"):
        import_module(name)
    from triton.runtime.cache import triton_key

    triton_key()  # a digest of all of Triton's files


def compile_kernels(job: KernelJob, progress: Progress) -> Compiled:
    """Record the kernels of a job, compile them in forked processes, and return what was
    compiled."""
    began = time.monotonic()
    torch.set_num_threads(1)
    failed: dict[str, None] = {}  # if a process ends, what is left fails for the same reason
    try:
        kernels, unknown = record(job)
    except Exception as error:  # as where the disk or the memory is full
        kernels, unknown = {}, []
        failed[_said(error)] = None
    _recorded[:] = kernels.values()
    total = len(_recorded)
    room = available_memory() // PROCESS_BYTES
    processes = max(1, min(threads.cores(), MOST_PROCESSES, total, room))
    found: list[dict[Path, int]] = []
    progress(0, total)
    fork = multiprocessing.get_context("fork")
    end = partial(die_with_parent, os.getpid())
    with ProcessPoolExecutor(processes, mp_context=fork, initializer=end) as pool:
        futures = [pool.submit(_compile, index) for index in range(total)]
        for done, future in enumerate(as_completed(futures), 1):
            try:
                found.append(future.result())
            except Exception as error:
                failed[_said(error)] = None
            progress(done, total)
    sizes = {path: size for made in found for path, size in made.items()}
    # Triton names the place where it wrote a file, which need not be the cache's of today.
    files = {f"{path.parent.name}/{path.name}": size for path, size in sizes.items()}
    seconds = time.monotonic() - began
    return Compiled(files, len(found), unknown, list(failed), seconds, processes)


def record(job: KernelJob) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Return the functions that compile the kernels of a job, by their keys in Triton's cache, and
    why launches are missing, in words. Raises whatever loading the model and `rehearse` raise."""
    from minisrv.certification.batches import BatchLimits, blocks_for_any_batch
    from minisrv.certification.rehearsal import rehearse
    from minisrv.compile.program import Program
    from minisrv.graph.cpu_tape import CPUTapeBackend
    from minisrv.kernels.triton_recording import Recording
    from minisrv.nn.loader import load_model
    from minisrv.runner.model_runner import ModelRunner

    dtype, meta = getattr(torch, job.dtype), torch.device("meta")
    described, ladders = job.model, job.ladders
    if described.implementation == "minisrv" and job.program is None:  # all layers launch the same
        described = replace(described, num_layers=1)
    context = described.max_position_embeddings
    sizes = ladders.max_num_seqs, ladders.max_num_batched_tokens, context
    blocks = 1 + blocks_for_any_batch(BatchLimits(*sizes, num_blocks=1, block_size=job.block_size))
    assert job.gpu is not None, "a CPU launches nothing of Triton's"
    with Recording(job.gpu) as recording, torch.no_grad():
        model = load_model(described, job.directory, dtype=dtype, device=meta, load_format="dummy")
        model.prepare(quantization=job.quantization)
        runner = ModelRunner(
            model,
            described,
            ladders,
            CPUTapeBackend(),  # no graph is captured
            num_blocks=blocks,
            block_size=job.block_size,
            max_model_len=context,
            dtype=dtype,
            device=meta,
        )
        if job.program is not None:
            model.compiled = Program.rehearsed(job.program, model)
        problems = rehearse(runner, BlockPool(blocks, job.block_size))
    return recording.kernels, problems


def _compile(index: int) -> dict[Path, int]:
    from minisrv.kernels.triton_recording import compile_recorded

    return {path: path.stat().st_size for path in compile_recorded(_recorded[index])}

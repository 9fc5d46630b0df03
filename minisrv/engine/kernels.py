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
import hashlib
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

from minisrv import threads
from minisrv.cache import cache_directory, read_cached, write_cached
from minisrv.compile import artifacts
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.kernels.gpu import GPU
from minisrv.machine import available_memory
from minisrv.model_config import ModelConfig
from minisrv.processes import ChildProcess, die_with_parent

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Function that is called with the number of kernels that have been compiled, and of all."""

MOST_PROCESSES = 16
"""Maximum number of processes that compile at a time: with more, the kernel that takes longest
would determine the time."""

PROCESS_BYTES = 128 << 20
"""Number of bytes of memory that a process, with the assembler that it runs, takes for itself."""

TIMEOUT = 300.0
"""Number of seconds after which a start no longer waits for the processes."""

_CACHE = "TRITON_CACHE_DIR"
_CODE = (
    *("core", "kernels", "graph", "nn", "runner", "certification"),
    *("checkpoint/transformers_decoder.py", "engine/kernels.py"),
)
"""The parts of the package on which the launches of an engine depend."""


@dataclass(frozen=True)
class KernelJob:
    """What decides which kernels an engine launches.

    directory: the checkpoint, of which config.json is read.
    dtype: torch's name of the dtype of serving.
    quantization: a key of `LINEAR_METHODS`.
    gpu: the GPU that launches them; None for a CPU, whose kernels are the same for all models.
    """

    model: ModelConfig
    directory: Path
    dtype: str
    quantization: str | None
    ladders: Ladders
    block_size: int
    gpu: GPU | None

    def key(self) -> str:
        """Return the key of the list of what was compiled for this job. Raises OSError if the
        checkpoint cannot be read."""
        settings = [
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(("TRITON_", "MINISRV_PDL")) and name != _CACHE
        ]
        code = version("transformers") if self.model.implementation == "transformers" else ""
        versions = torch.__version__, version("triton"), code, artifacts.code_digest(_CODE)
        parts = (repr(self), *versions, *settings)
        described = (self.directory / "config.json").read_bytes()
        return hashlib.sha256("\0".join(parts).encode() + described).hexdigest()[:32]


class Compiled(msgspec.Struct, frozen=True):
    """What has been compiled.

    files: the size in bytes of each file, by its path in Triton's cache.
    kernels: the number of kernels that are in the cache now.
    unknown: why launches could not be rehearsed, in words, so that their kernels are not known; it
        would be the same at the next start.
    failed: why kernels could not be compiled, or not even be recorded, in words; the next start
        tries again.
    seconds: how long it took.
    processes: the number of processes that compiled.
    """

    files: dict[str, int]
    kernels: int
    unknown: list[str]
    failed: list[str]
    seconds: float
    processes: int


@contextmanager
def compiled_kernels(job: KernelJob, progress: Progress) -> Iterator[None]:
    """Compile the kernels of a job beside the block, and wait for them behind it. If an error ends
    the block, nothing is waited for."""
    try:
        process = _start(job)
    except Exception as error:  # as on a machine where no process can be started
        _warn(f"{type(error).__name__}: {error}")
        yield
        return
    if process is None:
        yield
        return
    try:
        yield
        found = process.wait(progress)
    finally:
        process.close()
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


def _start(job: KernelJob) -> KernelProcess | None:
    """Start to compile; return None if everything is in the cache."""
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
            _CACHE,
        )
    return KernelProcess(job)


def _use_scratch(kept: Path) -> Path:
    """Have Triton use a directory of this process in place of its cache, in which it finds
    everything that the cache has. The directory is removed when the process exits."""
    scratch = Path(tempfile.mkdtemp(prefix="minisrv-triton-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ[_CACHE] = str(scratch)
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
        return cache_directory("kernels") / f"{job.key()}.msgpack"
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


class KernelProcess:
    """The engine's handle of the process that records kernels and has them compiled. It is to be
    made and used by one thread, with which the process ends."""

    def __init__(self, job: KernelJob, timeout: float = TIMEOUT) -> None:
        """Start the process at once.

        timeout: number of seconds after which `wait` gives up.
        """
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._answers, answers = Pipe(duplex=False)
        try:
            self._process = ChildProcess("kernels", _main, job, answers, private_dir=None)
        finally:
            answers.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait(self, progress: Progress) -> Compiled | str:
        """Wait until the process has finished, and return what it has compiled, or why it has
        failed."""
        while self._answers.poll(max(0.0, self._deadline - time.monotonic())):
            try:
                said = self._answers.recv()
            except (EOFError, OSError):
                return f"the process ended {self._process.describe_exit()}"
            if isinstance(said, Compiled | str):
                return said
            progress(*said)
        return f"it took longer than {self._timeout:g} s"

    def close(self) -> None:
        """End the process if it runs."""
        self._process.stop()
        self._answers.close()


# ---- in the process ------------------------------------------------------------------------------

_recorded: list[Callable[[], Any]] = []
"""The recorded kernels, which the processes that compile have from the one that forks them."""


def _main(job: KernelJob, answers: Connection) -> None:
    try:
        answers.send(compile_kernels(job, lambda done, total: answers.send((done, total))))
    except Exception as error:
        answers.send(_said(error))


def _said(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()


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
    from minisrv.graph.cpu_tape import CPUTapeBackend
    from minisrv.kernels.triton_recording import Recording
    from minisrv.nn.loader import load_model
    from minisrv.runner.model_runner import ModelRunner

    dtype, meta = getattr(torch, job.dtype), torch.device("meta")
    described, ladders = job.model, job.ladders
    if described.implementation == "minisrv":  # all layers of this code launch the same
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
        problems = rehearse(runner, BlockPool(blocks, job.block_size))
    return recording.kernels, problems


def _compile(index: int) -> dict[Path, int]:
    from minisrv.kernels.triton_recording import compile_recorded

    return {path: path.stat().st_size for path in compile_recorded(_recorded[index])}

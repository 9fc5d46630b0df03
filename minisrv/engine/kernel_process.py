"""The process that has Triton's kernels compiled, as the engine's process sees it.

It imports torch, and so does the engine's process, which must do so before it knows what is to be
compiled. Where no kernel has been compiled yet, as on a new machine, the process is therefore
started before that, and both import at the same time.

Knows: how the process starts, answers and ends, and where the lists of what it has compiled lie.
Knows nothing of kernels. Only what runs in the process imports torch.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name

import msgspec

from minisrv.cache import cache_directory, code_digest
from minisrv.config import EngineConfig
from minisrv.machine import has_driver
from minisrv.processes import ChildProcess

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Function that is called with the number of kernels that have been compiled, and of all."""

TIMEOUT = 300.0
"""Number of seconds after which a start no longer waits for the processes."""

TRITON_CACHE = "TRITON_CACHE_DIR"
"""The variable that names the directory of Triton's cache."""

_RUN = "minisrv.engine.kernels:run"
"""The function that runs in the process. Its module imports torch."""

_CODE = (
    *("core", "kernels", "graph", "nn", "runner", "certification"),
    *("checkpoint/transformers_decoder.py", "engine/kernels.py", "engine/kernel_process.py"),
)
"""The parts of the package on which the launches of an engine depend."""


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


class KernelProcess:
    """The engine's handle of the process that records kernels and has them compiled. It is to be
    made and used by one thread, with which the process ends."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        """Start the process at once; it imports its modules.

        timeout: number of seconds after which `wait` gives up, from now on.
        """
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._line, theirs = Pipe()
        with theirs:
            self._process = ChildProcess("kernels", _main, theirs, private_dir=None)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def compile(self, job: object, cache: Path) -> None:
        """Let the process compile the kernels of a job. May be called once.

        job: a `KernelJob` (`engine.kernels`).
        cache: the directory of Triton's cache.
        """
        try:
            self._line.send((job, cache))
        except OSError:
            logger.debug("the process has ended, as `wait` will tell", exc_info=True)

    def wait(self, progress: Progress) -> Compiled | str:
        """Wait until the process has finished, and return what it has compiled, or why it has
        failed."""
        while (found := self.poll(progress, self._deadline - time.monotonic())) is None:
            pass
        return found

    def poll(self, progress: Progress, seconds: float = 0.0) -> Compiled | str | None:
        """Return what `wait` returns, or None if the process has not finished.

        seconds: how long to wait for what it says next, at most.
        """
        if not self._line.poll(max(0.0, seconds)):
            is_late = time.monotonic() >= self._deadline
            return f"it took longer than {self._timeout:g} s" if is_late else None
        try:
            said = self._line.recv()
        except (EOFError, OSError):
            return f"the process ended {self._process.describe_exit()}"
        if isinstance(said, tuple):
            progress(*said)
            return None
        found: Compiled | str = said
        return found

    def kill(self) -> bool:
        """Kill the process if it runs, and return whether it has ended. The system takes some tens
        of milliseconds to free its memory, in which `close` would wait."""
        self._process.kill()
        return self._process.exit_status is not None

    def close(self) -> None:
        """End the process if it runs. May be called twice."""
        self._process.stop()
        self._line.close()


def start_early(config: EngineConfig) -> KernelProcess | None:
    """Start the process if an engine with these settings will probably need it: there is a GPU's
    driver, and no list of kernels for this code. None if not, or if it cannot be started, which
    the engine tells when it tries again."""
    if config.device == "cpu" or not has_driver():
        return None
    try:
        return None if any(lists_directory().iterdir()) else KernelProcess()
    except Exception:  # as on a machine where no process can be started
        logger.debug("no process compiles kernels yet", exc_info=True)
        return None


def lists_directory() -> Path:
    """Return the directory for the lists of what was compiled by this code, these versions of torch
    and Triton, and Triton's settings. Raises PackageNotFoundError without Triton, and OSError and
    RuntimeError as `cache_directory` does."""
    settings = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(("TRITON_", "MINISRV_PDL")) and name != TRITON_CACHE
    ]
    parts = version("torch"), version("triton"), code_digest(_CODE), *settings
    return cache_directory("kernels", hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])


def _main(line: Connection) -> None:
    # Imports make hundreds of thousands of objects, of which none is garbage.
    gc.disable()
    resolve_name(_RUN)(line)

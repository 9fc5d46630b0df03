"""Compiles the model of an engine in pieces: mode 3, as `engine.compilation` asks for it.

Knows: what is compiled, where it is kept, and the process that compiles. Knows nothing of when
compiled code enters service.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from minisrv.compile import artifacts
from minisrv.compile.program import Program
from minisrv.compile.worker import CompileJob, CompileProcess
from minisrv.errors import CompilationError
from minisrv.nn.model import Model

logger = logging.getLogger(__name__)

HELPED_CORES = 8
"""The number of cores from which on two processes compile for a GPU at the same time."""


def known_slowness(job: CompileJob, steps: str) -> float | None:
    """Return how many times as fast the program of a job was where an earlier start has measured
    these steps and found it too slow to serve; None if none has."""
    directory = job.program_directory()
    kept = None if directory is None else artifacts.read_slowness(directory)
    return None if kept is None or kept.steps != steps else kept.speedup


class PieceCompiler:
    """Compiles one model. It satisfies `minisrv.engine.compilation.Compiler`.

    model: the engine's model, whose buffers are those that it serves with.
    again: whether a program is made once more that was found to be slower, or has crashed.
    """

    def __init__(self, job: CompileJob, model: Model, *, again: bool = False) -> None:
        self._job = job
        self._model = model
        self._again = again
        self._directory = job.program_directory()
        self._found: tuple[Path, Program] | None = None

    def find(self) -> Path | None:
        """Return the directory of the program if the cache has one that can be loaded. One that
        cannot is discarded; the log says why. Raises CrashError if engines have ended while they
        tried a package of it, which is not compiled again, and CompilationError if there is no room
        to unpack it."""
        directory = self._job.kept_program()
        if directory is None:
            return None
        program = _load(directory, self._model)
        if program is None:
            self.discard(directory)
            return None
        self._found = directory, program
        return directory

    def discard(self, directory: Path) -> None:
        """Keep a program from being found again, because it may not serve. If the cache cannot be
        written, nothing happens."""
        artifacts.forget(directory, artifacts.PROGRAM)

    def slowness(self, steps: str) -> float | None:
        """Return how many times as fast the program was where an earlier start has measured these
        steps and found it too slow to serve; None if none has, or it is to be tried again."""
        return None if self._again else known_slowness(self._job, steps)

    def remember_slowness(self, directory: Path, steps: str, speedup: float) -> None:
        """Discard a program, and remember its speed. If the cache cannot be written, it is made and
        measured again at the next start, and the log says so."""
        self.discard(directory)
        try:
            artifacts.write_slowness(directory, artifacts.Slowness(steps, speedup))
        except CompilationError as error:
            logger.warning("the next start compiles this model again: %s", error.message)

    def start(self) -> CompileProcess:
        """Start a process that compiles. What an earlier start has measured is void from here
        on."""
        if self._directory is not None:
            artifacts.forget(self._directory, artifacts.SLOWNESS)
        # On a CPU the cores compute steps.
        helped = self._job.device == "cuda" and len(os.sched_getaffinity(0)) >= HELPED_CORES
        return CompileProcess(self._job, helped=helped, again=self._again)

    def load(self, directory: Path, between: Callable[[], None]) -> Program:
        """Return the program of a directory, bound to the model. Raises CompilationError.

        between: see `Program.load`.
        """
        found, self._found = self._found, None
        if found is not None and found[0] == directory:
            return found[1]  # it need not be loaded twice
        program = _load(directory, self._model, between)
        if program is None:
            raise CompilationError(f"the program in {directory} cannot be loaded; see the log.")
        return program


def _load(
    directory: Path, model: Model, between: Callable[[], None] = lambda: None
) -> Program | None:
    """Do what `Program.load` does, with a CompilationError for an OSError."""
    try:
        return Program.load(directory, model, between)
    except OSError as error:
        raise CompilationError(
            f"the program in {directory} cannot be loaded now ({error}); the next start tries it "
            "again."
        ) from error

"""The process that compiles a model's forward while the engine serves.

Torch's compiler changes the state of the process that it runs in, and takes its cores, so it runs
in a child of its own: at the lowest priority, without weights, for a limited time, and never longer
than its parent. What it makes is in the cache; the child only says where, and how far it has come.
Where others use all cores all the time, the lowest priority may get none of them: then the child is
started once more at a low one, which gets some.

Knows: the steps of a compilation, and the child process. Knows nothing of how a program is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from minisrv.compile.toolchain import choose_cxx
from minisrv.errors import CompilationError, MinisrvError
from minisrv.model_config import ModelConfig
from minisrv.processes import ChildProcess

if TYPE_CHECKING:  # they import torch
    from minisrv.compile.artifacts import Package
    from minisrv.compile.values import PieceFile

logger = logging.getLogger(__name__)

TIMEOUT = 1800
"""Maximum number of seconds that a compilation may take."""

PATIENCE = 300
"""Number of seconds without progress after which a compilation goes on at a higher priority."""

LEAST_ROWS = 8192
"""The number of rows for which pieces are compiled at least, so that servers with other limits
share them."""

MOST_CRASHES = 2
"""The number of crashes by packages of one piece after which it is not made again."""

_STRETCHED = re.compile(rb'"(dynamic[^"]*|longrope|su|yarn)"')
"""What a config.json says of a model whose rotation may depend on the context that is served, by
all names that transformers reads. No other code depends on it."""

_FAULTS = {-getattr(signal, f"SIG{name}") for name in ("SEGV", "BUS", "ILL", "FPE", "ABRT")}
"""The exit statuses of a process that has crashed by itself."""

_TRIAL = ".trial"
"""Suffix of the name of a file with the package that a process loads."""

_NICE = 19
_ENDED_FIRST = 1000
_LAST_LINES = 12


@dataclass(frozen=True)
class CompileJob:
    """What is compiled: the forward of a model.

    model: the shape of the model, for the context that is served.
    directory: the checkpoint, of which config.json is read.
    dtype: torch's name of the dtype of serving.
    quantization: a key of `LINEAR_METHODS`.
    device: "cpu" or "cuda".
    threads: the number of threads that will compute a step on a CPU.
    max_num_tokens: the most tokens of a step.
    passes: the names of the passes that rewrite its graph; None for all.
    """

    model: ModelConfig
    directory: Path
    dtype: str
    quantization: str | None
    device: str
    threads: int
    max_num_tokens: int
    passes: tuple[str, ...] | None = None

    @property
    def max_rows(self) -> int:
        """The number of rows up to which the pieces are compiled."""
        return max(LEAST_ROWS, 1 << (self.max_num_tokens - 1).bit_length())

    def environment(self) -> tuple[str, ...]:
        """Return what every piece of this job depends on besides its content."""
        from minisrv.compile import artifacts

        settings = [str(self.max_rows)]
        if self.device == "cpu":
            settings.append(str(self.threads))
        return (*artifacts.environment(self.device), *settings)

    def key(self) -> str:
        """Return the key of the program in the cache. Raises OSError if the checkpoint cannot be
        read."""
        code = version("transformers") if self.model.implementation == "transformers" else ""
        settings = (self.dtype, str(self.quantization), str(self.passes))
        described = (self.directory / "config.json").read_bytes()
        model = self.model
        if not _STRETCHED.search(described):
            # The context may follow the memory that is free at a start, and would change the key.
            model = replace(model, max_position_embeddings=0)
        parts = (repr(model), *settings, code, *self.environment())
        return hashlib.sha256("\0".join(parts).encode() + described).hexdigest()[:32]

    def program_directory(self) -> Path | None:
        """Return the directory of the cache for the program; None, with the reason in the log, if
        there can be none."""
        from minisrv.compile import artifacts

        try:
            return artifacts.program_directory(self.key())
        except (OSError, RuntimeError) as error:
            logger.warning("no compiled program can be kept: %s", error)
            return None

    def kept_program(self) -> Path | None:
        """Return the directory of the program if one is in the cache; `Program.load` says whether
        it can be used."""
        from minisrv.compile import artifacts

        directory = self.program_directory()
        kept = directory is not None and (directory / artifacts.PROGRAM).exists()
        return directory if kept else None


class Progress(msgspec.Struct, frozen=True):
    """How far a compilation has come.

    phase: what is being done.
    done, total: the number of pieces that are ready, and of all; 0 of 0 before they are known.
    """

    phase: str
    done: int
    total: int


@contextmanager
def _claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Claim a file for the block, and give whether no other process has claimed it. The claim of a
    process that ends is void.

    wait: whether to wait until no other process has.
    """
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def share(keys: Sequence[str], claims: Path, make: Callable[[int], None], *, helps: bool) -> None:
    """Call `make` for the index of each key that no other process makes at the moment: from the
    first on, or, for the one that helps, from the last. Unless this one helps, wait for the others
    then, and call `make` for what they have left.

    claims: a directory in which the processes claim keys.
    """
    left = list(range(len(keys)))
    if helps:
        left.reverse()
    for wait in (False,) if helps else (False, True):
        for index in left[:]:
            with _claim(claims / f"{keys[index]}.claim", wait=wait) as claimed:
                if claimed:
                    make(index)
                    left.remove(index)


def keep_piece(
    key: str,
    num_arguments: int,
    make: Callable[[], Package],
    scratch: Path,
    *,
    again: bool = False,
) -> PieceFile:
    """Return the file of a piece in the cache, whose package is made unless one is there that can
    be loaded.

    A package may crash the process that loads it. It is written down meanwhile, so that the parent
    of this process can set it aside.

    scratch: a directory that the parent reads if this process crashes.
    again: whether a piece is made again that has crashed `MOST_CRASHES` processes.

    Raises what `artifacts.write_package` and `make` do, RuntimeError if a package that is made
    cannot be loaded, OSError if there is no room to unpack one, CompilationError if the piece is
    not made again, and CrashError if that is because of an engine.
    """
    from minisrv.compile import artifacts
    from minisrv.compile.program import LoadedPiece
    from minisrv.compile.values import PieceFile

    def load(package: Package) -> None:
        trial = scratch / f"{key}.{os.getpid()}{_TRIAL}"
        trial.write_bytes(msgspec.msgpack.encode(package))
        try:
            LoadedPiece(package, num_arguments)
        finally:
            trial.unlink()

    def kept() -> Package | None:
        try:
            package = artifacts.read_package(key)
            load(package)
        except (CompilationError, RuntimeError):
            return None
        return package

    package, aside = kept(), artifacts.read_aside(key)
    if package is None:
        artifacts.check_aside(key)
        if aside is not None and aside.times >= MOST_CRASHES and not again:
            raise CompilationError(
                f"packages of the piece {key} have crashed {aside.times} processes that loaded "
                "them; it is not made again, but with --compile-wait."
            )
        made = make()
        load(made)
        # If another server has made the piece meanwhile, its program names the digest of that one.
        with artifacts.alone():
            package = kept()
            if package is None:
                artifacts.write_package(key, package := made)
    if aside is not None:
        artifacts.forget_aside(key)
    return PieceFile(key, artifacts.digest_of(key, package))


def _set_aside(scratch: Path, process: ChildProcess) -> str:
    """Set the package aside that a process has loaded when it crashed, and say so in a sentence,
    which is empty if there is none."""
    from minisrv.compile import artifacts

    trials = list(scratch.glob(f"*.{process.pid}{_TRIAL}"))
    if process.exit_status not in _FAULTS or not trials:
        return ""
    [trial] = trials
    key = trial.name.split(".")[0]
    try:
        package = msgspec.msgpack.decode(trial.read_bytes(), type=artifacts.Package)
        path = artifacts.set_aside(key, package)
    except (CompilationError, OSError, RuntimeError, msgspec.MsgspecError) as error:
        return f" It loaded the package of the piece {key}, which cannot be set aside: {error}"
    return f" It loaded the package of the piece {key}, which is set aside as {path}."


def compile_model(
    job: CompileJob,
    progress: Callable[[Progress], None],
    scratch: Path,
    *,
    helps: bool = False,
    again: bool = False,
) -> Path:
    """Compile the forward of a model, and return the directory of the program in the cache. Pieces
    that are in the cache, and can be loaded, are not compiled again.

    progress: is called at each step.
    scratch: the directory of the processes that compile together: the `claims` of `share`, and that
        of `keep_piece`.
    helps: see `share`. Who helps compiles pieces, and makes no program of them.
    again: see `keep_piece`.
    Raises CompilationError, OSError and RuntimeError, and whatever torch raises.
    """
    import torch

    from minisrv.compile import artifacts
    from minisrv.compile.inductor import compile_piece
    from minisrv.compile.passes import apply_passes
    from minisrv.compile.split import split
    from minisrv.compile.trace import trace
    from minisrv.compile.values import Description
    from minisrv.nn.loader import load_model

    directory = artifacts.program_directory(job.key())
    compiler = choose_cxx()
    progress(Progress("tracing", 0, 0))

    def make_model() -> Any:
        dtype = getattr(torch, job.dtype)
        model = load_model(
            job.model, job.directory, dtype=dtype, device=job.device, load_format="dummy"
        )
        model.prepare(quantization=job.quantization)
        return model

    traced = trace(make_model, job.device)
    matches = apply_passes(traced, job.passes)
    schedule = split(traced)
    keys = [piece.digest(*job.environment()) for piece in schedule.pieces]
    total = len(keys)
    files: dict[int, PieceFile] = {}

    def make_piece(index: int) -> None:
        progress(Progress("compiling", len(files), total))
        piece = schedule.pieces[index]

        def make() -> Package:
            return compile_piece(piece, job.max_rows, job.device, threads=job.threads, cxx=compiler)

        size = len(piece.arguments)
        file = keep_piece(keys[index], size, make, scratch, again=again)
        files[index] = msgspec.structs.replace(file, kernels=piece.kernels)

    share(keys, scratch, make_piece, helps=helps)
    if not helps:
        found = [files[index] for index in range(total)]
        description = Description(job.max_rows, matches, found, schedule.calls)
        artifacts.write_description(directory, msgspec.msgpack.encode(description))
    progress(Progress("compiled", total, total))
    return directory


class CompileProcess:
    """The engine's handle of the process that compiles. No method waits for it.

    It is to be made and used by one thread, with which the process ends.
    """

    def __init__(
        self,
        job: CompileJob,
        *,
        helped: bool = False,
        again: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        """Start the process at once.

        helped: whether a second process takes a share of the pieces.
        again: see `keep_piece`.
        timeout: number of seconds after which it is ended.

        Raises OSError if the checkpoint cannot be read.
        """
        self._key = job.key()
        self._scratch = tempfile.TemporaryDirectory(
            prefix="minisrv-compile-",
            # A compiler of C++ that the process has started may still write there.
            ignore_cleanup_errors=True,
        )
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._errors = Path(self._scratch.name, "stderr")
        self._progress = Progress("starting", 0, 0)
        self._answer: Path | MinisrvError | None = None
        self._given = job, Path(self._scratch.name), again
        self._helped = helped
        self._yields, self._starts_again = True, False
        try:
            self._start()
        except BaseException:
            self._scratch.cleanup()
            raise

    def _start(self) -> None:
        self._answers, answers = Pipe(duplex=False)
        self._heard = time.monotonic()
        self._helper: ChildProcess | None = None
        given = (*self._given, self._yields)
        try:
            self._process = ChildProcess("compile", _main, *given, answers, private_dir=None)
            if self._helped:
                self._helper = ChildProcess("compile2", _help, *given, private_dir=None)
        finally:
            answers.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def poll(self) -> Progress | Path | MinisrvError:
        """Return how far it has come, the directory of the finished program, or the error with
        which it has failed, at once. The last two are final."""
        if self._starts_again:
            if not self._has_ended:
                return self._progress
            self._answers.close()
            self._start()
            self._starts_again = False
        while self._answer is None and self._answers.poll():
            try:
                said = self._answers.recv()
            except (EOFError, OSError):
                why = f"the compiler ended {self._process.describe_exit()}"
                scratch = self._errors.parent
                both = [one for one in (self._process, self._helper) if one is not None]
                aside = "".join(_set_aside(scratch, process) for process in both)
                self._answer = self._failure(why, aside)
            else:
                self._heard = time.monotonic()
                if isinstance(said, Progress):
                    self._progress = said
                else:
                    self._answer = self._checked(said)
        now = time.monotonic()
        if self._answer is None and self._yields and now > self._heard + PATIENCE:
            self._take_cores()
        late = now > self._deadline
        if self._answer is None and late:
            self._process.stop()
            self._answer = self._failure(f"it took longer than {self._timeout:g} s")
        if self._answer is None:
            return self._progress
        if self._helper is not None:
            self._helper.kill()
        # A process takes a while to give its memory back, for which `close` would wait.
        return self._answer if late or self._has_ended else self._progress

    def _checked(self, said: Path | MinisrvError) -> Path | MinisrvError:
        """Return an answer, or an error in place of a program that is not for this process: the
        other one reads code and config.json as they are now."""
        if isinstance(said, Path) and said.name != self._key:
            return CompilationError(
                "the model was compiled by other code, or for another config.json, than this "
                "server was started with, because files have changed since; start it again."
            )
        return said

    @property
    def _has_ended(self) -> bool:
        both = (one for one in (self._process, self._helper) if one is not None)
        return all(one.exit_status is not None for one in both)

    def _take_cores(self) -> None:
        """End the process, to start it again at a higher priority. The kernel gives it none while
        it runs: for that a user needs a privilege."""
        logger.warning(
            "the compilation (%s, %d of %d pieces) has made no progress for %g s, probably "
            "because others use every core: it starts again as a usual process of the least "
            "priority (nice %d). "
            "Pieces that are ready are not compiled again.",
            self._progress.phase,
            self._progress.done,
            self._progress.total,
            PATIENCE,
            _NICE,
        )
        self._yields, self._starts_again = False, True
        self._process.kill()
        if self._helper is not None:
            self._helper.kill()

    def _failure(self, why: str, aside: str = "") -> CompilationError:
        said = ""
        if self._errors.exists():
            lines = self._errors.read_text(errors="replace").splitlines()
            said = "\n".join(lines[-_LAST_LINES:])
        return CompilationError(
            f"the model was not compiled: {why}.{aside} It said: {said or 'nothing'}"
        )

    def close(self) -> None:
        """End the process, its helper included, and remove their temporary files. May be called
        twice."""
        self._process.stop()
        if self._helper is not None:
            self._helper.stop()
        self._answers.close()
        self._scratch.cleanup()


def _lower_priority(yields: bool) -> None:
    """Give this process, and those that it starts, the lowest priority, and let the kernel end them
    before all others where memory runs out: the server can go on without them.

    yields: whether they run only while nobody else wants their core.
    """
    os.nice(_NICE)
    with suppress(OSError):  # a sandbox may not have the file
        Path("/proc/self/oom_score_adj").write_text(str(_ENDED_FIRST))
    # Linux has that policy; the scheduler then interrupts them at once for others.
    if yields and hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextmanager
def _prepared(scratch: Path, errors: str, yields: bool) -> Iterator[None]:
    """Prepare a process that compiles, and remove its own temporary files at the end, so that the
    engine need not.

    errors: the name of the file for what it says.
    yields: see `_lower_priority`.
    """
    _lower_priority(yields)
    with (scratch / errors).open("wb") as file:
        os.dup2(file.fileno(), sys.__stderr__.fileno())  # type: ignore[union-attr]
    # What two processes write to the same place would be mixed.
    own = scratch / f"of-{errors}-{os.getpid()}"
    own.mkdir()
    os.environ |= {
        # Its own processes would outlive it if it were killed.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "TMPDIR": str(own),
    }
    tempfile.tempdir = None
    try:
        yield
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _help(job: CompileJob, scratch: Path, again: bool, yields: bool) -> None:
    with _prepared(scratch, "stderr2", yields):
        compile_model(job, lambda progress: None, scratch, helps=True, again=again)


def _main(job: CompileJob, scratch: Path, again: bool, yields: bool, answers: Connection) -> None:
    try:
        with _prepared(scratch, "stderr", yields):
            program = compile_model(job, answers.send, scratch, again=again)
        answers.send(program)
    except MinisrvError as error:
        answers.send(CompilationError(f"the model was not compiled: {error.message}"))
    except Exception as error:
        lines = traceback.format_exception(error)
        said = "".join(lines).splitlines()[-_LAST_LINES:]
        answers.send(CompilationError("the model was not compiled: " + "\n".join(said)))

"""How compiled code comes into service: ready first, faster later.

An engine is ready with the model's own code, generation 0. Then another process compiles; what it
has made is loaded here, and its graphs are captured and certified (`certification.generation`), in
turns of some milliseconds between the steps of requests. When all have passed and are faster, they
take the place of generation 0 between two steps, and the memory of that one is free. If anything
fails on this way, the engine goes on as it is. A program that the cache has from an earlier start
serves from the start. Its graphs are certified like all graphs; the code, which has passed before,
is compared with the model's own for the smallest and the largest steps only, and is not timed
again. One that an earlier start has found too slow is neither compiled nor timed again.

Knows: the order of these events, when a turn of the work begins and ends, and what is told of it.
Knows nothing of compilers: a `Compiler` does.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from minisrv.certification.generation import (
    LEAST_SPEEDUP,
    Always,
    build_generation,
    end_keys,
    measure_speedup,
    model_keys,
    time_generation,
    timed_keys,
)
from minisrv.certification.startup import CaptureProgress, capture_graphs
from minisrv.compile.decorator import Compiled
from minisrv.core.graph_times import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.engine.background import Background, Work
from minisrv.engine.generations import compiled_kernels, freed, take_over
from minisrv.engine.messages import CompilationReport, CompilationState
from minisrv.errors import CertificationError, MinisrvError
from minisrv.graph.backend import GraphBackend
from minisrv.interrupts import deferred_interrupts
from minisrv.modes import GraphKey
from minisrv.runner.generation import Generation
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.05
"""Number of seconds between two looks at a compilation that a start-up waits for."""


class CompileProgress(Protocol):
    """How much of a compilation is done."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


class CompileProcess(Protocol):
    """A process that compiles."""

    def poll(self) -> CompileProgress | Path | MinisrvError:
        """Return its progress, or the directory of the program that it has made, or why it has
        made none, at once."""

    def close(self) -> None:
        """End the process if it runs."""


class Compiler(Protocol):
    """Compiles one model."""

    def find(self) -> Path | None:
        """Return the directory of the program if the cache has it, and it was not discarded. Raises
        MinisrvError if it may not be used, and no other may be made."""

    def discard(self, directory: Path) -> None:
        """Keep a program from being found again, because it may not serve. If the cache cannot be
        written, nothing happens."""

    def slowness(self, steps: str) -> float | None:
        """Return how many times as fast the program was where an earlier start has measured these
        steps and found it too slow to serve; None if none has, or it is to be tried again."""

    def remember_slowness(self, directory: Path, steps: str, speedup: float) -> None:
        """Discard a program because of its speed in these steps, and remember that."""

    def start(self) -> CompileProcess:
        """Start a process that compiles. Raises MinisrvError."""

    def load(self, directory: Path, between: Callable[[], None]) -> Compiled:
        """Return the program of a directory, which computes with the weights of the engine's model.

        between: is called where the steps of requests may run.
        Raises MinisrvError.
        """


class Refusal(enum.StrEnum):
    """Why compiled code does not serve."""

    COMPILE = "compile"
    """Compiling failed, or its process ended."""
    LOAD = "load"
    """What was compiled could not be loaded."""
    CAPTURE = "capture"
    """It could not be run or captured."""
    CERTIFICATION = "certification"
    """Its results differ, or a graph's do."""
    SLOWER = "slower"
    """Its steps are not faster by measurement."""
    SWAP = "swap"
    """It could not take the place of the model's own code."""


class _RefusedError(Exception):
    """Compiled code may not serve."""

    def __init__(self, refusal: Refusal, reason: str) -> None:
        super().__init__(reason)
        self.refusal = refusal


def needs_no_kernels(program: Path) -> Generator[None, None, str]:
    """Compile no kernels, as on a device whose programs launch none."""
    yield from ()
    return ""


class Compilation:
    """The way of compiled code into the service of one engine, as a work between its steps. No
    error of it ends the engine, which can go on as it is.

    background: where the work has its turns.
    compiler: compiles the model; None if compiled code is off.
    pool: the blocks of the runner's cache.
    make_backend: makes the backend of another generation's graphs.
    compile_kernels: compiles the kernels that the program of a directory launches; see
        `generations.compiled_kernels`. If it fails, they are compiled when they first run.
    release: returns memory that nobody uses any more to the device.
    timed: returns the steps whose durations are measured for a generation before it serves.
    use_times: is called with these durations when it serves.
    has_room: whether there is memory for another generation beside the one in service.
    serve_slower: whether compiled code serves even if it is not faster, to be measured.
    clock: returns the time in seconds.
    """

    def __init__(
        self,
        background: Background,
        compiler: Compiler | None,
        runner: ModelRunner,
        pool: BlockPool,
        make_backend: Callable[[], GraphBackend],
        *,
        compile_kernels: Callable[[Path], Generator[None, None, str]] = needs_no_kernels,
        release: Callable[[], None] = lambda: None,
        timed: Callable[[], Collection[GraphKey]] = lambda: (),
        use_times: Callable[[Mapping[GraphKey, StepTime]], None] = lambda times: None,
        has_room: bool = True,
        serve_slower: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._background = background
        self._turn = background.turn
        self._has_room = has_room
        self._serve_slower = serve_slower
        self._compiler = compiler
        self._runner = runner
        self._pool = pool
        self._make_backend = make_backend
        self._compile_kernels = compile_kernels
        self._release = release
        self._timed = timed
        self._use_times = use_times
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._began = clock()
        self._on_progress: CaptureProgress = lambda done, total: None
        self._is_awaited = False
        self._is_under_way = False
        self.program: Path | None = None
        """The directory of the program that serves; None while the model's own code does."""
        self.report = CompilationReport()
        """The generation that serves, and why. A change replaces it."""
        if compiler is not None:
            self.report = CompilationReport(CompilationState.COMPILING)

    @property
    def generation(self) -> int:
        """The number of the generation that serves."""
        return self.report.generation

    @property
    def is_under_way(self) -> bool:
        """Whether compiled code may yet come into service, or be refused."""
        return self._is_under_way

    def capture_graphs(self, keys: Collection[GraphKey], on_progress: CaptureProgress) -> None:
        """Capture graphs at a start-up: those of the program that the cache has, if there is one
        and it passes, and otherwise those of the model's own code; then a compilation is under way.
        Raises what `startup.capture_graphs` does, and KeyboardInterrupt between two graphs if
        Ctrl-C is pressed."""
        compiler = self._compiler
        with deferred_interrupts() as check_interrupt:

            def tell(done: int, total: int) -> None:
                check_interrupt()
                on_progress(done, total)

            if compiler is not None:
                self._begin(self._enter_cached(compiler, keys, tell))
                while self.is_under_way:
                    self._background.go_on(math.inf)
            if not self.generation:
                capture_graphs(self._runner, self._pool, keys, tell)
        if compiler is not None and self.report.state is CompilationState.COMPILING:
            self._begin(self._compile(compiler))

    def wait(self, on_progress: CaptureProgress) -> None:
        """Wait at a start-up until the compiled code serves or has been refused.

        The graphs that serve are not timed: a start-up times them all behind this.

        on_progress: is called with the number of pieces that are compiled, and of all.
        """
        self._on_progress = on_progress
        self._is_awaited = True
        try:
            while self.is_under_way:
                self._background.go_on(math.inf)
                if self._turn.waits:
                    time.sleep(WAIT_SECONDS)
        except BaseException:  # Ctrl-C: this process would not end before the one that compiles
            self._background.close()
            raise

    def _begin(self, work: Work) -> None:
        self._is_under_way = True
        self._background.add(self._until_refused(work))

    def _until_refused(self, work: Work) -> Work:
        """Do the work, which a refusal ends, and so does Ctrl-C in one of its turns."""
        try:
            yield from work
        except _RefusedError as error:
            self._refuse(error)
        except BaseException:
            if self.report.state is not CompilationState.COMPILED:
                self._tell(state=CompilationState.REFUSED, reason="it was interrupted.")
            raise
        finally:
            self._is_under_way = False

    def _refuse(self, error: _RefusedError) -> None:
        refusals = Counter(self.report.refusals) + Counter([error.refusal.value])
        self._tell(
            state=CompilationState.REFUSED,
            reason=f"{error.refusal}: {error}",
            refusals=dict(refusals),
        )
        logger.warning(
            "compiled code does not serve (%s): %s The server goes on with the model's own code.",
            error.refusal,
            error,
            exc_info=None if isinstance(error.__cause__, MinisrvError | None) else error.__cause__,
        )

    # ---- the work ----------------------------------------------------------------------------

    def _compile(self, compiler: Compiler) -> Work:
        """Compile in another process, and bring what it makes into service."""
        self._began = self._clock()
        self._turn.begin_part("the start of the compiler")
        with _refused_as(Refusal.COMPILE):
            process = compiler.start()
            try:
                while not isinstance(found := process.poll(), Path):
                    if isinstance(found, MinisrvError):
                        raise found
                    self._on_progress(found.done, found.total)
                    self._turn.waits = True
                    yield True
            finally:
                process.close()
        self._lap("compile")
        with _refused_as(Refusal.COMPILE):
            yield from compiled_kernels(self._compile_kernels(found), self._turn)
        self._lap("kernels")
        new = yield from self._load(compiler, found)
        runner, pool, turn = self._runner, self._pool, self._turn
        with self._discarded_if_refused(compiler, found):
            # It takes over every size that is in service; the others follow.
            graphs = runner.graphs
            keys = [key for key in runner.ladders.keys() if key in graphs]  # noqa: SIM118
            compared = model_keys(runner.ladders, keys)
            yield from turn.take(partial(build_generation, runner, pool, new, keys, compared, turn))
            speedup = yield from turn.take(partial(measure_speedup, runner, pool, new, turn))
            if is_too_slow(speedup):
                compiler.remember_slowness(found, timed_steps(runner.ladders), speedup)
                if not self._serve_slower:
                    raise _RefusedError(Refusal.SLOWER, _too_slow(speedup))
            timed = () if self._is_awaited else self._timed()
            times = yield from turn.take(partial(time_generation, runner, pool, new, timed, turn))
        self._lap("certify")
        yield from self._serve(found, new, times)
        logger.info("steps by compiled code are %.2f times as fast", speedup)
        if longest := self._background.describe_longest():
            logger.info("turns between steps made requests wait %s at most", longest)

    def _enter_cached(
        self, compiler: Compiler, keys: Collection[GraphKey], on_progress: CaptureProgress
    ) -> Work:
        """Bring the program that the cache has into service, if there is one."""
        with _refused_as(Refusal.LOAD):
            found = compiler.find()
            steps = timed_steps(self._runner.ladders)
            speedup = None if found else compiler.slowness(steps)
        if speedup is not None and is_too_slow(speedup):
            raise _RefusedError(
                Refusal.SLOWER,
                f"{_too_slow(speedup)} An earlier start has measured that, so nothing is compiled; "
                "with --compile-wait it is measured again.",
            )
        if found is None and not self._has_room:
            raise _RefusedError(
                Refusal.LOAD,
                "what the cache has cannot be loaded, and there is no memory to certify another "
                "program beside the model's own code. The next start compiles it.",
            )
        if found is None:
            return
        new = yield from self._load(compiler, found)
        runner, pool, turn = self._runner, self._pool, Always()
        with self._discarded_if_refused(compiler, found):
            compared, total = end_keys(runner.ladders), len(keys)
            build_generation(
                runner, pool, new, keys, compared, turn, lambda done: on_progress(done, total)
            )
        self._lap("certify")
        yield from self._serve(found, new, {})  # all graphs of a start-up are measured behind this

    def _load(self, compiler: Compiler, directory: Path) -> Generator[bool, None, Generation]:
        """Load a program, and return its generation, which has no graphs yet."""
        self._tell(state=CompilationState.CERTIFYING)
        self._began = self._clock()
        self._turn.begin_part("the load of compiled code")
        with _refused_as(Refusal.LOAD):
            load = partial(compiler.load, directory, self._turn.offer)
            program = yield from self._turn.take(load)
            new = Generation.empty(self._runner, self._make_backend(), program)
        self._lap("load")
        return new

    @contextmanager
    def _discarded_if_refused(self, compiler: Compiler, directory: Path) -> Iterator[None]:
        """Refuse a program for any error of the block, and let the cache forget it."""
        try:
            with _refused_as(Refusal.CAPTURE):
                yield
        except _RefusedError:
            compiler.discard(directory)
            raise

    def _serve(self, directory: Path, new: Generation, times: Mapping[GraphKey, StepTime]) -> Work:
        """Put a generation into service in place of the other one, and free that one.

        directory: that of its program.
        times: the durations of its graphs; empty if they were not measured.
        """
        self._turn.begin_part("the swap of two generations")
        with _refused_as(Refusal.SWAP):
            # If this fails, nothing follows times of other code.
            old = take_over(self._runner, new, lambda: self._use_times(times) if times else None)
        self.program = directory
        self._tell(
            state=CompilationState.COMPILED,
            generation=self.report.generation + 1,
            swaps=self.report.swaps + 1,
        )
        logger.info(
            "generation %d serves: compiled code with %d graphs (%s)",
            self.generation,
            len(self._runner.graphs),
            ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self._seconds.items()),
        )
        yield from freed(old, self._turn, self._release)

    def _tell(self, **changes: Any) -> None:
        seconds = {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
        self.report = msgspec.structs.replace(self.report, seconds=seconds, **changes)

    def _lap(self, phase: str) -> None:
        """Note the time since the last phase as that of this one."""
        now = self._clock()
        self._seconds[phase] = now - self._began
        self._began = now


def timed_steps(ladders: Ladders) -> str:
    """Return the steps that are measured before compiled code serves, in words."""
    keys = timed_keys(ladders)
    return ", ".join(f"{mode.name} {descriptor.num_tokens}" for mode, descriptor in keys)


def is_too_slow(speedup: float) -> bool:
    """Whether steps that are so many times as fast as those of the model's own code do not
    serve."""
    return speedup < LEAST_SPEEDUP


def _too_slow(speedup: float) -> str:
    return (
        f"its steps are {speedup:.2f} times as fast as those of the model's own code, and "
        f"{LEAST_SPEEDUP} times are asked for."
    )


@contextmanager
def _refused_as(refusal: Refusal) -> Iterator[None]:
    """Turn any error of the block into a refusal. A failed certification always is one of that
    kind."""
    try:
        yield
    except _RefusedError:
        raise
    except CertificationError as error:
        raise _RefusedError(Refusal.CERTIFICATION, error.message) from error
    except MinisrvError as error:
        raise _RefusedError(refusal, error.message) from error
    except Exception as error:
        raise _RefusedError(refusal, f"{type(error).__name__}: {error}.") from error

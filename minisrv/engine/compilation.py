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
from typing import Any, Protocol, TypeVar

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
from minisrv.core.dispatcher import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import Ladders
from minisrv.engine.messages import CompilationReport, CompilationState
from minisrv.errors import CertificationError, MinisrvError
from minisrv.graph.backend import GraphBackend
from minisrv.modes import GraphKey
from minisrv.runner.generation import Generation
from minisrv.runner.model_runner import ModelRunner
from minisrv.turns import MakeWay, in_turns

T = TypeVar("T")

logger = logging.getLogger(__name__)

TURN = 0.005
"""Number of seconds after which a turn of the work makes way for the steps of requests, at the next
point where it can: between two layers of the model, between two operations of a tape, or behind a
graph of a GPU, which nothing interrupts."""

LEAST_GAP = 0.02
"""Minimum number of seconds between two turns while requests run."""

REST = 4.0
"""How many times as long as a turn the steps of requests run behind it, at least."""

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


class _Turn:
    """The turn of the work; see `certification.generation.Turn`.

    ends: the time at which it is over.
    waits: whether the last one ended because there was nothing to do.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.ends = math.inf
        self.waits = True
        self._clock = clock
        self._make_way: MakeWay | None = None

    @property
    def is_over(self) -> bool:
        return self._clock() >= self.ends

    def make_way(self) -> None:
        assert self._make_way is not None, "only a function that runs in turns makes way"
        self._make_way()

    def wait(self) -> None:
        self.waits = True
        self.make_way()

    def offer(self) -> None:
        """Make way if the turn is over."""
        if self.is_over:
            self.make_way()

    def take(self, function: Callable[[], T]) -> Generator[None, None, T]:
        """Run a function that makes way by this object, and yield each time that it does."""

        def run(make_way: MakeWay) -> T:
            self._make_way = make_way
            return function()

        try:
            return (yield from in_turns(run))
        finally:
            self._make_way = None


_Work = Generator[None, None, None]
"""Work that yields at the end of each turn."""


class Compilation:
    """The way of compiled code into the service of one engine. All methods must be called from the
    thread that runs steps.

    compiler: compiles the model; None if compiled code is off.
    pool: the blocks of the runner's cache.
    make_backend: makes the backend of another generation's graphs.
    release: returns memory that nobody uses any more to the device.
    timed: the steps whose durations are measured for a generation before it serves.
    use_times: is called with these durations when it serves.
    has_room: whether there is memory for another generation beside the one in service.
    serve_slower: whether compiled code serves even if it is not faster, to be measured.
    clock: returns the time in seconds.
    """

    def __init__(
        self,
        compiler: Compiler | None,
        runner: ModelRunner,
        pool: BlockPool,
        make_backend: Callable[[], GraphBackend],
        *,
        release: Callable[[], None] = lambda: None,
        timed: Collection[GraphKey] = (),
        use_times: Callable[[Mapping[GraphKey, StepTime]], None] = lambda times: None,
        has_room: bool = True,
        serve_slower: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._has_room = has_room
        self._serve_slower = serve_slower
        self._compiler = compiler
        self._runner = runner
        self._pool = pool
        self._make_backend = make_backend
        self._release = release
        self._timed = timed
        self._use_times = use_times
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._began = clock()
        self._turn = _Turn(clock)
        self._next_turn = 0.0
        self._longest_turn = 0.0
        self._on_progress: CaptureProgress = lambda done, total: None
        self._is_awaited = False
        self._work: _Work | None = None
        self.report = CompilationReport()
        """The generation that serves, and why. A change replaces it."""
        if compiler is not None:
            self._work = self._compile(compiler)
            self.report = CompilationReport(CompilationState.COMPILING)

    @property
    def generation(self) -> int:
        """The number of the generation that serves."""
        return self.report.generation

    @property
    def is_under_way(self) -> bool:
        """Whether compiled code may yet come into service, or be refused."""
        return self._work is not None

    @property
    def has_work(self) -> bool:
        """Whether an idle engine should call `advance` at once, and not only now and then."""
        return self.is_under_way and not self._turn.waits

    # ---- before the engine is ready ----------------------------------------------------------

    def capture_graphs(self, on_progress: CaptureProgress) -> None:
        """Capture the graphs of a start-up: those of the program that the cache has, if there is
        one and it passes, and otherwise those of the model's own code. Raises what
        `startup.capture_graphs` does."""
        if self._compiler is not None:
            compiling, self._work = self._work, self._enter_cached(self._compiler, on_progress)
            while self.is_under_way:
                self._take_turn(math.inf)
            if self.report.state is CompilationState.COMPILING:
                self._work = compiling
        if not self.generation:
            capture_graphs(self._runner, self._pool, on_progress)

    def wait(self, on_progress: CaptureProgress) -> None:
        """Compile, and wait until the compiled code serves or has been refused.

        The graphs that serve are not timed: a start-up times them all behind this.

        on_progress: is called with the number of pieces that are compiled, and of all.
        """
        self._on_progress = on_progress
        self._is_awaited = True
        try:
            while self.is_under_way:
                self._take_turn(math.inf)
                if self._turn.waits:
                    time.sleep(WAIT_SECONDS)
        except BaseException:  # Ctrl-C: this process would not end before the one that compiles
            self.close()
            raise

    # ---- while the engine serves -------------------------------------------------------------

    def advance(self, *, busy: bool) -> bool:
        """Give the work a turn, if there is any and it is time for it, and return whether the
        report has changed. To be called between steps. It raises no error, because the engine can
        go on as it is.

        busy: whether requests run, whose steps must not wait often.
        """
        began = self._clock()
        if self._work is None or (busy and began < self._next_turn):
            return False
        before = self.report
        self._take_turn(began + TURN)
        ended = self._clock()
        took = ended - began
        self._next_turn = ended + max(LEAST_GAP, REST * took)
        if busy:
            self._longest_turn = max(self._longest_turn, took)
        return self.report is not before

    def _take_turn(self, ends: float) -> None:
        """Go on with the work until it makes way, which it does after the time `ends`."""
        assert self._work is not None, "there is work"
        self._turn.ends, self._turn.waits = ends, False
        try:
            next(self._work)
        except StopIteration:
            self._work = None
        except _RefusedError as error:
            self._work = None
            self._refuse(error)

    def close(self) -> None:
        """End what is under way, the process that compiles included."""
        if self._work is not None:
            self._work.close()
            self._work = None

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

    def _compile(self, compiler: Compiler) -> _Work:
        """Compile in another process, and bring what it makes into service."""
        self._began = self._clock()
        with _refused_as(Refusal.COMPILE):
            process = compiler.start()
            try:
                while not isinstance(found := process.poll(), Path):
                    if isinstance(found, MinisrvError):
                        raise found
                    self._on_progress(found.done, found.total)
                    self._turn.waits = True
                    yield
            finally:
                process.close()
        self._lap("compile")
        new = yield from self._load(compiler, found)
        runner, pool, turn = self._runner, self._pool, self._turn
        with self._discarded_if_refused(compiler, found):
            keys = model_keys(runner.ladders)
            yield from turn.take(partial(build_generation, runner, pool, new, keys, turn))
            speedup = yield from turn.take(partial(measure_speedup, runner, pool, new, turn))
            if is_too_slow(speedup):
                compiler.remember_slowness(found, timed_steps(runner.ladders), speedup)
                if not self._serve_slower:
                    raise _RefusedError(Refusal.SLOWER, _too_slow(speedup))
            timed = () if self._is_awaited else self._timed
            times = yield from turn.take(partial(time_generation, runner, pool, new, timed, turn))
        self._lap("certify")
        yield from self._serve(new, times)
        logger.info("steps by compiled code are %.2f times as fast", speedup)
        if self._longest_turn:
            logger.info(
                "a turn of this work made requests wait %.0f ms at most", 1000 * self._longest_turn
            )

    def _enter_cached(self, compiler: Compiler, on_progress: CaptureProgress) -> _Work:
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
            keys, total = end_keys(runner.ladders), len(runner.ladders.keys())
            build_generation(runner, pool, new, keys, turn, lambda done: on_progress(done, total))
        self._lap("certify")
        yield from self._serve(new, {})  # all graphs of a start-up are measured behind this

    def _load(self, compiler: Compiler, directory: Path) -> Generator[None, None, Generation]:
        """Load a program, and return its generation, which has no graphs yet."""
        self._tell(state=CompilationState.CERTIFYING)
        self._began = self._clock()
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

    def _serve(self, new: Generation, times: Mapping[GraphKey, StepTime]) -> _Work:
        """Put a generation into service in place of the other one, and free that one.

        times: the durations of its graphs; empty if they were not measured.
        """
        old = Generation.in_service(self._runner)
        with _refused_as(Refusal.SWAP):
            try:
                new.serve(self._runner)
                for observer in self._runner.observers:
                    observer.swapped()
                if times:
                    self._use_times(times)  # the last, so that nothing follows times of other code
            except BaseException:
                old.serve(self._runner)
                raise
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
        for graphs in old.graphs:
            while graphs:
                graphs.popitem()  # a graph of many operations takes a while to be freed
                if self._turn.is_over:
                    yield
        yield
        self._release()

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

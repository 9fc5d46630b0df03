"""Measures the same steps in every mode, by turns, in one engine.

Knows: how to bring an engine to steady decode, how to have it run a step in a chosen mode (by
another dispatcher over the captured graphs) and by the compiled or the model's own code (by putting
its generation into service for the step), and the order that cancels drift: a round runs a block of
steps in each mode, and then the same blocks in reverse order (ABCCBA), so that whatever grows
linearly, the contexts included, is the same for all modes.
Knows nothing of how results are shown.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from statistics import mean, median
from typing import NamedTuple

import msgspec
import torch

from minisrv.certification.generation import Always, build_generation
from minisrv.checkpoint import context_length, open_checkpoint
from minisrv.compile.modes import CompilationMode
from minisrv.config import BenchConfig, EngineConfig
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.ladder import Ladders, ladders_of
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import EngineInfo
from minisrv.engine.platforms import Progress, platform_of
from minisrv.errors import CompilationError, ConfigError
from minisrv.graph.observer import StepObserver, StepPart, observing
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.generation import Generation, serving
from minisrv.runner.launches import LaunchCounter
from minisrv.tools.environment import Environment, environment

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL

STEPS_PER_BLOCK = 6
WARM_UP_STEPS = 2
"""Number of steps in a block, and of its first steps that are not counted. Those bring back into
the processor's caches what the mode before has evicted; and if the engine launches one step ahead,
only the second step follows one of its own mode."""

COMPILED = "compiled"
"""Prefix of the names of modes whose steps run by compiled code."""

PREFILL_CHUNKS = (128, 512, 2048, 8192)
"""Numbers of tokens of the measured prefill chunks; a chunk is cut to the maximum of a step."""

FORMULAS = (
    "ms: median over a mode's blocks of the median over a block's steps, a step being the whole "
    "of EngineCore.step().",
    "eager/X: median over rounds of eager ms / X ms, and the least and the greatest; a round's ms "
    "is the mean of a mode's two blocks in it.",
    "GPU: median over blocks of the mean ms of a step on the GPU; idle: of the ms between two.",
    "host us: of a step, without waiting for its tokens; under --async-scheduling (the default on "
    "a GPU) it passes while the GPU runs the step before.",
    "floor: ms in which the GPU can read weights and KV cache once, with as many experts as one "
    "token uses, though a batch may use more. of floor: floor / GPU ms.",
    "tok/s: tokens of a step / ms, of the last mode.",
)


class ModeResult(msgspec.Struct, frozen=True):
    """The measurements of one mode at one size.

    runs_as: number of tokens of the padded step.
    launches: number of launches in one step.
    ms: median over the blocks of the median time of a step in milliseconds.
    host_us: microseconds of the host by part of the step (`StepPart`); on a CPU "launch" includes
        the computation. "wait" is the time of waiting for the tokens, and no work.
    gpu_ms: milliseconds from the launch of the step, with filled buffers, to when the GPU has the
        tokens. It includes gaps in which the GPU waits for the host, as in a step of many launches;
        None on a CPU.
    gpu_idle_ms: milliseconds that the GPU idles between two steps; None on a CPU.
    tokens_per_s: real tokens per second, without padding.
    blocks_ms: median step time of each block in the order in which they ran, two for each round.
    """

    runs_as: int
    launches: int
    ms: float
    host_us: dict[str, float]
    gpu_ms: float | None
    gpu_idle_ms: float | None
    tokens_per_s: float
    blocks_ms: list[float]


class BlockTime(NamedTuple):
    """The times of a step in one block; for the fields see `ModeResult`."""

    ms: float
    host_us: dict[str, float]
    gpu_ms: float | None
    gpu_idle_ms: float | None


class Ratio(msgspec.Struct, frozen=True):
    """Eager time over a mode's time, paired by round; above 1 the mode is faster."""

    median: float
    least: float
    greatest: float


class SizeResult(msgspec.Struct, frozen=True):
    """The measurements at one size.

    size: number of requests in a decode batch, or of tokens in a prefill chunk.
    context: average number of tokens of a request before the first and after the last step.
    floor_ms: milliseconds that the GPU needs at least to read the weights (`Model.bytes_read`) and
        the KV cache once; None on a CPU and for prefill.
    modes: results of every mode that has a graph for this size, by the name of the mode, such as
        "FULL" or "compiled FULL"; NONE (eager) is the first.
    eager_over: eager time over the time of each other mode, by the name of the mode.
    """

    size: int
    context: tuple[float, float]
    floor_ms: float | None
    modes: dict[str, ModeResult]
    eager_over: dict[str, Ratio]


class Report(msgspec.Struct, frozen=True):
    """The results of one run.

    simulated_launch_us: microseconds added to every launch; if it is not 0, no time in the report
        is the machine's own.
    bandwidth_gb_s: bandwidth of the GPU's memory in GB/s, as a large copy reaches it; None on a
        CPU.
    """

    environment: Environment
    simulated_launch_us: float
    bandwidth_gb_s: float | None
    config: EngineConfig
    settings: BenchConfig
    engine: EngineInfo
    formulas: tuple[str, ...]
    decode: list[SizeResult]
    prefill: list[SizeResult]


def run_bench(config: EngineConfig, settings: BenchConfig, progress: Progress) -> Report:
    """Start an engine and measure it. The model is compiled only if the settings ask for a
    compilation mode; then its compiled and its own code are measured by turns.

    Raises the errors of `build_engine`, CompilationError if compiled code may not serve, and,
    before weights are read, ConfigError for settings that cannot be compared or do not fit.
    """
    config = platform_of(config).kind.resolve(config)
    mode = config.compilation_mode or CompilationMode.NONE
    # Steps have the tokens with which they are to be measured, whatever they cost.
    config = replace(
        config,
        compilation_mode=mode,
        compile_wait=True,
        cudagraph_capture="whole",
        itl_target_ms=0.0,
        verify_graphs=0.0,
    )
    compiled = mode is not CompilationMode.NONE
    if config.cudagraph_mode is NONE and not compiled:
        raise ConfigError(
            "bench compares eager steps with graphs and with compiled code, and there are none; "
            "leave out --enforce-eager and --cudagraph-mode none, or give --compilation-mode."
        )
    longest = context_length(config, open_checkpoint(config, weights=False).model)
    plan = BenchPlan(settings, ladders_of(config, longest), compiled)

    def check(context: int, kv_blocks: int | None) -> None:
        plan.check(context, config.block_size, kv_blocks)

    check(longest, None)
    # What is slower is measured too.
    parts = build_engine(config, progress, before_loading=check, serve_slower=True)
    engine = EngineCore(parts)
    report = engine.compilation.report
    if compiled and engine.runner.model.compiled is None:
        raise CompilationError(f"compiled code cannot be measured ({report.reason}).")
    return Bench(engine, settings).run(progress)


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Return the GB/s that a large copy on the GPU reads and writes together, the median of five
    copies after a first one.

    nbytes: bytes that are copied.
    """
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(2 * nbytes / median(times[1:]) / 1e6)


def dispatchers(ladders: Ladders) -> dict[CUDAGraphMode, Dispatcher]:
    """Return a dispatcher for each runtime mode of `ladders`, NONE first, that chooses this mode
    wherever it has a graph for it."""
    mixed = {ladders.mode.mixed_mode: ladders.mixed}
    offered = {
        NONE: replace(ladders, mode=NONE, decode=(), mixed=(), epilogues=()),
        PIECEWISE: replace(ladders, mode=PIECEWISE, decode=(), mixed=mixed.get(PIECEWISE, ())),
        FULL: replace(ladders, mode=FULL, mixed=mixed.get(FULL, ())),
    }
    return {
        mode: Dispatcher(some)
        for mode, some in offered.items()
        if mode is NONE or some.decode or some.mixed
    }


class BenchPlan:
    """The plan of a measurement, from which follows how much of an engine it needs.

    compiled: whether compiled code is measured beside the model's own.
    batch_sizes: the sizes of the decode batches.
    dispatchers: see the function `dispatchers`.
    steps: the number of decode steps at each size.
    prompt_length: number of prompt tokens of a decode request, such that after half of the steps
        the context has the length that was asked for.
    """

    def __init__(self, settings: BenchConfig, ladders: Ladders, compiled: bool) -> None:
        self.settings = settings
        self.ladders = ladders
        self.batch_sizes = settings.batch_sizes or _every_capture_size(ladders)
        self.dispatchers = dispatchers(ladders)
        self.steps = (
            (1 + compiled) * len(self.dispatchers) * (1 + 2 * settings.rounds * STEPS_PER_BLOCK)
        )
        self.prompt_length = max(1, settings.context - self.steps // 2)

    def check(self, max_model_len: int, block_size: int, kv_blocks: int | None) -> None:
        """Raise ConfigError if the measurement does not fit an engine.

        max_model_len: maximum number of tokens of a request.
        block_size: number of tokens in a KV cache block.
        kv_blocks: number of KV cache blocks, the null block included; None if it is not known yet.
        """
        settings, most, largest = self.settings, self.ladders.max_num_seqs, max(self.batch_sizes)
        if largest > most:
            raise ConfigError(
                f"a batch of {largest} is more than max_num_seqs={most}; raise --max-num-seqs, or "
                "leave it out of --batch-sizes."
            )
        # The first requests decode while the last prompts are computed.
        rest = self.ladders.max_num_batched_tokens - largest + 1
        prefill = -(-largest * self.prompt_length // rest)
        longest = self.prompt_length + prefill + self.steps + 2
        if longest > max_model_len:
            raise ConfigError(
                f"--context {settings.context} with --rounds {settings.rounds} takes up to "
                f"{longest} tokens, and the context is {max_model_len}; lower one of them."
            )
        if kv_blocks is not None and (needed := largest * -(-longest // block_size)) >= kv_blocks:
            raise ConfigError(
                f"a batch of {largest} takes up to {needed} KV blocks, and there are "
                f"{kv_blocks - 1}; raise --kv-cache-memory, or lower --context."
            )


class HostClock(StepObserver):
    """Measures the host's time by part of a step, for the steps that it observes."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(StepPart, 0.0)
        self._last = time.perf_counter()

    def lap(self, part: StepPart) -> None:
        """See `StepObserver`."""
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def host_us(self, steps: int, ms: float) -> dict[str, float]:
        """Return the microseconds of a step by part.

        steps: number of steps that ran.
        ms: milliseconds of all of them together.
        """
        found = {
            part.value: 1e6 * seconds / steps
            for part, seconds in self._seconds.items()
            if part is not StepPart.REST
        }
        found[StepPart.REST.value] = max(0.0, 1000 * ms / steps - sum(found.values()))
        return found


class Way(NamedTuple):
    """A way to run a step: the mode, a dispatcher that chooses it, and the code with its graphs."""

    mode: CUDAGraphMode
    dispatcher: Dispatcher
    generation: Generation


class Bench:
    """Measures one engine, which must be idle."""

    def __init__(
        self,
        engine: EngineCore,
        settings: BenchConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare the measurement. Raises ConfigError for sizes that do not fit the engine.

        clock: a function that returns seconds.
        """
        self.engine = engine
        self.settings = settings
        self.clock = clock
        runner, info = engine.runner, engine.info
        served = Generation.in_service(runner)
        compiled = served.program is not None
        plan = BenchPlan(settings, engine.dispatcher.ladders, compiled)
        plan.check(info.max_model_len, info.block_size, info.num_kv_blocks)
        self.batch_sizes = plan.batch_sizes
        self.prompt_length = plan.prompt_length
        own = served if not compiled else _own_code(engine)
        self.ways = {mode.name: Way(mode, by, own) for mode, by in plan.dispatchers.items()}
        if compiled:
            self.ways |= {
                f"{COMPILED} {mode.name}": Way(mode, by, served)
                for mode, by in plan.dispatchers.items()
            }
        self.has_clock = engine.config.kind.has_clock
        self.bandwidth = copy_bandwidth(engine.runner.buffers.device) if self.has_clock else None
        self._ids = count()
        self._random = random.Random(engine.config.seed)

    def run(self, progress: Progress) -> Report:
        """Measure every size."""
        where, info = environment(), self.engine.info
        most = min(info.max_num_batched_tokens, info.max_model_len - 1)
        chunks = sorted({min(chunk, most) for chunk in PREFILL_CHUNKS})
        total = len(self.batch_sizes) + len(chunks)
        decode: list[SizeResult] = []
        prefill: list[SizeResult] = []
        for size in self.batch_sizes:
            progress("measuring", len(decode), total)
            decode.append(self.decode(size))
        for size in chunks:
            progress("measuring", len(decode) + len(prefill), total)
            prefill.append(self.prefill(size))
        progress("measuring", total, total)
        return Report(
            environment=where,
            simulated_launch_us=info.simulated_launch_us,
            bandwidth_gb_s=self.bandwidth,
            config=self.engine.config,
            settings=self.settings,
            engine=info,
            formulas=FORMULAS,
            decode=decode,
            prefill=prefill,
        )

    def decode(self, size: int) -> SizeResult:
        """Measure steady decode of `size` requests, whose contexts grow by a token with each
        step."""
        engine = self.engine
        fresh = {self._add(self.prompt_length, max_tokens=None) for _ in range(size)}
        while fresh:
            fresh -= {output.request_id for output in engine.step()}
        running = list(engine.scheduler.running)
        assert len(running) == size, "the batch fits the engine"

        def context() -> float:
            return mean(len(r.prompt_token_ids) + len(r.output_token_ids) for r in running)

        first = context()
        modes, ratios = self._compare(size, decode=True)
        last = context()
        for request in running:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()
        return SizeResult(size, (first, last), self._floor(size, (first + last) / 2), modes, ratios)

    def prefill(self, size: int) -> SizeResult:
        """Measure prefill of prompts of `size` tokens, each computed in one step."""
        modes, ratios = self._compare(
            size, decode=False, prepare=lambda: self._add(size, max_tokens=1)
        )
        return SizeResult(size, (size + 1, size + 1), None, modes, ratios)

    def _add(self, length: int, max_tokens: int | None) -> str:
        """Queue a request and return its id. Its prompt is random, so that the prefix cache has no
        part of it."""
        name, vocab = f"bench-{next(self._ids)}", self.engine.info.vocab_size
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        prompt = [self._random.randrange(vocab) for _ in range(length)]
        self.engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
        return name

    # ---- by turns ----------------------------------------------------------------------------

    def _compare(
        self, size: int, *, decode: bool, prepare: Callable[[], object] = lambda: None
    ) -> tuple[dict[str, ModeResult], dict[str, Ratio]]:
        """Measure steps of `size` tokens in every way that has a graph for them. Returns the
        results of each, and the ratios of eager time to the time of each other, by name.

        decode: whether the steps are decode steps of `size` requests, or else prefill steps.
        prepare: called before each step, outside of the time that is measured.
        """
        runs_as = {}
        for name, way in self.ways.items():
            found = way.dispatcher.dispatch(
                size, size if decode else 1, query_len=1 if decode else None
            )
            if found.mode is way.mode:
                runs_as[name] = found.descriptor.num_tokens
        launches = {name: self._count(self.ways[name], prepare) for name in runs_as}
        blocks: dict[str, list[BlockTime]] = {name: [] for name in runs_as}
        for _ in range(self.settings.rounds):
            for name in (*runs_as, *reversed(runs_as)):
                blocks[name].append(self._block(self.ways[name], prepare))
        results = {
            name: ModeResult(
                runs_as=runs_as[name],
                launches=launches[name],
                ms=median(time.ms for time in times),
                host_us={
                    part.value: median(time.host_us[part.value] for time in times)
                    for part in StepPart
                },
                gpu_ms=_median(time.gpu_ms for time in times),
                gpu_idle_ms=_median(time.gpu_idle_ms for time in times),
                tokens_per_s=1000 * size / median(time.ms for time in times),
                blocks_ms=[time.ms for time in times],
            )
            for name, times in blocks.items()
        }
        eager = _by_round(blocks.pop(NONE.name))
        ratios = {name: _ratio(eager, _by_round(times)) for name, times in blocks.items()}
        return results, ratios

    def _count(self, way: Way, prepare: Callable[[], object]) -> int:
        """Run one step, and return the number of its launches."""
        counter = LaunchCounter()
        with observing(self.engine.observers, counter):
            self._step(way, prepare)
        return counter.count

    def _block(self, way: Way, prepare: Callable[[], object]) -> BlockTime:
        """Run a block of steps, and return their times: the median of whole steps, and the means
        of host and GPU times."""
        before = self._steps_in(way.mode)
        for _ in range(WARM_UP_STEPS):
            self._step(way, prepare)
        clock = HostClock()
        begin = self.engine.stats()
        with observing(self.engine.observers, clock):
            times = [self._step(way, prepare) for _ in range(STEPS_PER_BLOCK - WARM_UP_STEPS)]
        end = self.engine.stats()
        assert self._steps_in(way.mode) == before + STEPS_PER_BLOCK, (
            "every step ran in the mode that is measured"
        )
        steps = len(times)
        return BlockTime(
            ms=median(times),
            host_us=clock.host_us(steps, sum(times)),
            gpu_ms=(end.gpu_busy_ms - begin.gpu_busy_ms) / steps if self.has_clock else None,
            gpu_idle_ms=(end.gpu_idle_ms - begin.gpu_idle_ms) / steps if self.has_clock else None,
        )

    def _step(self, way: Way, prepare: Callable[[], object]) -> float:
        """Run one step, and return its milliseconds."""
        engine = self.engine
        prepare()
        usual, engine.dispatcher = engine.dispatcher, way.dispatcher
        with serving(engine.runner, way.generation):
            start = self.clock()
            engine.step()
            end = self.clock()
        engine.dispatcher = usual
        return 1000 * (end - start)

    def _floor(self, size: int, context: float) -> float | None:
        """Return the milliseconds in which the weights (`Model.bytes_read`), and the KV cache of
        `size` requests, can be read at `bandwidth`; None on a CPU.

        context: average number of tokens of a request.
        """
        if self.bandwidth is None:
            return None
        cache = self.engine.runner.kv_caches
        entry = sum(layer[0, 0].nbytes for layer in cache)
        read = self.engine.runner.model.bytes_read + size * context * entry
        return read / self.bandwidth / 1e6

    def _steps_in(self, mode: CUDAGraphMode) -> int:
        return sum(steps.steps for steps in self.engine.stats().steps if steps.mode == mode.name)


def _own_code(engine: EngineCore) -> Generation:
    """Return a generation of the model's own code, with all graphs, for an engine that serves by
    compiled code."""
    runner = engine.runner
    own = Generation.empty(runner, platform_of(engine.config).make_backend(), None)
    keys = runner.ladders.keys()
    build_generation(runner, engine.scheduler.block_pool, own, keys, [], Always())
    return own


def _every_capture_size(ladders: Ladders) -> tuple[int, ...]:
    most = ladders.max_num_seqs
    return tuple(sorted({min(size, most) for size in ladders.decode or ladders.mixed or (1, most)}))


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are not None; None if there are none."""
    found = [value for value in values if value is not None]
    return median(found) if found else None


def _by_round(blocks: list[BlockTime]) -> list[float]:
    return [mean((a.ms, b.ms)) for a, b in zip(blocks[::2], blocks[1::2], strict=True)]


def _ratio(eager: list[float], other: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(eager, other, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))

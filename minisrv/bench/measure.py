"""The same steps in every mode, by turns, in one engine.

Knows: how to bring an engine to steady decode, how to have it run a step in a mode of one's choice
(another dispatcher, over the graphs that are there), and the order that cancels drift: a round runs
a block of steps in each mode and then the same blocks backwards (ABCCBA), so that whatever grows
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
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import torch

from minisrv.checkpoint import context_length, open_checkpoint
from minisrv.config import BenchConfig, EngineConfig
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.ladder import Ladders, ladders_of
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import EngineInfo
from minisrv.engine.platforms import Progress, platform_of
from minisrv.environment import Environment, environment
from minisrv.errors import ConfigError
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.launches import count_launches
from minisrv.runner.results import StepResult

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL

BLOCK = 6
SETTLE = 2
"""Steps of a block, and those of them that are not counted: they bring back to the caches what the
mode before has pushed out, and one step ahead only the second is behind one of its own mode."""

PREFILL_CHUNKS = (128, 512, 2048)
"""Tokens; a chunk is cut to what a step may hold."""

PARTS = ("schedule", "dispatch", "fill", "launch", "result", "wait", "update", "rest")
"""Of `EngineCore.step`: who runs, as what; inputs to their buffers; model and sampling; tokens on
their way back, waited for, and given to their requests; and what lies between."""

FORMULAS = (
    "ms: median over a mode's blocks of the median over a block's steps, a step being the whole "
    "of EngineCore.step().",
    "eager/X: median over rounds of eager ms / X ms, and the least and the greatest; a round's ms "
    "is the mean of a mode's two blocks in it.",
    "GPU: median over blocks of the mean ms of a step on the GPU; idle: of the ms between two.",
    "host us: of a step, without waiting for its tokens; under --async-scheduling (the default on "
    "a GPU) it passes while the GPU runs the step before.",
    "tok/s: tokens of a step / ms, of the last mode.",
)


class ModeResult(msgspec.Struct, frozen=True):
    """One mode at one size.

    runs_as: tokens of the padded step. launches: of one step. tokens_per_s: real tokens.
    host_us: microseconds of the host by part of the step (PARTS); on a CPU "launch" computes too.
        "wait" is for the tokens, and no work.
    gpu_ms: from when the filled buffers are launched on to when the GPU has the tokens, so with the
        gaps of a step of many launches in which it waits for the host; None on a CPU.
    gpu_idle_ms: between two steps; None on a CPU.
    blocks_ms: in the order they ran, two for each round.
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
    """The median steps of a block; see `ModeResult`."""

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
    """Every mode that has a graph for this size, by name: NONE (eager) first.

    size: requests of a decode batch, or tokens of a prefill chunk.
    context: tokens of a request, on average, when the first and when the last step was done.
    floor_ms: what the GPU needs to read weights and cache once; None on a CPU and for prefill.
    eager_over: by mode.
    """

    size: int
    context: tuple[float, float]
    floor_ms: float | None
    modes: dict[str, ModeResult]
    eager_over: dict[str, Ratio]


class Report(msgspec.Struct, frozen=True):
    """What one run found. `simulated_launch_us` other than 0: no time is the machine's own.

    bandwidth_gb_s: of the GPU's memory, as a large copy reaches it; None on a CPU.
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
    """Start an engine and measure it. Raises what `build_engine` raises, and before it reads
    weights ConfigError for what cannot be compared or does not fit."""
    if config.graph_mode is NONE:
        raise ConfigError(
            "bench compares eager steps with graphs, and there are none; leave out "
            "--enforce-eager and --cudagraph-mode none."
        )
    config = replace(config, device=platform_of(config).device.type)
    course = Course(settings, ladders_of(config))

    def check(context: int, kv_blocks: int | None) -> None:
        course.check(context, config.block_size, kv_blocks)

    check(context_length(config, open_checkpoint(config, weights=False).model), None)
    engine = EngineCore(build_engine(config, progress, before_loading=check))
    return Bench(engine, settings).run(progress)


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """GB/s that a large copy reads and writes, the median of five."""
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
    """For each runtime mode of `ladders`, NONE first, one that chooses it wherever it can."""
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


class Course:
    """What a measurement runs, and so what it needs.

    batch_sizes: of decode. dispatchers: see `dispatchers`.
    prompt_length: of a decode request. Half of the steps later the contexts are as long as was
        asked for.
    """

    def __init__(self, settings: BenchConfig, ladders: Ladders) -> None:
        self.settings = settings
        self.ladders = ladders
        self.batch_sizes = settings.batch_sizes or _every_rung(ladders)
        self.dispatchers = dispatchers(ladders)
        self.steps = len(self.dispatchers) * (1 + 2 * settings.rounds * BLOCK)
        self.prompt_length = max(1, settings.context - self.steps // 2)

    def check(self, max_model_len: int, block_size: int, kv_blocks: int | None) -> None:
        """Raise ConfigError if it does not fit an engine.

        max_model_len: tokens that a request may have. kv_blocks: the null block included; None if
            they are not known yet.
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


class HostClock:
    """Takes the host's time by part of the steps in its block: it stands in for what they call."""

    def __init__(self, engine: EngineCore, dispatchers: Iterable[Dispatcher]) -> None:
        scheduler, runner = engine.scheduler, engine.runner
        self._calls: list[tuple[str, Any, str]] = [
            ("schedule", scheduler, "schedule"),
            *(("dispatch", dispatcher, "dispatch") for dispatcher in dispatchers),
            ("fill", runner.buffers, "fill"),
            ("launch", runner, "launch"),
            ("result", runner.results, "end"),
            ("wait", StepResult, "tokens"),
            ("update", scheduler, "update"),
        ]
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._own: list[Any] = []

    def __enter__(self) -> Self:
        for part, owner, name in self._calls:
            self._own.append(vars(owner).get(name))
            setattr(owner, name, self._timed(part, getattr(owner, name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for (_, owner, name), own in zip(self._calls, self._own, strict=True):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = call(*args, **kwargs)
            self._seconds[part] += time.perf_counter() - begin
            return found

        return timed

    def host_us(self, steps: int, ms: float) -> dict[str, float]:
        """Microseconds of a step by part. steps: that took `ms` together."""
        found = {part: 1e6 * seconds / steps for part, seconds in self._seconds.items()}
        found["rest"] = max(0.0, 1000 * ms / steps - sum(found.values()))
        return found


class Bench:
    """Measures one engine, which must be idle."""

    def __init__(
        self,
        engine: EngineCore,
        settings: BenchConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """clock: returns seconds. Raises ConfigError for sizes that do not fit the engine."""
        self.engine = engine
        self.settings = settings
        self.clock = clock
        course, info = Course(settings, engine.dispatcher.ladders), engine.info
        course.check(info.max_model_len, info.block_size, info.num_kv_blocks)
        self.batch_sizes = course.batch_sizes
        self.prompt_length = course.prompt_length
        self.dispatchers = course.dispatchers
        self.device = engine.runner.buffers.device
        self.bandwidth = copy_bandwidth(self.device) if self.device.type == "cuda" else None
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
        """Steady decode of `size` requests, whose contexts grow by a token a step."""
        engine = self.engine
        fresh = {self._add(self.prompt_length, max_tokens=None) for _ in range(size)}
        while fresh:
            fresh -= {output.request_id for output in engine.step()}
        running = list(engine.scheduler.running)
        assert len(running) == size, "the batch fits the engine"
        first = mean(len(request.prompt) + len(request.output) for request in running)
        modes, ratios = self._compare(size, decode=True)
        last = mean(len(request.prompt) + len(request.output) for request in running)
        for request in running:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()
        return SizeResult(size, (first, last), self._floor(size, (first + last) / 2), modes, ratios)

    def prefill(self, size: int) -> SizeResult:
        """Prompts of `size` tokens, each computed in one step."""
        modes, ratios = self._compare(
            size, decode=False, prepare=lambda: self._add(size, max_tokens=1)
        )
        return SizeResult(size, (size + 1, size + 1), None, modes, ratios)

    def _add(self, length: int, max_tokens: int | None) -> str:
        """Queue a prompt, random so that no cache knows its beginning; returns the request's id."""
        name, vocab = f"bench-{next(self._ids)}", self.engine.info.vocab_size
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        prompt = [self._random.randrange(vocab) for _ in range(length)]
        self.engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))
        return name

    # ---- by turns ----------------------------------------------------------------------------

    def _compare(
        self, size: int, *, decode: bool, prepare: Callable[[], object] = lambda: None
    ) -> tuple[dict[str, ModeResult], dict[str, Ratio]]:
        """Measure steps of `size` tokens.

        prepare: called before each step, outside of what is timed.
        """
        runs_as = {}
        for mode, dispatcher in self.dispatchers.items():
            found = dispatcher.dispatch(size, size if decode else 1, uniform_decode=decode)
            if found.mode is mode:
                runs_as[mode] = found.descriptor.num_tokens
        launches = {mode: self._count(mode, prepare) for mode in runs_as}
        blocks: dict[CUDAGraphMode, list[BlockTime]] = {mode: [] for mode in runs_as}
        for _ in range(self.settings.rounds):
            for mode in (*runs_as, *reversed(runs_as)):
                blocks[mode].append(self._block(mode, prepare))
        results = {
            mode.name: ModeResult(
                runs_as=runs_as[mode],
                launches=launches[mode],
                ms=median(time.ms for time in times),
                host_us={part: median(time.host_us[part] for time in times) for part in PARTS},
                gpu_ms=_median(time.gpu_ms for time in times),
                gpu_idle_ms=_median(time.gpu_idle_ms for time in times),
                tokens_per_s=1000 * size / median(time.ms for time in times),
                blocks_ms=[time.ms for time in times],
            )
            for mode, times in blocks.items()
        }
        eager = _by_round(blocks.pop(NONE))
        ratios = {mode.name: _ratio(eager, _by_round(times)) for mode, times in blocks.items()}
        return results, ratios

    def _count(self, mode: CUDAGraphMode, prepare: Callable[[], object]) -> int:
        """Launches of one step."""
        with count_launches(self.engine.runner) as counter:
            self._step(mode, prepare)
        return counter.count

    def _block(self, mode: CUDAGraphMode, prepare: Callable[[], object]) -> BlockTime:
        """The median step of a block."""
        before = self._steps_in(mode)
        for _ in range(SETTLE):
            self._step(mode, prepare)
        clock = HostClock(self.engine, self.dispatchers.values())
        begin = self.engine.stats()
        with clock:
            times = [self._step(mode, prepare) for _ in range(BLOCK - SETTLE)]
        end = self.engine.stats()
        assert self._steps_in(mode) == before + BLOCK, "every step ran in the mode that is measured"
        steps, on_gpu = len(times), self.device.type == "cuda"
        return BlockTime(
            ms=median(times),
            host_us=clock.host_us(steps, sum(times)),
            gpu_ms=(end.gpu_busy_ms - begin.gpu_busy_ms) / steps if on_gpu else None,
            gpu_idle_ms=(end.gpu_idle_ms - begin.gpu_idle_ms) / steps if on_gpu else None,
        )

    def _step(self, mode: CUDAGraphMode, prepare: Callable[[], object]) -> float:
        """Run one step in `mode`; returns its milliseconds."""
        engine = self.engine
        prepare()
        usual, engine.dispatcher = engine.dispatcher, self.dispatchers[mode]
        start = self.clock()
        engine.step()
        end = self.clock()
        engine.dispatcher = usual
        return 1000 * (end - start)

    def _floor(self, size: int, context: float) -> float | None:
        """Milliseconds to read the weights and the cache of `size` contexts at `bandwidth`."""
        if self.bandwidth is None:
            return None
        cache = self.engine.runner.kv_caches
        entry = sum(layer[0, 0].nbytes for layer in cache)
        read = self.engine.runner.model.bytes_read + size * context * entry
        return read / self.bandwidth / 1e6

    def _steps_in(self, mode: CUDAGraphMode) -> int:
        return sum(steps.steps for steps in self.engine.stats().steps if steps.mode == mode.name)


def _every_rung(ladders: Ladders) -> tuple[int, ...]:
    most = ladders.max_num_seqs
    return tuple(sorted({min(rung, most) for rung in ladders.decode or ladders.mixed}))


def _median(values: Iterable[float | None]) -> float | None:
    """None if one of them is."""
    found = [value for value in values if value is not None]
    return median(found) if found else None


def _by_round(blocks: list[BlockTime]) -> list[float]:
    return [mean((a.ms, b.ms)) for a, b in zip(blocks[::2], blocks[1::2], strict=True)]


def _ratio(eager: list[float], other: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(eager, other, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))

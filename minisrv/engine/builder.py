"""Builds the parts of an engine from settings and a checkpoint.

Knows: the order of a start-up (device, checkpoint, weights, kernels, memory, graphs), and the
arguments of each part. Knows nothing of steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minisrv import threads
from minisrv.checkpoint import Checkpoint, context_length, open_checkpoint
from minisrv.compile.modes import CompilationMode
from minisrv.compile.pieces import PieceCompiler, known_slowness
from minisrv.compile.program import Program
from minisrv.compile.worker import CompileJob
from minisrv.config import EngineConfig
from minisrv.core.batch_counts import BatchCounter
from minisrv.core.cost_model import CostModel, StepSample
from minisrv.core.dispatcher import Dispatcher
from minisrv.core.graph_times import StepTime
from minisrv.core.kv_cache import BlockPool
from minisrv.core.kv_events import RecordingBlockPool, RecordingScheduler
from minisrv.core.ladder import Ladders, ladders_of
from minisrv.core.scheduler import Scheduler
from minisrv.device_kind import ResolvedConfig, choose_compilation
from minisrv.engine.background import Background
from minisrv.engine.compilation import Compilation, Compiler, is_too_slow, timed_steps
from minisrv.engine.filling import LadderFilling
from minisrv.engine.grammars import Grammars
from minisrv.engine.kernel_process import KernelProcess
from minisrv.engine.kernels import KernelJob, compiled_meanwhile
from minisrv.engine.memory import KVCacheShape, MemoryPlan, fit_context, num_kv_blocks
from minisrv.engine.messages import EngineInfo, SleepTag
from minisrv.engine.platforms import Platform, Progress, platform_of
from minisrv.engine.refit import LadderRefit
from minisrv.engine.sleep import Sleeper
from minisrv.engine.step_costs import StepCosts
from minisrv.engine.step_trace import StepTrace
from minisrv.engine.verification import Verification
from minisrv.errors import ConfigError, CrashError
from minisrv.graph.captured import CapturedGraph
from minisrv.kernels.gpu import gpu_of
from minisrv.machine import missing_to_compile
from minisrv.model_config import ModelConfig
from minisrv.modes import GraphKey
from minisrv.nn.loader import load_model
from minisrv.nn.model import Model
from minisrv.progress import StartupClock
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.launches import LaunchCensus, SimulatedLaunches
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def no_progress(phase: str, done: int, total: int) -> None:
    """Tell nobody of the progress."""


@dataclass(frozen=True)
class EngineParts:
    """The parts of an engine.

    config: the settings, as the device and the model resolve them.
    info: the description of the engine for others.
    memory: the plan for the KV cache.
    cost_model: predicts the time of steps, and learns from those that are served.
    times: the duration of a step by each graph, if the platform has graphs timed.
    samples: the timed steps to which the cost model was fitted; none if there is no target.
    background: the work between steps.
    compilation: the way of compiled code into service.
    filling: the way of graphs into service that are not captured before the engine is ready.
    verification: what runs steps of requests again, to find graphs that are wrong.
    kernels: what decides which kernels the engine launches.
    sleeper: what puts the engine to sleep.
    batches: counts the steps by the sizes of their batches.
    step_trace: keeps the last steps; None if none are kept.
    """

    config: ResolvedConfig
    scheduler: Scheduler
    dispatcher: Dispatcher
    cost_model: CostModel
    runner: ModelRunner
    grammars: Grammars
    info: EngineInfo
    memory: MemoryPlan
    times: Mapping[GraphKey, StepTime]
    samples: list[StepSample]
    background: Background
    compilation: Compilation
    filling: LadderFilling
    verification: Verification
    kernels: KernelJob
    sleeper: Sleeper
    batches: BatchCounter
    step_trace: StepTrace | None


def build_engine(
    config: EngineConfig,
    progress: Progress = no_progress,
    *,
    checkpoint: Checkpoint | None = None,
    clock: StartupClock | None = None,
    early_kernels: KernelProcess | None = None,
    before_loading: Callable[[int, int], None] = lambda context, kv_blocks: None,
    make_compiler: Callable[[Model], Compiler] | None = None,
    serve_slower: bool = False,
    check_addresses: bool = False,
    record_kv_events: bool = False,
) -> EngineParts:
    """Load a model, capture the graphs with which it is served from the start, and certify them.

    progress: is called during loading and capturing, and never again once this has returned.
    checkpoint: the checkpoint that `config` names, if it has been opened already.
    clock: the clock of a start-up that began before this call and continues here.
    early_kernels: the process that compiles kernels, if it has been started already.
    before_loading: is called with the context length and the number of KV blocks before weights are
        read; on a GPU these are upper bounds. A ConfigError that it raises is passed on.
    make_compiler: makes what compiles the loaded model; None for what the compilation mode says.
    serve_slower: see `Compilation`. There is memory for two generations then, so that compiled code
        can be measured beside the model's own.
    check_addresses: see `CUDAGraphWrapper`; for tests.
    record_kv_events: whether the block pool is a `RecordingBlockPool`, whose events are then to be
        taken regularly.

    Raises the start-up branches of `minisrv.errors` (ConfigError, ModelError, CompilationError,
    GraphError).
    """
    threads.limit()
    clock = clock or StartupClock()
    with _timed(clock, "device"):
        platform = platform_of(config)
    device = platform.device
    config = platform.kind.resolve(config)
    with _timed(clock, "checkpoint"):
        checkpoint = checkpoint or open_checkpoint(config)
    description = checkpoint.model
    compilation_mode, why = choose_compilation(
        config, description.implementation, missing=missing_to_compile(config.device)
    )
    config = replace(config, compilation_mode=compilation_mode)
    dtype = resolve_dtype(config, description, platform)
    available = platform.cache_before_loading(config, description, dtype)
    context = context_length(config, description)
    context = fit_context(config, description, dtype, context, available)
    ladders = ladders_of(config, context)
    at_start = ladders if config.cudagraph_capture == "whole" else ladders.covering()
    shape = KVCacheShape.of(config, description, context, dtype)
    most_blocks = num_kv_blocks(config, shape, available)
    sizes = BufferSizes.of(ladders, context, config.block_size)
    platform.check_sizes(config, description, dtype, sizes, most_blocks)
    before_loading(context, most_blocks)
    model_config = description.for_context(context)
    builds_beside = make_compiler is not None
    if make_compiler is None and compilation_mode is CompilationMode.MINISRV_COMPILE:
        job = CompileJob(
            model=model_config,
            directory=checkpoint.directory,
            dtype=dtype_name(dtype),
            quantization=config.quantization,
            device=config.device,
            threads=torch.get_num_threads(),
            max_num_tokens=sizes.max_num_tokens,
        )
        make_compiler = partial(PieceCompiler, job, again=config.compile_wait)
        builds_beside = _builds_beside(job, ladders, again=config.compile_wait)

    sleep_tags = SleepTag if config.enable_sleep_mode else ()

    def make_model(progress: Progress) -> Model:
        """Return the model with its weights, ready to run."""
        model = load_model(
            model_config,
            checkpoint.directory,
            dtype=dtype,
            device=device,
            load_format=config.load_format,
            seed=config.seed,
            progress=lambda done, total: progress("loading weights", done, total),
        )
        model.prepare(quantization=config.quantization)
        return model

    kernels = KernelJob(
        model=model_config,
        directory=checkpoint.directory,
        dtype=dtype_name(dtype),
        quantization=config.quantization,
        ladders=ladders,
        block_size=config.block_size,
        gpu=gpu_of(device),
    )
    with _timed(clock, "kernels"), platform.compiled_kernels(kernels, progress, early_kernels):
        with _timed(clock, "weights"):
            model = make_model(progress)
            # Whatever refers to the weights from here on finds them where they stay.
            stored = model.stored_tensors()
            arenas = {tag: platform.make_arena() for tag in sleep_tags}
            if arenas:
                arenas[SleepTag.WEIGHTS].adopt(stored)
        with _timed(clock, "tokenizer"):
            grammars = Grammars(
                checkpoint.tokenizer, model_config.vocab_size, checkpoint.generation.eos_token_ids
            )

    def make_runner(
        num_blocks: int, context: int = context, empty: Callable[..., Tensor] = torch.empty
    ) -> ModelRunner:
        return ModelRunner(
            model,
            model_config,
            ladders,
            platform.make_backend(),
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_model_len=context,
            dtype=dtype,
            device=device,
            allowed_tokens=grammars,
            empty=empty,
            check_addresses=check_addresses,
        )

    with _timed(clock, "memory"):
        compares = serve_slower and compilation_mode is not CompilationMode.NONE
        generations = 2 if builds_beside or compares else 1
        memory = platform.plan_memory(config, shape, make_runner, available, generations, kernels)
        context = fit_context(config, model_config, dtype, context, memory.kv_cache_bytes)
        shape = KVCacheShape.of(config, model_config, context, dtype)
        num_blocks = num_kv_blocks(config, shape, memory.kv_cache_bytes)
        empty = arenas[SleepTag.KV_CACHE].empty if arenas else torch.empty
        runner = make_runner(num_blocks, context, empty)
        make_pool = RecordingBlockPool if record_kv_events else BlockPool
        pool = make_pool(num_blocks, config.block_size)
        census = LaunchCensus(model)
        if config.step_trace and not compilation_mode.whole:
            runner.observers.append(census)
    if compilation_mode.whole:
        with _timed(clock, "compilation"):
            # torch's compiler takes seconds to import.
            from minisrv.compile.whole import compile_whole

            compile_whole(
                model,
                compilation_mode,
                lambda done, total: progress("compiling the model", done, total),
            )
        logger.info("compiled the model in %.1f s", clock.seconds["compilation"])
    if not ladders.keys():
        logger.info("no graphs are captured: every step runs eagerly")
    with _timed(clock, "graphs"):
        compiler = None if make_compiler is None else make_compiler(model)
        costs = StepCosts(
            Dispatcher(ladders, in_service=at_start.keys()),
            at_start,
            config.itl_target_ms,
            chooses_graphs=platform.times_graphs,
        )
        background = Background()
        withdrawn: list[CapturedGraph] = []

        def release() -> None:
            """Free what is left of a generation that serves no more."""
            withdrawn.clear()
            platform.release()

        compilation = Compilation(
            background,
            compiler,
            runner,
            pool,
            platform.make_backend,
            compile_kernels=lambda program: compiled_meanwhile(replace(kernels, program=program)),
            release=release,
            timed=costs.timed_keys,
            use_times=costs.use_times,
            has_room=generations > 1 or memory.graph_bytes is None,
            serve_slower=serve_slower,
        )
        compilation.capture_graphs(
            at_start.keys(), lambda done, total: progress("capturing graphs", done, total)
        )
        if config.compile_wait:
            compilation.wait(lambda done, total: progress("compiling", done, total))
        runner.observers.clear()  # what is timed from here on is not counted
        if config.simulate_launch_us:
            logger.warning(
                "SIMULATED: every launch takes %g us longer; no time is the machine's own",
                config.simulate_launch_us,
            )
            runner.observers.append(SimulatedLaunches(config.simulate_launch_us))
        costs.measure(runner, pool, config.kind.long_context)
        platform.check_plan(config, memory, shape, runner)
        has_room = partial(platform.has_room, config, memory)
        filling = LadderFilling(background, runner, pool, costs, has_room, withdrawn)
        batches = BatchCounter()
        if config.cudagraph_refit != "off" and ladders.keys():
            refit = LadderRefit(
                background,
                runner,
                pool,
                costs,
                filling,
                compilation,
                batches,
                platform.make_backend,
                lambda ladders: compiled_meanwhile(
                    replace(kernels, ladders=ladders, program=compilation.program)
                ),
                applies=config.cudagraph_refit == "apply",
                has_room=has_room,
                release=release,
            )
            background.add(refit.work())
    config = replace(config, itl_target_ms=costs.itl_target_ms)
    make_scheduler = RecordingScheduler if record_kv_events else Scheduler
    scheduler = make_scheduler(
        pool,
        costs.budget,
        max_num_seqs=config.max_num_seqs,
        max_model_len=context,
        max_waiting=config.max_waiting,
        eos_token_ids=checkpoint.generation.eos_token_ids,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    verification = Verification(
        config.verify_graphs, background, runner, scheduler, filling.quarantine
    )
    info = EngineInfo(
        # If the cache is smaller than the context, it is the limit for requests.
        max_model_len=min(context, scheduler.block_pool.capacity),
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.hidden_size,
        num_kv_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=ladders.max_num_batched_tokens,
        itl_target_ms=costs.itl_target_ms,
        max_waiting=config.max_waiting,
        dtype=dtype_name(dtype),
        device=str(device),
        cudagraph_mode=ladders.mode.value,
        ladder=filling.report,
        startup_seconds=clock.seconds,
        simulated_launch_us=config.simulate_launch_us,
        async_scheduling=config.async_scheduling,
        compilation_mode=compilation_mode.name,
        compilation_reason=why,
        compilation=compilation.report,
        device_name=platform.device_name,
        ladders=ladders.sizes,
        step_trace=config.step_trace,
    )
    step_trace = None
    if config.step_trace:
        step_trace = StepTrace(config.step_trace, scheduler, model, info, census)
        runner.observers.append(step_trace)
    logger.info("resolved settings: %s", info.summary)
    sleeper = Sleeper(
        arenas,
        runner,
        pool,
        background,
        stored,
        lambda: make_model(no_progress).stored_tensors(),
        release=platform.release,
        held_bytes=platform.held_bytes,
    )
    return EngineParts(
        config=config,
        scheduler=scheduler,
        dispatcher=costs.dispatcher,
        cost_model=costs.cost_model,
        runner=runner,
        grammars=grammars,
        info=info,
        memory=memory,
        times=costs.times,
        samples=costs.samples,
        background=background,
        compilation=compilation,
        filling=filling,
        verification=verification,
        kernels=kernels,
        sleeper=sleeper,
        batches=batches,
        step_trace=step_trace,
    )


def resolve_dtype(config: EngineConfig, model: ModelConfig, platform: Platform) -> torch.dtype:
    """Return the dtype in which a model is served, and log it with the reason."""
    name, why = config.dtype, "as asked for"
    if config.quantization == "int8":
        name, why = "bfloat16", "the activations of int8 weights"
    elif name == "auto":
        name, why = platform.choose_dtype(model.dtype)
    dtype: torch.dtype = getattr(torch, name)
    logger.info("weights are %s, served in %s: %s", model.dtype, dtype_name(dtype), why)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, e.g. "float16", which may have been asked for as "half"."""
    return str(dtype).removeprefix("torch.")


def _builds_beside(job: CompileJob, ladders: Ladders, *, again: bool) -> bool:
    """Whether a start builds another generation beside the one that it is ready with: unless the
    cache has the program, which serves from the start, or knows that it may not serve.

    again: whether a program that was found to be too slow is made and measured once more.
    """
    kept = job.kept_program()
    try:
        if kept is not None and Program.is_whole(kept):
            return False
    except CrashError:
        return False
    speedup = None if again else known_slowness(job, timed_steps(ladders))
    return speedup is None or not is_too_slow(speedup)


@contextmanager
def _timed(clock: StartupClock, phase: str) -> Iterator[None]:
    """Time a phase of the start-up, which includes everything since the phase before it. Raises
    ConfigError where the GPU's memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory was full at start-up ({phase}): {error} Serve a smaller model "
            "or dtype, lower --kv-cache-memory or --gpu-memory-utilization, lower "
            "--max-num-batched-tokens or --max-num-seqs, or end what else uses the GPU."
        ) from error
    clock.end(phase)

"""The step loop without a process around it: requests in, tokens out.

Knows: how a checkpoint becomes a running engine, and the order of a step (schedule, dispatch, run,
update) at a lag of zero or one. Counts every step by mode and reason, and by request.
Knows nothing of sockets, text or HTTP.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from minisrv import threads
from minisrv.checkpoint import Checkpoint, context_length, open_checkpoint
from minisrv.config import EngineConfig
from minisrv.core.dispatcher import Dispatch, Dispatcher
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import ladders_of
from minisrv.core.scheduler import Scheduler
from minisrv.core.step import ScheduledRow, SchedulerOutput, TokenEvent
from minisrv.engine.grammars import Grammars
from minisrv.engine.memory import (
    KVCacheShape,
    cache_before_loading,
    check_fits,
    check_sizes,
    fit_context,
    num_kv_blocks,
    plan_memory,
)
from minisrv.engine.messages import EngineInfo, EngineStats, StepCount
from minisrv.errors import ConfigError, EngineDeadError, MinisrvError, RequestError
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.cuda import CUDABackend
from minisrv.kernels.linear import multiplies_bfloat16
from minisrv.kernels.native import native
from minisrv.machine import no_gpu
from minisrv.model_config import ModelConfig
from minisrv.nn.loader import load_model
from minisrv.progress import StartupClock
from minisrv.request import EngineOutput, EngineRequest, RequestFailure
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.launches import simulate_launches
from minisrv.runner.model_runner import ModelRunner
from minisrv.runner.results import StepResult

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a phase of the start-up, how much of it is done, and of how much."""


GRAMMAR_SECONDS = 0.01
"""What a step that has nothing to run waits for a grammar, before it looks for requests again."""


@dataclass(slots=True)
class _InFlight:
    """A launched step and what is needed to retire it.

    result: None while its epilogue has not been launched.
    follows: requests had work since the step before it, so that the time between the two is time in
        which the device waited for the host.
    """

    output: SchedulerOutput
    dispatch: Dispatch
    follows: bool
    result: StepResult | None = None


class _GraphSteps:
    """What the steps of each open request ran as, counted by "MODE/reason".

    Steps of one batch are counted once, for all of its rows, and written to each request when
    another batch comes or somebody asks.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {}
        self._batch_id: int | None = None
        self._rows: list[ScheduledRow] = []
        self._pending: dict[str, int] = {}

    def open(self, request_id: str) -> None:
        """A request is there, and has had no step."""
        self._counts[request_id] = {}

    def count(self, step: SchedulerOutput, key: str) -> None:
        """A step was launched."""
        if step.batch_id != self._batch_id:
            self._write()
            self._batch_id, self._rows = step.batch_id, step.batch_rows
        self._pending[key] = self._pending.get(key, 0) + 1

    def close(self, request_id: str) -> dict[str, int]:
        """A request has ended: its steps. Of one that is still in flight its token is dropped."""
        self._write()
        return self._counts.pop(request_id)

    def _write(self) -> None:
        for key, steps in self._pending.items():
            for row in self._rows:
                counts = self._counts.get(row.request_id)
                if counts is not None:  # None: it has ended
                    counts[key] = counts.get(key, 0) + steps
        self._pending = {}


class EngineCore:
    """An engine, ready when constructed.

    progress: told about loading and capturing.
    checkpoint: the one that `config` names, where it has been opened already.
    clock: of a start-up that has begun before this; its phases go on here.
    before_loading: told the context and the KV blocks before weights are read, on a GPU the most
        that they may be; a ConfigError of its is raised.
    check_addresses: see `CUDAGraphWrapper`; for tests.
    Raises the start-up branches of `minisrv.errors` (ConfigError, ModelError, GraphError).
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress = lambda phase, done, total: None,
        *,
        checkpoint: Checkpoint | None = None,
        clock: StartupClock | None = None,
        before_loading: Callable[[int, int], None] = lambda context, kv_blocks: None,
        check_addresses: bool = False,
    ) -> None:
        threads.limit()
        self._clock = clock or StartupClock()
        with self._timed("device"):
            device = resolve_device(config)
        self.config = config = replace(config, device=device.type)
        self.ladders = ladders_of(config)
        with self._timed("checkpoint"):
            checkpoint = checkpoint or open_checkpoint(config)
        told = checkpoint.model
        dtype = resolve_dtype(config, told, device)
        available = cache_before_loading(config, told, device, dtype)
        context = fit_context(config, told, dtype, context_length(config, told), available)
        most_blocks = num_kv_blocks(
            config, KVCacheShape.of(config, told, context, dtype), available
        )
        if device.type == "cpu":
            sizes = BufferSizes.of(self.ladders, context, config.block_size)
            check_sizes(config, told, dtype, sizes, most_blocks)
        before_loading(context, most_blocks)
        model_config = told.for_context(context)
        if device.type == "cpu":
            with self._timed("kernels"):
                progress("compiling kernels", 0, 1)
                native()
                progress("compiling kernels", 1, 1)
        with self._timed("weights"):
            model = load_model(
                model_config,
                checkpoint.directory,
                dtype=dtype,
                device=device,
                load_format=config.load_format,
                seed=config.seed,
                progress=lambda done, total: progress("loading weights", done, total),
            )
            model.prepare(int8=config.quantization == "int8")

        with self._timed("tokenizer"):
            self._grammars = Grammars(
                checkpoint.tokenizer, model_config.vocab_size, checkpoint.generation.eos_token_ids
            )

        def make_runner(num_blocks: int, context: int = context) -> ModelRunner:
            return ModelRunner(
                model,
                model_config,
                self.ladders,
                CPUTapeBackend() if device.type == "cpu" else CUDABackend(device),
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_model_len=context,
                dtype=dtype,
                device=device,
                allowed=self._grammars,
                check_addresses=check_addresses,
            )

        shape = KVCacheShape.of(config, model_config, context, dtype)
        with self._timed("memory"):
            self.memory = plan_memory(config, shape, device, make_runner, available)
            context = fit_context(config, model_config, dtype, context, self.memory.cache)
            shape = KVCacheShape.of(config, model_config, context, dtype)
            num_blocks = num_kv_blocks(config, shape, self.memory.cache)
            self.runner = make_runner(num_blocks, context)
        if not self.ladders.keys():
            logger.info("no graphs are captured: every step runs eagerly")
        with self._timed("graphs"):
            self.runner.capture_graphs(
                lambda done, total: progress("capturing graphs", done, total)
            )
            # A CPU's times differ by more than a choice between two graphs could save.
            self.times = self.runner.time_graphs() if device.type == "cuda" else {}
            check_fits(config, self.memory, shape, self.runner)
        if config.simulate_launch_us:
            logger.warning(
                "SIMULATED: every launch takes %g us longer; no time is the machine's own",
                config.simulate_launch_us,
            )
            simulate_launches(self.runner, config.simulate_launch_us)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=context,
            max_waiting=config.max_waiting,
            eos_token_ids=checkpoint.generation.eos_token_ids,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.dispatcher = Dispatcher(self.ladders, self.times)
        self.info = EngineInfo(
            # A cache smaller than the context is the limit that requests meet.
            max_model_len=min(context, self.scheduler.pool.capacity),
            vocab_size=model_config.vocab_size,
            num_kv_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            dtype=dtype_name(dtype),
            device=str(device),
            cudagraph_mode=self.ladders.mode.value,
            graphs=len(self.runner.graph_bytes),
            startup_seconds=self._clock.seconds,
            simulated_launch_us=config.simulate_launch_us,
        )
        self._broken = False
        ahead = config.async_scheduling
        self._lag = int(device.type == "cuda" if ahead is None else ahead)
        self._follows = False
        self._in_flight: deque[_InFlight] = deque()
        self._seeds = random.Random(config.seed)
        self._steps: dict[tuple[str, str], list[int]] = {}
        self._graph_steps = _GraphSteps()
        self._gpu_busy_ms = 0.0
        self._gpu_idle_ms = 0.0
        self._prompt_tokens = 0
        self._prefill_tokens = 0
        self._generated_tokens = 0

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """A phase of the start-up: all that has happened since the one before it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the GPU's memory was full at start-up ({phase}): {error} Serve a smaller model "
                "or dtype, lower --kv-cache-memory or --gpu-memory-utilization, lower "
                "--max-num-batched-tokens or --max-num-seqs, or end what else uses the GPU."
            ) from error
        self._clock.end(phase)

    # ---- requests ----------------------------------------------------------------------------

    def check(self, request: EngineRequest) -> None:
        """Raise RequestError or ContextLengthError for a request that can never be served."""
        ids, vocab, params = request.prompt_token_ids, self.info.vocab_size, request.params
        if not ids:
            raise RequestError("the prompt is empty; give at least one token.", param="prompt")
        for param, given in (
            ("prompt", ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            bad = next((i for i in given if not 0 <= i < vocab), None)
            if bad is not None:
                raise RequestError(
                    f"token id {bad} is not in the vocabulary; ids go from 0 to {vocab - 1}.",
                    param=param,
                )
        self.scheduler.check(len(ids), params.max_tokens)

    def add(self, request: EngineRequest) -> None:
        """Queue a request, or raise what `check` raises, or QueueFullError, and queue nothing."""
        self.check(request)
        seed, grammar = request.params.seed, request.structured_output
        had_work = self.scheduler.has_work
        self.scheduler.add(
            request,
            self._seeds.getrandbits(63) if seed is None else seed,
            held=grammar is not None,
        )
        if grammar is not None:
            self._grammars.compile(request.request_id, grammar, request.params)
        self._follows &= had_work
        self._prompt_tokens += len(request.prompt_token_ids)
        self._graph_steps.open(request.request_id)

    @property
    def has_room(self) -> bool:
        """Whether `add` would not find the queue full."""
        return self.scheduler.has_room

    def abort(self, request_id: str) -> EngineOutput | None:
        """Drop a request; None if it has ended already."""
        event = self.scheduler.abort(request_id)
        return None if event is None else self._output(event, None)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do."""
        return self.scheduler.has_work or bool(self._in_flight)

    # ---- steps -------------------------------------------------------------------------------

    def step(self) -> list[EngineOutput]:
        """Launch what the lag allows, retire the oldest step in flight, and say what it added.

        Whatever interrupts a step, Ctrl-C too, leaves requests, device and host out of step: the
        engine refuses to go on then (EngineDeadError).
        """
        if self._broken:
            raise EngineDeadError("a step was interrupted; make a new engine.")
        self._broken = True
        outputs = self._step()
        self._broken = False
        return outputs

    def _step(self) -> list[EngineOutput]:
        failed = self._release_compiled() if self._grammars.compiling else []
        while len(self._in_flight) <= self._lag and not self._masks_pending:
            output = self.scheduler.schedule()
            if output is None:
                break
            self._launch(output)
        if not self._in_flight:
            if self._grammars.compiling and not failed:
                self._grammars.wait(GRAMMAR_SECONDS)
            return failed
        step = self._in_flight.popleft()
        result = step.result
        assert result is not None, "the oldest step is launched whole"
        events = self.scheduler.update(step.output.step_id, result.tokens())
        if (time := result.device_time()) is not None:
            self._gpu_busy_ms += time.busy
            if step.follows and time.idle is not None:
                self._gpu_idle_ms += time.idle
        errors = self._follow_grammars(events) if step.output.masked else {}
        outputs = [self._output(event, result) for event in events]
        if errors:
            outputs = [output for output in outputs if output.request_id not in errors]
            failed += [self._fail(request_id, error) for request_id, error in errors.items()]
        if self._masks_pending:
            self._finish(self._in_flight[0])
        return failed + outputs

    @property
    def _masks_pending(self) -> bool:
        """Whether the youngest step waits with its epilogue: what a row of it may sample follows
        from a token that a step before it samples. Its model runs meanwhile; only steps that
        contain such a row wait."""
        return bool(self._in_flight) and self._in_flight[-1].result is None

    def _release_compiled(self) -> list[EngineOutput]:
        """Let those go on whose grammars are compiled; returns what ends those whose are not."""
        failed = []
        for request_id, error in self._grammars.compiled():
            if error is None:
                self.scheduler.release(request_id)
            else:
                failed.append(self._fail(request_id, error))
        return failed

    def _follow_grammars(self, events: list[TokenEvent]) -> dict[str, MinisrvError]:
        """Whose grammar cannot be followed any further, and why."""
        errors = {}
        for event in events:
            if event.token is not None:
                error = self._grammars.accept(event.request_id, event.token)
                if error is not None:
                    errors[event.request_id] = error
        return errors

    def _fail(self, request_id: str, error: MinisrvError) -> EngineOutput:
        """End a request with an error, whether or not it has ended otherwise in this step."""
        self.abort(request_id)
        return EngineOutput(request_id=request_id, error=RequestFailure.of(error))

    def _launch(self, output: SchedulerOutput) -> None:
        dispatch = self.dispatcher.dispatch(
            output.num_tokens,
            output.num_rows,
            uniform_decode=output.uniform_decode,
            needs_logits=output.needs_logits,
            masked=output.masked,
        )
        self._count(output, dispatch)
        step = _InFlight(output, dispatch, self._follows)
        self._follows = True
        self.runner.start(output, dispatch)
        if not (output.masked and self._in_flight):
            self._finish(step)
        self._in_flight.append(step)

    def _finish(self, step: _InFlight) -> None:
        """Launch what has not been launched of a step."""
        step.result = self.runner.finish(step.output, step.dispatch)

    def _count(self, output: SchedulerOutput, dispatch: Dispatch) -> None:
        mode, reason = dispatch.mode.name, dispatch.reason.value
        counts = self._steps.setdefault((mode, reason), [0, 0, 0])
        counts[0] += 1
        counts[1] += output.num_tokens
        counts[2] += dispatch.descriptor.num_tokens - output.num_tokens
        self._prefill_tokens += output.num_tokens - output.num_decodes
        self._graph_steps.count(output, f"{mode}/{reason}")

    def _output(self, event: TokenEvent, result: StepResult | None) -> EngineOutput:
        logprobs, prompt_logprobs = None, []
        if result is not None and result.logprobs is not None and event.row is not None:
            found = result.logprobs.sampled[event.row]
            logprobs = None if found is None or event.token is None else [found]
            prompt_logprobs = result.logprobs.prompt[event.row]
        graph_steps = None
        if event.finish_reason is not None:
            graph_steps = self._graph_steps.close(event.request_id)
            self._grammars.drop(event.request_id)
        self._generated_tokens += event.token is not None
        return EngineOutput(
            request_id=event.request_id,
            token_ids=[] if event.token is None else [event.token],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=event.finish_reason,
            graph_steps=graph_steps,
            num_cached_tokens=event.num_cached_tokens,
        )

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.held),
            kv_blocks_used=scheduler.pool.num_used,
            kv_blocks_total=scheduler.pool.total - 1,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            prefill_tokens=self._prefill_tokens,
            generated_tokens=self._generated_tokens,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            gpu_busy_ms=self._gpu_busy_ms,
            gpu_idle_ms=self._gpu_idle_ms,
            steps=[StepCount(*key, *counts) for key, counts in self._steps.items()],
        )


# ---- settings resolved against the model and the machine ---------------------------------------


def resolve_device(config: EngineConfig) -> torch.device:
    """`auto` is the current GPU where there is one. Raises ConfigError where a GPU is wanted and
    there is none."""
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise no_gpu("torch sees no GPU here")
    if config.device == "cpu" or not there:
        return torch.device("cpu")
    if config.quantization is not None:  # device auto, which has found a GPU
        raise ConfigError("quantization=int8 is for CPUs; leave it out, or use --device cpu.")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """The serving dtype. On a GPU `auto` keeps half precision as it is and rounds all else to
    bfloat16. On a CPU it keeps bfloat16 where the CPU multiplies it natively, as it is half as many
    bytes to read, and widens all else to float32."""
    name, why = config.dtype, "as asked for"
    if config.quantization == "int8":
        name, why = "bfloat16", "the activations of int8 weights"
    elif name == "auto" and device.type == "cuda":
        half = model.dtype in ("bfloat16", "float16")
        name, why = model.dtype if half else "bfloat16", "half precision, as GPUs like it"
    elif name == "auto" and model.dtype == "bfloat16" and multiplies_bfloat16():
        name, why = "bfloat16", "which this CPU multiplies natively"
    elif name == "auto":
        name, why = "float32", "the fastest here that loses nothing"
    dtype: torch.dtype = getattr(torch, name)
    logger.info("weights are %s, served in %s: %s", model.dtype, dtype_name(dtype), why)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. "float16", which may have been asked for as "half"."""
    return str(dtype).removeprefix("torch.")

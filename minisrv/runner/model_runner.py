"""Runs one step on the device: fill, forward, epilogue.

Knows: the model, the cache, the buffers and the graph wrappers, and how a dispatched step goes
through them. Knows nothing of waiting requests, of finish reasons, or of how the mode was chosen.

    decode, FULL:     [ gather by slot -> model -> lm_head -> sample -> scatter ]  one graph
    apart, FULL:      [ gather by slot -> model ] -> epilogue
    mixed, FULL:      fill -> [ model ] -> epilogue
    mixed, PIECEWISE: fill -> [ model, broken at attention ] -> epilogue
    epilogue, TOKENS: [ rows -> lm_head -> masks -> sample -> scatter ]
    epilogue, LOGITS: [ rows -> lm_head ] -> processors -> masks -> sample -> scatter

("apart" is a decode step whose epilogue must not be in its graph.) Each pair of brackets is one
wrapper, and the FULL wrappers around the model contain the PIECEWISE one. A wrapper passes through
when the context's mode is not its own, so an eager run takes the same code.

A step is launched in two parts, because the epilogue of a step with masks can be launched only when
the masks are known, and the model need not wait for them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from minisrv.core.dispatcher import Dispatch, StepTime
from minisrv.core.ladder import Ladders
from minisrv.core.step import ScheduledRow, SchedulerOutput, unscheduled_id
from minisrv.errors import ConfigError
from minisrv.graph.backend import GraphBackend
from minisrv.graph.certify import Start, certify
from minisrv.graph.forward_context import ForwardContext, get_forward_context, set_forward_context
from minisrv.graph.wrapper import CUDAGraphWrapper
from minisrv.kernels import apply_bitmask_op, sample_op, take_rows_op
from minisrv.model_config import ModelConfig
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Epilogue, GraphKey, Part
from minisrv.nn.decoder import Decoder
from minisrv.request import TokenLogprobs
from minisrv.runner.batches import BatchLimits, full_batch, short_batch
from minisrv.runner.input_buffers import BufferSizes, InputBuffers, SlotState
from minisrv.runner.logits_processors import LogitsProcessors
from minisrv.runner.logprobs import LogprobReport, report_logprobs, score_prompts
from minisrv.runner.results import ResultRing, StepResult
from minisrv.runner.token_masks import AllowedTokens, TokenMasks
from minisrv.runner.trial import GREEDY, StepTrial

Launch = Callable[[Part, SchedulerOutput, Dispatch], LogprobReport | None]
"""Function that launches a part of a step once its buffers are filled; see
`ModelRunner._launch`."""

DRIVER_BYTES = 2 << 20
"""Number of bytes in which CUDA's driver allocates memory for graphs; several graphs share a
piece."""

TIMED_REPLAYS = 5

CaptureProgress = Callable[[int, int], None]
"""Function that is called with the number of graphs captured so far and the number of all."""


class ModelRunner:
    """Runs steps. All methods must be called from one thread.

    allowed: knows which tokens may be sampled by rows that a grammar restricts; None if there will
        be no such rows.
    graph_bytes: the number of bytes that the capture of each graph took; 0 for a graph that fits
        into memory which other graphs share.
    launch: the function that launches a part of a step; `runner.launches` replaces it to count.
    """

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        ladders: Ladders,
        backend: GraphBackend,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        allowed: AllowedTokens | None = None,
        check_addresses: bool = False,
    ) -> None:
        sizes = BufferSizes.of(ladders, max_model_len, block_size)
        self.limits = BatchLimits(
            rows=ladders.max_num_seqs,
            tokens=ladders.max_num_batched_tokens,
            context=max_model_len,
            blocks=num_blocks - 1,
            block_size=block_size,
        )
        self.model = model
        self.ladders = ladders
        self.vocab_size = config.vocab_size
        self.state = SlotState(sizes, device)
        self.buffers = InputBuffers(config, sizes, self.state, dtype, device)
        self.processors = LogitsProcessors(config.vocab_size, device)
        self.masks = TokenMasks(self.buffers.bitmask)
        self.results = ResultRing(sizes.rows, device)
        # The cache is not zeroed: no entry is read before it has been written, as certification
        # shows.
        cache = (num_blocks, block_size, 2, config.num_kv_heads, config.head_dim)
        try:
            self.kv_caches = [
                torch.empty(cache, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]
        except RuntimeError as error:
            raise ConfigError(
                f"{num_blocks} KV blocks do not fit the memory of {device}; lower "
                "--kv-cache-memory or --num-kv-blocks."
            ) from error
        model.bind_kv_cache(self.kv_caches)
        self.model_step = CUDAGraphWrapper(
            self._model_step, CUDAGraphMode.PIECEWISE, backend, check_addresses=check_addresses
        )
        self.mixed_step = CUDAGraphWrapper(
            self.model_step, CUDAGraphMode.FULL, backend, check_addresses=check_addresses
        )
        self.decode_step = CUDAGraphWrapper(
            self._decode_step, CUDAGraphMode.FULL, backend, check_addresses=check_addresses
        )
        self.epilogue_step = CUDAGraphWrapper(
            self._epilogue_step, CUDAGraphMode.FULL, backend, check_addresses=check_addresses
        )
        self.launch: Launch = self._launch
        self.allowed = allowed
        self.graph_bytes: dict[GraphKey, int] = {}

    def execute(self, output: SchedulerOutput, dispatch: Dispatch) -> StepResult:
        """Launch a scheduled step as it was dispatched, and return its result."""
        self.start(output, dispatch)
        return self.finish(output, dispatch)

    @torch.no_grad()
    def start(self, output: SchedulerOutput, dispatch: Dispatch) -> None:
        """Launch the first part of a step. Its `finish` must be called before another step is
        started."""
        epilogue_rows = dispatch.epilogue[1].num_tokens if dispatch.epilogue else 0
        attn = self.buffers.fill(output, dispatch.descriptor, epilogue_rows)
        self.processors.start(output)
        self.results.begin()
        with set_forward_context(ForwardContext(dispatch.mode, dispatch.descriptor, attn)):
            self.launch(Part.FORWARD, output, dispatch)

    @torch.no_grad()
    def finish(self, output: SchedulerOutput, dispatch: Dispatch) -> StepResult:
        """Launch the rest of a step that has been started, and return its result. If a grammar
        restricts some of its rows, the tokens of all earlier steps must be on the host."""
        logprobs = None
        if dispatch.epilogue is not None:
            if output.masked:
                assert self.allowed is not None, "made for masked rows"
                self.masks.send(output.batch_rows, self.allowed)
            with set_forward_context(ForwardContext(*dispatch.epilogue, attn=None)):
                logprobs = self.launch(Part.EPILOGUE, output, dispatch)
        return self.results.end(self.buffers.tokens[: output.num_rows], logprobs)

    def _launch(
        self, part: Part, output: SchedulerOutput, dispatch: Dispatch
    ) -> LogprobReport | None:
        """Launch one part of what lies between the filled buffers and the sampled tokens."""
        if part is Part.EPILOGUE:
            self.epilogue_step()
            ended = get_forward_context().descriptor.epilogue is Epilogue.TOKENS
            return None if ended else self._sample_logits(output)
        if dispatch.descriptor.forward:
            self.step_of(dispatch.descriptor)(*self._inputs(dispatch.descriptor))
        return None

    def _sample_logits(self, output: SchedulerOutput) -> LogprobReport | None:
        """Sample tokens from the logits, after the changes that are made to them, and return the
        report on them."""
        buffers, rows = self.buffers, output.num_rows
        logits, tokens = buffers.logits[:rows], buffers.tokens[:rows]
        chosen = self.processors.process(output, logits, buffers.next_positions(rows))
        if output.masked:
            if chosen is logits:  # the report needs the unchanged logits
                chosen = logits.clone()
            apply_bitmask_op(chosen, buffers.bitmask[:rows])
        self._sample(chosen)
        self.processors.count(output, tokens)
        buffers.scatter(rows)
        return self._report(output.batch_rows, logits, tokens)

    def _report(
        self, rows: list[ScheduledRow], logits: Tensor, tokens: Tensor
    ) -> LogprobReport | None:
        """Return the log-probabilities that the rows ask for, for which the host waits; None if
        they ask for none."""
        sampled = [row.logprobs for row in rows]
        scores = any(row.score is not None for row in rows)
        if not scores and not any(count is not None for count in sampled):
            return None
        prompt: list[list[TokenLogprobs]] = [[] for _ in rows]
        if scores:
            hidden, compute = self.buffers.hidden, self.model.compute_logits
            prompt = score_prompts(rows, hidden, compute, self.vocab_size)
        return LogprobReport(report_logprobs(logits, tokens, sampled), prompt)

    @property
    def wrappers(self) -> tuple[CUDAGraphWrapper, ...]:
        """All wrappers that may replay a graph."""
        return self.model_step, self.mixed_step, self.decode_step, self.epilogue_step

    def wrapper_of(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> CUDAGraphWrapper:
        """Return the wrapper that holds the graph of that key."""
        return self.model_step if mode is CUDAGraphMode.PIECEWISE else self.step_of(descriptor)

    def step_of(self, descriptor: BatchDescriptor) -> CUDAGraphWrapper:
        """Return the outermost wrapper that a step goes through, whatever its mode."""
        if not descriptor.forward:
            return self.epilogue_step
        return self.decode_step if descriptor.uniform_decode else self.mixed_step

    def _inputs(self, descriptor: BatchDescriptor) -> tuple[Tensor, ...]:
        """Return the arguments of the wrapper; decode steps and epilogues gather their own
        inputs."""
        tokens, buffers = descriptor.num_tokens, self.buffers
        if descriptor.uniform_decode:
            return ()
        return buffers.input_ids[:tokens], buffers.positions[:tokens]

    def _model_step(self, input_ids: Tensor, positions: Tensor) -> None:
        self.model(input_ids, positions, self.buffers.hidden[: len(input_ids)])

    def _decode_step(self) -> None:
        descriptor, buffers = get_forward_context().descriptor, self.buffers
        rows = descriptor.num_tokens
        buffers.gather_decode(rows)
        self.model_step(buffers.input_ids[:rows], buffers.positions[:rows])
        if descriptor.epilogue is Epilogue.TOKENS:
            self._sample(self.model.compute_logits(buffers.hidden[:rows]))
            buffers.scatter(rows)

    def _epilogue_step(self) -> None:
        descriptor, buffers = get_forward_context().descriptor, self.buffers
        rows = descriptor.num_tokens
        hidden = buffers.hidden.new_empty(rows, buffers.hidden.shape[1])
        take_rows_op(buffers.hidden, buffers.logits_indices[:rows], hidden)
        logits = self.model.compute_logits(hidden)
        if descriptor.epilogue is Epilogue.LOGITS:
            buffers.logits[:rows].copy_(logits)
        else:
            apply_bitmask_op(logits, buffers.bitmask[:rows])
            self._sample(logits)
            buffers.scatter(rows)

    def _sample(self, logits: Tensor) -> None:
        state, rows = self.state, len(logits)
        sample_op(
            logits,
            self.buffers.slots[:rows],
            self.buffers.next_positions(rows),
            state.temperature,
            state.top_k,
            state.top_p,
            state.min_p,
            state.seed,
            self.buffers.tokens[:rows],
        )

    def capture_graphs(self, on_progress: CaptureProgress) -> None:
        """Capture and certify every graph of the ladders.

        The cache must be empty: certification runs on real slots and blocks and clears them.

        Raises GraphCaptureError, CertificationError.
        """
        keys = self.ladders.keys()
        if not keys:
            return
        # A garbage collection in the middle of a capture would free objects that the capture does
        # not expect to be freed, and scanning every object between two graphs takes longer than
        # capturing one (vLLM#21146).
        gc.collect()
        gc.freeze()
        try:
            for done, (mode, descriptor) in enumerate(keys):
                on_progress(done, len(keys))
                self._capture_and_certify(mode, descriptor).clear()
        finally:
            gc.unfreeze()
        on_progress(len(keys), len(keys))

    def time_graphs(self) -> dict[GraphKey, StepTime]:
        """Return the duration of a step by every graph, including its epilogue, and of epilogues
        alone, on a greedy batch that leaves little padding. The cache must be empty."""
        times = {}
        for mode, key in self.ladders.keys():  # noqa: SIM118  (not a mapping)
            batch = short_batch(key, self.limits)
            trial = StepTrial(self, mode, key, batch, params=[GREEDY])
            found = [trial.time_replay() for _ in range(TIMED_REPLAYS)]
            times[mode, key] = StepTime(min(found), median(found))
            trial.clear()
        return times

    def probe(self) -> int:
        """Return the number of bytes that all graphs will take, after a trial that takes all the
        memory that serving will need except for the smaller graphs.

        The trial runs the largest step eagerly, and captures and certifies the two largest graphs
        of each kind. The prediction is the size of the largest graph, and for each other graph the
        size of the second or of one piece of the driver's memory, whichever is larger.
        """
        largest = BatchDescriptor(self.limits.tokens)
        trial = StepTrial(self, CUDAGraphMode.NONE, largest, full_batch(largest, self.limits))
        trial.reset(Start.CLEAN)
        trial.run(graph=False)
        kinds: dict[tuple[int, Epilogue], list[GraphKey]] = {}
        every = self.ladders.keys()
        for key in every:
            kind = id(self.wrapper_of(*key)), key[1].epilogue
            kinds.setdefault(kind, []).append(key)
        predicted = 0
        for keys in kinds.values():
            for key in keys[:2]:
                self._capture_and_certify(*key)
            largest_bytes, *others = (self.graph_bytes[key] for key in keys[:2])
            predicted += largest_bytes + (len(keys) - 1) * max(DRIVER_BYTES, *others, 0)
        return predicted

    def _capture_and_certify(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> StepTrial:
        trial = StepTrial(self, mode, descriptor, short_batch(descriptor, self.limits))
        certify(trial, partial(self._capture, mode, descriptor))
        graph = self.wrapper_of(mode, descriptor).graphs[descriptor]
        self.graph_bytes[mode, descriptor] = graph.nbytes
        return trial

    @torch.no_grad()
    def _capture(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Capture one graph, on a batch of padding only."""
        if not descriptor.forward:
            self.buffers.hidden.zero_()
        unscheduled = unscheduled_id()
        nobody = SchedulerOutput(unscheduled, unscheduled, [], [], [], num_decodes=0, num_tokens=0)
        epilogue_rows = 0 if descriptor.forward else descriptor.num_tokens
        attn = self.buffers.fill(nobody, descriptor, epilogue_rows)
        context = ForwardContext(mode, descriptor, attn if descriptor.forward else None)
        with set_forward_context(context):
            self.wrapper_of(mode, descriptor).capture(*self._inputs(descriptor))

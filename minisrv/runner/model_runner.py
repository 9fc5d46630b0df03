"""Runs one step on the device: inputs, model, epilogue.

Knows: the model, the cache, the buffers and the graph wrappers, and how a dispatched step goes
through them. Knows nothing of waiting requests, of finish reasons, or of how the mode was chosen.

    decode, FULL:     [ gather -> model -> lm_head -> sample -> scatter ]  one graph
    decode to HIDDEN: [ gather -> model ] -> epilogue
    mixed, FULL:      prepare inputs -> [ model ] -> epilogue
    mixed, PIECEWISE: prepare inputs -> [ model, broken at attention ] -> epilogue
    epilogue, TOKENS: [ rows -> lm_head -> masks -> sample -> scatter ]
    epilogue, LOGITS: [ rows -> lm_head ] -> processors -> masks -> sample -> scatter

Each pair of brackets is one wrapper, and the FULL wrappers around the model contain the PIECEWISE
one. A wrapper passes through when the context's mode is not its own, so an eager run takes the same
code.

A step has one stage or two, each launched by itself, because the epilogue of a step with masks can
be launched only when the masks are known, and the model need not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisrv.core.dispatcher import Dispatch
from minisrv.core.ladder import Ladders
from minisrv.core.step import SchedulerOutput, unscheduled_id
from minisrv.errors import ConfigError
from minisrv.graph.backend import GraphBackend
from minisrv.graph.captured import CapturedGraph
from minisrv.graph.forward_context import (
    ForwardContext,
    get_forward_context,
    set_forward_context,
)
from minisrv.graph.observer import StepObserver, StepPart, entered
from minisrv.graph.wrapper import CUDAGraphWrapper
from minisrv.kernels import AttentionMetadata, apply_bitmask_op, sample_op, take_rows_op
from minisrv.model_config import ModelConfig
from minisrv.modes import BatchDescriptor, CUDAGraphMode, GraphKey, Stage, StageOutput
from minisrv.nn.model import Model
from minisrv.runner.input_buffers import BufferSizes, InputBuffers, RequestTensors
from minisrv.runner.logits_processors import LogitsProcessors
from minisrv.runner.logprobs import LogprobReport, report_results
from minisrv.runner.results import ResultRing, StepResult
from minisrv.runner.token_masks import AllowedTokens, TokenMasks


class ModelRunner:
    """Runs steps. All methods must be called from one thread.

    allowed_tokens: knows which tokens may be sampled by rows that a grammar restricts; None if
        there will be no such rows.
    num_blocks: the number of blocks in the KV cache, the null block included.
    block_size: the number of tokens in a block.
    max_model_len: the maximum number of tokens of a request.
    empty: allocates the KV cache, with the arguments of `torch.empty`.
    observers: those who are told how each step goes.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        ladders: Ladders,
        backend: GraphBackend,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        allowed_tokens: AllowedTokens | None = None,
        empty: Callable[..., Tensor] = torch.empty,
        check_addresses: bool = False,
    ) -> None:
        sizes = BufferSizes.of(ladders, max_model_len, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.model = model
        self.ladders = ladders
        self.vocab_size = config.vocab_size
        self.request_tensors = RequestTensors(sizes, device)
        self.buffers = InputBuffers(config, sizes, self.request_tensors, dtype, device)
        model.allocate_buffers(sizes.max_num_tokens)
        self.processors = LogitsProcessors(config.vocab_size, device)
        self.token_masks = TokenMasks(self.buffers.bitmask)
        self.results = ResultRing(sizes.max_num_reqs, device)
        # The cache is not zeroed: no entry is read before it has been written, as certification
        # shows.
        cache = (num_blocks, block_size, 2, config.num_kv_heads, config.head_dim)
        try:
            self.kv_caches = [
                empty(cache, dtype=dtype, device=device) for _ in range(config.num_layers)
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
        self.allowed_tokens = allowed_tokens
        self.observers: list[StepObserver] = []

    @torch.no_grad()
    def execute_model(self, output: SchedulerOutput, dispatch: Dispatch) -> None:
        """Launch the stage of the model. `sample_tokens` must be called for this step before
        another step is started."""
        attn = self.prepare(output, dispatch.stages)
        self.processors.update_requests(output)
        self._lap(StepPart.FILL)
        self.results.begin()
        self._lap(StepPart.REST)
        self.launch(dispatch.stages[0], output, attn)
        self._lap(StepPart.LAUNCH)

    @torch.no_grad()
    def sample_tokens(self, output: SchedulerOutput, dispatch: Dispatch) -> StepResult:
        """Launch the rest of a step that has been started, and return its result. If a grammar
        restricts some of its rows, the tokens of all earlier steps must be on the host."""
        logprobs = None
        if dispatch.epilogue is not None:
            if output.has_structured_output_requests:
                assert self.allowed_tokens is not None, "rows with a grammar need it"
                self.token_masks.upload(output.batch_rows, self.allowed_tokens)
            self._lap(StepPart.FILL)
            logprobs = self.launch(dispatch.epilogue, output)
            self._lap(StepPart.LAUNCH)
        result = self.results.end(self.buffers.sampled_token_ids[: output.num_rows], logprobs)
        self._lap(StepPart.RESULT)
        return result

    def _lap(self, part: StepPart) -> None:
        for observer in self.observers:
            observer.lap(part)

    def prepare(
        self, output: SchedulerOutput, stages: tuple[GraphKey, ...]
    ) -> AttentionMetadata | None:
        """Write the inputs of a step to the buffers, padded for its stages, and return the
        attention arguments of the model's stage; None if there is no such stage."""
        first, last = stages[0][1], stages[-1][1]
        epilogue_rows = last.num_tokens if last.stage is Stage.EPILOGUE else 0
        attn = self.buffers.prepare_inputs(output, first, epilogue_rows)
        return attn if first.stage is Stage.MODEL else None

    def launch(
        self,
        key: GraphKey,
        output: SchedulerOutput,
        attn: AttentionMetadata | None = None,
        graph: CapturedGraph | None = None,
    ) -> LogprobReport | None:
        """Launch a stage of a step whose inputs are in the buffers, and return the report on
        log-probabilities if the stage is an epilogue that makes one. To be called where torch
        records no gradients.

        key: the mode of the stage and its padded shape.
        attn: the attention arguments; None for an epilogue.
        graph: a graph to replay in place of the installed one.
        """
        layers = self.model.attention_layers
        context = ForwardContext(*key, attn, layers, graph, self.observers)
        contexts = [made for observer in self.observers if (made := observer.stage(key, output))]
        if not contexts:
            return self._launch(context, output)
        with entered(contexts):
            return self._launch(context, output)

    def _launch(self, context: ForwardContext, output: SchedulerOutput) -> LogprobReport | None:
        descriptor = context.descriptor
        with set_forward_context(context):
            self.stage_wrapper(descriptor)(*self._inputs(descriptor))
        # A stage that ends with logits is an epilogue, and is followed by what no graph holds.
        return self._sample_logits(output) if descriptor.output is StageOutput.LOGITS else None

    def _sample_logits(self, output: SchedulerOutput) -> LogprobReport | None:
        """Sample tokens from the logits, after the changes that are made to them, and return the
        report on them."""
        buffers, rows = self.buffers, output.num_rows
        logits, tokens = buffers.logits[:rows], buffers.sampled_token_ids[:rows]
        chosen = self.processors.apply(output, logits, buffers.next_positions(rows))
        if output.has_structured_output_requests:
            if chosen is logits:  # the report needs the unchanged logits
                chosen = logits.clone()
            apply_bitmask_op(chosen, buffers.bitmask[:rows])
        self._sample(chosen)
        self.processors.count_sampled_tokens(output, tokens)
        buffers.scatter(rows)
        hidden, compute = buffers.hidden, self.model.compute_logits
        return report_results(output.batch_rows, logits, tokens, hidden, compute, self.vocab_size)

    @property
    def wrappers(self) -> tuple[CUDAGraphWrapper, ...]:
        """All wrappers that may replay a graph."""
        return self.model_step, self.mixed_step, self.decode_step, self.epilogue_step

    @property
    def graphs(self) -> dict[GraphKey, CapturedGraph]:
        """The installed graphs."""
        return {
            (wrapper.mode, descriptor): graph
            for wrapper in self.wrappers
            for descriptor, graph in wrapper.graphs.items()
        }

    def stage_wrapper(self, descriptor: BatchDescriptor) -> CUDAGraphWrapper:
        """Return the outermost wrapper that a stage goes through, whatever its mode."""
        if descriptor.stage is Stage.EPILOGUE:
            return self.epilogue_step
        return self.decode_step if descriptor.uniform_decode else self.mixed_step

    def _wrapper(self, key: GraphKey) -> CUDAGraphWrapper:
        """Return the wrapper in which the graph of that key is installed."""
        mode, descriptor = key
        if mode is CUDAGraphMode.PIECEWISE:
            return self.model_step
        return self.stage_wrapper(descriptor)

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
        assert descriptor.query_len == 1, "only the last token of a request is gathered"
        rows = descriptor.num_tokens
        buffers.gather_decode(rows)
        self.model_step(buffers.input_ids[:rows], buffers.positions[:rows])
        if descriptor.output is StageOutput.TOKENS:
            self._sample(self.model.compute_logits(buffers.hidden[:rows]))
            buffers.scatter(rows)

    def _epilogue_step(self) -> None:
        descriptor, buffers = get_forward_context().descriptor, self.buffers
        rows = descriptor.num_tokens
        hidden = buffers.hidden.new_empty(rows, buffers.hidden.shape[1])
        take_rows_op(buffers.hidden, buffers.logits_indices[:rows], hidden)
        logits = self.model.compute_logits(hidden)
        if descriptor.output is StageOutput.LOGITS:
            buffers.logits[:rows].copy_(logits)
        else:
            apply_bitmask_op(logits, buffers.bitmask[:rows])
            self._sample(logits)
            buffers.scatter(rows)

    def _sample(self, logits: Tensor) -> None:
        request_tensors, rows = self.request_tensors, len(logits)
        sample_op(
            logits,
            self.buffers.req_indices[:rows],
            self.buffers.next_positions(rows),
            request_tensors.temperature,
            request_tensors.top_k,
            request_tensors.top_p,
            request_tensors.min_p,
            request_tensors.seed,
            self.buffers.sampled_token_ids[:rows],
        )

    @torch.no_grad()
    def capture(self, key: GraphKey) -> CapturedGraph:
        """Capture the graph of a stage on a batch of padding only, and return it. It is not
        installed, and writes nothing that belongs to a request.

        The stage must have run eagerly at this shape before, as its warm-up. Raises
        GraphCaptureError.
        """
        mode, descriptor = key
        unscheduled = unscheduled_id()
        no_rows = SchedulerOutput(unscheduled, unscheduled, [], [], [], num_decodes=0, num_tokens=0)
        if descriptor.stage is Stage.EPILOGUE:
            self.buffers.hidden.zero_()
        attn = self.prepare(no_rows, (key,))
        layers = self.model.attention_layers
        context = ForwardContext(mode, descriptor, attn, layers, observers=self.observers)
        with set_forward_context(context):
            return self._wrapper(key).capture(*self._inputs(descriptor))

    def install(self, key: GraphKey, graph: CapturedGraph) -> None:
        """Put a captured graph into service."""
        self._wrapper(key).install(key[1], graph)

    def remove(self, key: GraphKey) -> None:
        """Take a graph out of service, if there is one; no step may run by it any more."""
        self._wrapper(key).graphs.pop(key[1], None)

"""The steps whose launches show which kernels an engine needs.

A launch depends on the shapes of a step and not on its values. So the steps of a start-up, and
those that requests will make, are launched by a runner whose tensors have no memory, while
`kernels.triton_recording` takes note of the kernels.

Knows: which steps differ in their kernels. Knows nothing of kernels.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import msgspec
import torch

from minisrv.certification.batches import Batch, BatchLimits, full_batch, short_batch
from minisrv.certification.trial import PARAMS, make_step, reserved_space
from minisrv.core.kv_cache import BlockPool
from minisrv.core.ladder import build_ladders
from minisrv.core.step import (
    LogitsProcessorData,
    NewRequestData,
    SchedulerOutput,
    unscheduled_id,
)
from minisrv.modes import BatchDescriptor, CUDAGraphMode, Stage, StageOutput
from minisrv.request import SamplingParams
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def rehearse(runner: ModelRunner, pool: BlockPool) -> list[str]:
    """Launch the steps that start-up and requests make: the largest one, one of each captured
    shape, and those of the shapes that are run without a graph. Return why steps could not be
    launched on tensors without memory, in words, one for each reason.

    runner: a runner on the meta device.
    pool: the blocks of its cache.
    Raises OSError and MemoryError, which are not the launches' own.
    """
    problems: dict[str, None] = {}
    with reserved_space(runner, pool) as space:
        for descriptor, batch in _steps(runner, space.limits(runner)):
            step = make_step(batch, space, runner, random.Random(0), PARAMS)
            try:
                _launch(runner, descriptor, step)
                if descriptor.output is StageOutput.LOGITS:
                    _launch(runner, descriptor, with_changed_logits(step))
            except (OSError, MemoryError):
                raise
            except Exception as error:  # a model's own code does not expect tensors without memory
                logger.debug("%s cannot be rehearsed", descriptor, exc_info=True)
                problems[f"{type(error).__name__}: {error}".splitlines()[0]] = None
    return list(problems)


def _steps(runner: ModelRunner, limits: BatchLimits) -> Iterator[tuple[BatchDescriptor, Batch]]:
    ladders = runner.ladders
    # The kernels of the largest step take longest to compile, so they come first.
    for size in (ladders.max_num_batched_tokens, *reversed(ladders.eager_sizes)):
        largest = BatchDescriptor(size)
        yield largest, full_batch(largest, limits)
    if not ladders.keys():  # every step runs eagerly, at shapes like those that are captured
        most = ladders.max_num_seqs, ladders.max_num_batched_tokens
        ladders = build_ladders(CUDAGraphMode.FULL_AND_PIECEWISE, *most)
    for _, descriptor in ladders.keys():  # noqa: SIM118  (not a mapping)
        if descriptor.uniform_decode and descriptor.output is StageOutput.HIDDEN:
            continue  # the step that samples does the same before
        yield descriptor, short_batch(descriptor, limits)
        if descriptor.num_reqs is None:  # the number of its rows is not that of the shape
            yield descriptor, full_batch(descriptor, limits)


def with_changed_logits(step: SchedulerOutput) -> SchedulerOutput:
    """Return the step with penalties and a grammar for all of its requests: the logits that they
    sample from have another dtype."""
    data = LogitsProcessorData([0], [], frozenset())
    params = SamplingParams(repetition_penalty=1.1)
    requests = [NewRequestData(req.req_index, params, req.seed, data) for req in step.new_reqs]
    return msgspec.structs.replace(
        step,
        batch_id=unscheduled_id(),
        new_reqs=requests,
        needs_logits=True,
        has_structured_output_requests=True,
    )


@torch.no_grad()
def _launch(runner: ModelRunner, descriptor: BatchDescriptor, step: SchedulerOutput) -> None:
    """Launch a stage of a step without a graph, and after hidden states the epilogue as well."""
    stages = [(CUDAGraphMode.NONE, descriptor)]
    if descriptor.stage is Stage.MODEL and descriptor.output is StageOutput.HIDDEN:
        _, epilogue = runner.ladders.epilogue_key(step.num_rows, needs_logits=False)
        stages.append((CUDAGraphMode.NONE, epilogue))
    runner.processors.update_requests(step)
    attn = runner.prepare(step, tuple(stages))
    for stage in stages:
        runner.launch(stage, step, attn if stage[1].stage is Stage.MODEL else None)

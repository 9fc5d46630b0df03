"""An engine that is run step by step, for tests of what captured graphs do.

Engines are small, in float32, and start without their certification unless it is asked for, so that
the tests alone judge; what certification finds is in test_certification.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minisrv.certification import startup
from minisrv.certification.batches import Batch
from minisrv.certification.compare import InitialState
from minisrv.certification.trial import StepTrial, TrialSpace
from minisrv.config import EngineConfig
from minisrv.core.dispatcher import Dispatch
from minisrv.core.step import SchedulerOutput
from minisrv.device_kind import CPU
from minisrv.engine import step_costs
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.platforms import CPUPlatform
from minisrv.errors import GraphError
from minisrv.graph.attention import attention_op
from minisrv.graph.captured import CapturedGraph
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.graph.cuda import CUDABackend
from minisrv.graph.forward_context import get_forward_context, set_forward_context
from minisrv.kernels import DIRECT, AttentionMetadata
from minisrv.modes import BatchDescriptor, CUDAGraphMode
from minisrv.nn.decoder import Decoder
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.model_runner import ModelRunner
from minisrv.runner.results import StepResult

BLOCK_SIZE, NUM_BLOCKS, CONTEXT = 4, 60, 64

BOTH = (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL)
"""Configured modes in which mixed batches run by pieces, and by one graph."""

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


@dataclass(frozen=True)
class Model:
    """The checkpoint that an engine serves, the device and the configured graph mode."""

    checkpoint: str
    device: str = "cuda"
    mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE


def passes_but_for(test: Callable[[], None], mutant: Mutant | None) -> None:
    """Run `test`, which must pass, or fail if a mutant (a mistake made on purpose) is at work."""
    if mutant is None:
        test()
        return
    with Patch.context() as patch:
        mutant(patch)
        with pytest.raises((AssertionError, GraphError)):
            test()


def fails_with(
    *mutants: Mutant,
    on_cuda: tuple[Mutant, ...] = (),
    modes: tuple[CUDAGraphMode, ...] = (CUDAGraphMode.FULL_AND_PIECEWISE,),
) -> Callable[..., Any]:
    """Parametrize a test so that it passes as it is and must fail with each of the mutants, on a
    CPU and, for `on_cuda`, on a GPU.

    on_cuda: those of `mutants` with which a GPU can run; the others would make it read beyond its
        memory.
    modes: configured graph modes, in each of which the test is run.
    """
    devices = [("cpu", mutant, ()) for mutant in (None, *mutants)]
    devices += [("cuda", mutant, pytest.mark.gpu) for mutant in (None, *on_cuda)]
    cases = [(*case, mode) for mode in modes for case in devices]

    def decorate(test: Callable[[Model], None]) -> Any:
        @pytest.mark.parametrize(
            ("device", "mutant", "mode"),
            [
                pytest.param(
                    device, mutant, mode, id=f"{device}-{mode.value}-{_name(mutant)}", marks=marks
                )
                for device, mutant, marks, mode in cases
            ],
        )
        @functools.wraps(test)
        def run(checkpoint: str, device: str, mutant: Mutant | None, mode: CUDAGraphMode) -> None:
            passes_but_for(lambda: test(Model(checkpoint, device, mode)), mutant)

        del run.__wrapped__  # Else pytest would ask the wrapped test for the arguments.
        return run

    return decorate


def _name(mutant: Mutant | None) -> str:
    return "as_it_is" if mutant is None else mutant.__name__


def start(model: Model, *, certified: bool = False, **settings: Any) -> EngineCore:
    limits = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": CONTEXT,
        "block_size": BLOCK_SIZE,
        "num_kv_blocks": NUM_BLOCKS,
        "itl_target_ms": 0.0,  # else the tokens of a step would depend on times too
        "cudagraph_capture": "whole",
    }
    limits |= {"model": model.checkpoint, "device": model.device, "cudagraph_mode": model.mode}
    with Patch.context() as patch:
        # Else dispatch would depend on the time that a GPU took for each graph.
        patch.setattr(step_costs, "time_graphs", lambda runner, pool: {})
        # See conftest.tape_holds_mixed_batches.
        patch.setattr(CPUPlatform, "kind", replace(CPU, captures_mixed=True))
        if not certified:
            patch.setattr(startup, "certify", capture_behind_a_run)
        return EngineCore(
            build_engine(EngineConfig(**{**limits, **settings}), check_addresses=True)
        )


def capture_behind_a_run(trial: StepTrial, capture: Callable[[], CapturedGraph]) -> CapturedGraph:
    """Run the trial step once before the capture: a GPU loads kernels when they run first, which is
    not possible during a capture."""
    trial.reset(InitialState.CLEAN)
    trial.run(None)
    return capture()


def trial_of(
    runner: ModelRunner, mode: CUDAGraphMode, key: BatchDescriptor, batch: Batch
) -> StepTrial:
    """Return a trial on all blocks of a cache that no request uses."""
    space = TrialSpace.of(runner, range(1, runner.num_blocks))
    return StepTrial(runner, space, (mode, key), batch)


def submit(engine: EngineCore, *prompts: list[int], max_tokens: int = 8, **params: Any) -> None:
    """Queue one request for each prompt, named by the prompt's first token."""
    greedy = {"temperature": 0.0, "ignore_eos": True}
    for prompt in prompts:
        asked = SamplingParams(max_tokens=max_tokens, **{**greedy, **params})
        engine.add(EngineRequest(request_id=str(prompt[0]), prompt_token_ids=prompt, params=asked))


@dataclass(frozen=True)
class Step:
    """A scheduled and dispatched step that has not been launched."""

    engine: EngineCore
    output: SchedulerOutput
    dispatch: Dispatch

    @classmethod
    def next(cls, engine: EngineCore) -> Step:
        output = engine.scheduler.schedule()
        assert output is not None
        dispatch = engine.dispatcher.dispatch(
            output.num_tokens,
            output.num_rows,
            query_len=output.query_len,
            needs_logits=output.needs_logits,
            has_structured_output_requests=output.has_structured_output_requests,
        )
        return cls(engine, output, dispatch)

    @property
    def padded(self) -> int:
        return self.dispatch.descriptor.num_tokens

    def launch(self) -> StepResult:
        return self.launch_on(self.engine.runner)

    def launch_on(self, runner: ModelRunner) -> StepResult:
        """Launch the step on a runner, which may be that of another engine."""
        runner.execute_model(self.output, self.dispatch)
        return runner.sample_tokens(self.output, self.dispatch)

    def retire(self, result: StepResult) -> None:
        self.engine.scheduler.update(self.output.step_id, result.tokens())


def play(engine: EngineCore, steps: int) -> None:
    for _ in range(steps):
        step = Step.next(engine)
        step.retire(step.launch())


def generate(engine: EngineCore) -> tuple[dict[str, list[int]], dict[str, dict[str, int]]]:
    """Run to the end; return the tokens and the graph steps of each request."""
    tokens: dict[str, list[int]] = {}
    ran: dict[str, dict[str, int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.graph_steps is not None:
                ran[output.request_id] = output.graph_steps
    return tokens, ran


def tensors(runner: ModelRunner) -> dict[str, Tensor]:
    """Return everything that a step may find changed by the step before: the cache, the persistent
    tensors of the requests, and the buffers."""
    found = {f"cache of layer {n}": cache for n, cache in enumerate(runner.kv_caches)}
    found |= {f"state.{name}": tensor for name, tensor in vars(runner.request_tensors).items()}
    found |= {f"model.{name}": tensor for name, tensor in attention_buffers(runner.model).items()}
    buffers = vars(runner.buffers).items()
    return found | {f"buffers.{name}": t for name, t in buffers if isinstance(t, Tensor)}


def attention_buffers(model: Decoder) -> dict[str, Tensor]:
    """Return the static buffers of a model, by name: the argument and the result of attention."""
    return {"qkv": model.qkv, "attn_out": model.attn_out}


def saved(runner: ModelRunner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors(runner).items()}


def restore(runner: ModelRunner, values: dict[str, Tensor]) -> None:
    for name, tensor in tensors(runner).items():
        tensor.copy_(values[name])


def graphs_attend_with(change: Callable[[AttentionMetadata], AttentionMetadata]) -> dict[Any, Any]:
    """Return a table of kernels for the CPU tape, with which attention in a graph takes changed
    metadata; eager runs, and the attention between pieces, use the right ones."""

    def broken(qkv: Tensor, positions: Tensor, out: Tensor, layer: int) -> None:
        context = get_forward_context()
        with set_forward_context(replace(context, attn_metadata=change(context.attn_metadata))):
            DIRECT[attention_op](qkv, positions, out, layer)

    return DIRECT | {attention_op: broken}


def poison_the_pool(backend: CPUTapeBackend | CUDABackend) -> None:
    """Fill the memory that graphs share with NaN, so that a replay fails if it reads what it has
    not written."""
    if isinstance(backend, CPUTapeBackend):
        backend.arena.fill_(255)
        return
    fill = ctypes.CDLL("libcuda.so.1").cuMemsetD8Async
    fill.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
    pool = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == backend.pool]
    assert pool, "graphs have intermediates"
    for segment in pool:
        failed = fill(segment["address"], 255, segment["total_size"], backend.stream.cuda_stream)
        assert not failed


def assert_equals_eager(trial: StepTrial, *, poisoned: bool = False) -> None:
    """Check that the trial's graph gives bit for bit what an eager run gives.

    poisoned: whether the graphs' memory pool is filled with NaN before the replay.
    """
    seen = []
    for graph in (None, trial.runner.graphs[trial.key]):
        trial.reset(InitialState.CLEAN)
        if poisoned and graph is not None:
            poison_the_pool(trial.runner.model_step.backend)
        try:
            trial.run(graph)
        except RuntimeError as error:
            # Torch itself notices some overlaps of memory.
            raise AssertionError(f"{trial.name}: {error}") from error
        seen.append(trial.observe())
    for name, eager in seen[0].items():
        assert torch.equal(eager, seen[1][name]), f"{trial.name}: {name}"

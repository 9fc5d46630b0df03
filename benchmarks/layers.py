"""Decode steps in CUDA graphs, to compare kernels in.

Kernels that are timed alone, again and again, look faster than they are, and others than in a step
look fastest. Here each runs behind the same kernel as in a step, and reads weights that no kernel
has read since the step before. `DecodeSteps` captures whole steps of an engine; `Paged` has the
arguments of one kernel of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from minisrv.certification.batches import BatchRow
from minisrv.certification.compare import InitialState
from minisrv.certification.trial import GREEDY, StepTrial, TrialSpace
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.model_config import ModelConfig

BLOCK_SIZE = 16
WARM_UP = 3
REPLAYS = 10

MAX_CONTEXT = 2048
"""Maximum number of tokens of a request of `DecodeSteps`."""


def median_us(replay: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
    """Return the median of the microseconds that replays of a graph take on the GPU.

    before: is called before each of them, and takes no part in the time.
    """
    times = []
    for number in range(WARM_UP + REPLAYS):
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if number >= WARM_UP:
            times.append(1e3 * begin.elapsed_time(end))
    return median(times)


class Paged:
    """Block table, lengths and positions of `rows` requests with `context` tokens each. Their
    blocks are in random order, as in an engine that has run for a while."""

    def __init__(self, rows: int, context: int) -> None:
        device = "cuda"
        each = -(-context // BLOCK_SIZE)
        self.num_blocks = rows * each + 1
        blocks = torch.randperm(rows * each, device=device).to(torch.int32) + 1
        self.table = torch.zeros(rows, max(each, 128), dtype=torch.int32, device=device)
        self.table[:, :each] = blocks.view(rows, each)
        self.positions = torch.full((rows,), context - 1, device=device)
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        last = self.table[:, (context - 1) // BLOCK_SIZE].long()
        self.slots = last * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def cache(self, config: ModelConfig) -> Tensor:
        """Return a KV cache of one layer, with random entries."""
        shape = (self.num_blocks, BLOCK_SIZE, 2, config.num_kv_heads, config.head_dim)
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.table.device)


class DecodeSteps:
    """An engine with random weights in bfloat16, of the shape in the config.json of a directory.
    A model in transformers' code is compiled, as it is where it serves."""

    def __init__(self, directory: Path, batches: Sequence[int]) -> None:
        """Build the engine, for decode batches of these numbers of requests."""
        parts = build_engine(
            EngineConfig(
                model=str(directory),
                dtype="bfloat16",
                load_format="dummy",
                max_model_len=MAX_CONTEXT,
                max_num_seqs=max(batches),
                max_num_batched_tokens=max(batches),
                num_kv_blocks=1 + max(batches) * MAX_CONTEXT // BLOCK_SIZE,
                block_size=BLOCK_SIZE,
                cudagraph_capture="whole",
                cudagraph_capture_sizes=tuple(batches),
                compile_wait=True,
            )
        )
        self.runner, self._dispatch = parts.runner, parts.dispatcher.dispatch
        pool = parts.scheduler.block_pool
        self._space = TrialSpace.of(self.runner, pool.reserve(pool.num_free))

    def capture(self, batch: int, context: int) -> DecodeStep:
        """Capture the step in which `batch` requests with `context` tokens each decode. What the
        graph reads is in the engine's buffers, so only the last graph may be replayed."""
        key = self._dispatch(batch, batch, query_len=1).key
        rows = batch * (BatchRow(context - 1, 1, is_decode=True),)
        return DecodeStep(StepTrial(self.runner, self._space, key, rows, params=[GREEDY]))


class DecodeStep:
    """A captured step, which can be repeated."""

    @torch.no_grad()
    def __init__(self, trial: StepTrial) -> None:
        self._trial = trial
        trial.reset(InitialState.CLEAN)
        trial.run(None)  # kernels are compiled before the capture
        graph = trial.runner.capture(trial.key)
        trial.reset(InitialState.CLEAN)
        trial.run(graph)
        self.replay = graph.replay

    def restart(self) -> None:
        """Let the next replay compute the same token again, and not the one behind it."""
        trial, tensors = self._trial, self._trial.runner.request_tensors
        tensors.last_token[trial.req_indices] = trial.last_token
        tensors.next_position[trial.req_indices] = trial.next_position

    def median_us(self) -> float:
        """Return the median of the microseconds that the step takes on the GPU."""
        return median_us(self.replay, self.restart)

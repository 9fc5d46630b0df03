"""A CPU: graphs are tapes, memory is handed out before it is there, and kernels are C.

Knows: how much memory the machine has. Knows nothing of how many threads compute.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minisrv.config import EngineConfig
from minisrv.engine.memory import KVCacheShape, MemoryPlan, mebibytes
from minisrv.engine.platforms.base import Platform, Progress
from minisrv.errors import ConfigError
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.kernels.linear import multiplies_bfloat16
from minisrv.kernels.native import native
from minisrv.machine import available_memory
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

CPU_SHARE = 0.5
"""Of the memory that weights leave, what the KV cache may take. It is not taken before tokens fill
it."""

HOST_BYTES_PER_BLOCK = 150
"""What the scheduler keeps of each block, in Python's objects."""


class CPUPlatform(Platform):
    """See `Platform`."""

    default_lag = 0
    times_graphs = False  # times differ by more than a choice between two graphs could save

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def make_backend(self) -> CPUTapeBackend:
        """See `Platform`."""
        return CPUTapeBackend()

    def prepare_kernels(self, progress: Progress) -> bool:
        """Compile the C kernels, or find them in the cache."""
        progress("compiling kernels", 0, 1)
        native()
        progress("compiling kernels", 1, 1)
        return True

    def choose_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """bfloat16 as it is where the CPU multiplies it natively, as it is half as many bytes to
        read; all else widened to float32."""
        if checkpoint_dtype == "bfloat16" and multiplies_bfloat16():
            return checkpoint_dtype, "which this CPU multiplies natively"
        return "float32", "the fastest here that loses nothing"

    def available_bytes(self, config: EngineConfig) -> int:
        """What the machine, or its container, has left."""
        return available_memory()

    def cache_share(self, available: int) -> int:
        """See `CPU_SHARE`."""
        return int(CPU_SHARE * available)

    def weight_bytes(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        """The output projection has a layout of its own, also where it is tied."""
        parameters = model.num_parameters
        if model.tie_word_embeddings:
            parameters += model.vocab_size * model.hidden_size
        return parameters * self.weight_itemsize(config, dtype)

    def check_sizes(
        self,
        config: EngineConfig,
        model: ModelConfig,
        dtype: torch.dtype,
        sizes: BufferSizes,
        num_blocks: int,
    ) -> None:
        """A CPU's memory is handed out before it is there, and taken until the kernel ends a
        process: so everything is counted first."""
        shape = KVCacheShape.of(config, model, sizes.blocks_per_row * sizes.block_size, dtype)
        graphs = " and --cudagraph-capture-sizes" if config.cudagraph_capture_sizes else ""
        left = available_memory() - self.weight_bytes(config, model, dtype)
        for nbytes, what, flags in (
            (
                sizes.bytes_of_rows(model, dtype.itemsize),
                f"{sizes.rows} requests in a batch",
                f"--max-num-seqs{graphs}",
            ),
            (
                sizes.bytes_of_tokens(model, dtype.itemsize),
                f"{sizes.tokens} tokens in a step",
                f"--max-num-batched-tokens{graphs}",
            ),
            (
                num_blocks * (shape.per_block + HOST_BYTES_PER_BLOCK),
                f"{num_blocks} KV blocks",
                "--num-kv-blocks" if config.num_kv_blocks is not None else "--kv-cache-memory",
            ),
        ):
            if nbytes > left:
                raise ConfigError(
                    f"{what} take {mebibytes(nbytes)} of memory, and {mebibytes(max(0, left))} are "
                    f"left for them; lower {flags}."
                )
            left -= nbytes

    def plan_memory(
        self,
        config: EngineConfig,
        shape: KVCacheShape,
        make_runner: Callable[[int], ModelRunner],
        before_loading: int,
    ) -> MemoryPlan:
        """Nothing has changed: memory is taken when it is written."""
        return MemoryPlan(before_loading)

    def check_plan(
        self, config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
    ) -> None:
        """Nothing depends on what graphs have taken."""

"""A CPU: graphs are tapes, memory is committed only when it is written, and kernels are C.

Knows: how much memory the machine has. Knows nothing of how many threads compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from minisrv.arena import CPUArena
from minisrv.config import EngineConfig
from minisrv.device_kind import CPU
from minisrv.engine.kernel_process import KernelProcess
from minisrv.engine.kernels import KernelJob
from minisrv.engine.memory import KVCacheShape, MemoryPlan, mebibytes
from minisrv.engine.platforms.base import Platform, Progress
from minisrv.errors import ConfigError
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.kernels.linear import multiplies_bfloat16
from minisrv.kernels.native import native
from minisrv.machine import available_memory, cpu_name, resident_memory
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

CPU_SHARE = 0.5
"""Share of the memory left by the weights that the KV cache may take. The memory is not used before
tokens fill it."""

HOST_BYTES_PER_BLOCK = 150
"""Number of bytes that the scheduler keeps for each block, in Python objects."""


class CPUPlatform(Platform):
    """See `Platform`."""

    kind = CPU
    times_graphs = False  # measured times vary by more than a choice between two graphs could save

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @property
    def device_name(self) -> str:
        """See `Platform`."""
        return cpu_name()

    def make_backend(self) -> CPUTapeBackend:
        """See `Platform`."""
        return CPUTapeBackend()

    def release(self) -> None:
        """See `Platform`. The allocator keeps little."""

    def make_arena(self) -> CPUArena:
        """See `Platform`."""
        return CPUArena()

    def held_bytes(self) -> int:
        """See `Platform`."""
        return resident_memory()

    @contextmanager
    def compiled_kernels(
        self, job: KernelJob, progress: Progress, early: KernelProcess | None
    ) -> Iterator[None]:
        """See `Platform`. The C kernels are the same for all models; they are compiled, or found in
        the cache, behind the block."""
        yield
        progress("compiling kernels", 0, 1)
        native()
        progress("compiling kernels", 1, 1)

    def choose_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """See `Platform`. bfloat16 is served as it is if the CPU multiplies it natively, because it
        is half as many bytes to read; everything else is widened to float32."""
        if checkpoint_dtype == "bfloat16" and multiplies_bfloat16():
            return checkpoint_dtype, "which this CPU multiplies natively"
        return "float32", "the fastest here that loses nothing"

    def available_bytes(self, config: EngineConfig) -> int:
        """Return the memory that the machine, or its container, has left."""
        return available_memory()

    def cache_share(self, available: int) -> int:
        """See `Platform`. The share is `CPU_SHARE`."""
        return int(CPU_SHARE * available)

    def weight_bytes(self, config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
        """See `Platform`. The output projection has a layout of its own, even if it is tied to the
        embedding."""
        output = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
        size = self.weight_itemsize(config, dtype)
        return super().weight_bytes(config, model, dtype) + output * size

    def check_sizes(
        self,
        config: EngineConfig,
        model: ModelConfig,
        dtype: torch.dtype,
        sizes: BufferSizes,
        num_blocks: int,
    ) -> None:
        """See `Platform`. A CPU's allocator hands out more memory than there is, and the process is
        killed when it is used up, so everything is added up first."""
        context = sizes.max_num_blocks_per_req * sizes.block_size
        shape = KVCacheShape.of(config, model, context, dtype)
        graphs = " and --cudagraph-capture-sizes" if config.cudagraph_capture_sizes else ""
        left = available_memory() - self.weight_bytes(config, model, dtype)
        for nbytes, what, flags in (
            (
                sizes.bytes_of_rows(model, dtype.itemsize),
                f"{sizes.max_num_reqs} requests in a batch",
                f"--max-num-seqs{graphs}",
            ),
            (
                sizes.bytes_of_tokens(model, dtype.itemsize),
                f"{sizes.max_num_tokens} tokens in a step",
                f"--max-num-batched-tokens{graphs}",
            ),
            (
                num_blocks * (shape.bytes_per_block + HOST_BYTES_PER_BLOCK),
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
        generations: int,
        job: KernelJob,
    ) -> MemoryPlan:
        """See `Platform`. The plan has not changed, because memory is only used when it is
        written."""
        return MemoryPlan(before_loading)

    def check_plan(
        self, config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
    ) -> None:
        """Do nothing: no limit depends on what graphs have taken."""

    def has_room(self, config: EngineConfig, plan: MemoryPlan, nbytes: int) -> bool:
        """See `Platform`. Graphs share the arena of the largest one."""
        return True

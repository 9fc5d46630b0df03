"""A GPU: graphs are CUDA's, and its memory is shared out by what a probe has measured, as graphs
freeze the cache's addresses, so that it must be allocated, once, before they are captured.

Knows: CUDA's memory. Knows nothing of requests.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch

from minisrv.config import EngineConfig
from minisrv.engine.memory import KVCacheShape, MemoryPlan, mebibytes
from minisrv.engine.platforms.base import Platform, Progress
from minisrv.errors import ConfigError
from minisrv.graph.cuda import CUDABackend
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

PROBE_BLOCKS = 4
"""Blocks that each row of a probe may use, besides one full context."""


class CUDAPlatform(Platform):
    """See `Platform`."""

    default_lag = 1
    times_graphs = True

    def make_backend(self) -> CUDABackend:
        """See `Platform`."""
        return CUDABackend(self.device)

    def prepare_kernels(self, progress: Progress) -> bool:
        """Triton compiles each when it is first launched."""
        return False

    def choose_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """Half precision as it is, and all else rounded to bfloat16."""
        half = checkpoint_dtype in ("bfloat16", "float16")
        return checkpoint_dtype if half else "bfloat16", "half precision, as GPUs like it"

    def available_bytes(self, config: EngineConfig) -> int:
        """What `gpu_memory_utilization` allows, less what anybody uses."""
        return self.allowed_bytes(config) - self.used_bytes()

    def cache_share(self, available: int) -> int:
        """All of it: what graphs and steps take comes off it later, by a probe."""
        return available

    def check_sizes(
        self,
        config: EngineConfig,
        model: ModelConfig,
        dtype: torch.dtype,
        sizes: BufferSizes,
        num_blocks: int,
    ) -> None:
        """A GPU's allocator says so by itself."""

    def plan_memory(
        self,
        config: EngineConfig,
        shape: KVCacheShape,
        make_runner: Callable[[int], ModelRunner],
        before_loading: int,
    ) -> MemoryPlan:
        """Without `kv_cache_memory` the cache gets its share of the memory
        (`gpu_memory_utilization`), less what is used, less what graphs and the largest steps take
        by a probe, which is gone when this returns."""
        if config.kv_cache_memory is not None:
            return MemoryPlan(before_loading)
        if config.num_kv_blocks is not None:
            return MemoryPlan(config.num_kv_blocks * shape.per_block)
        self.release()
        used = self.used_bytes()
        blocks = 1 + shape.per_row + PROBE_BLOCKS * config.max_num_seqs
        runner = make_runner(blocks)
        graphs = runner.probe()
        captured = sum(runner.graph_bytes.values())
        # What torch has kept of the largest steps is counted: they will come again.
        steps = self.used_bytes() - used - blocks * shape.per_block - captured
        del runner
        self.release()
        cache = self.allowed_bytes(config) - used - steps - graphs
        logger.info(
            "steps take %s, graphs %s by a probe; %s are left for the KV cache",
            mebibytes(steps),
            mebibytes(graphs),
            mebibytes(cache),
        )
        return MemoryPlan(cache, graphs)

    def check_plan(
        self, config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
    ) -> None:
        """What was planned may have turned out larger than `gpu_memory_utilization` allows."""
        if plan.graphs is None:
            return
        self.release()
        actual = sum(runner.graph_bytes.values())
        logger.info("graphs take %s; a probe had said %s", *map(mebibytes, (actual, plan.graphs)))
        over = self.used_bytes() - self.allowed_bytes(config)
        if over > 0:
            cache = runner.limits.blocks * shape.per_block
            raise ConfigError(
                f"{mebibytes(over)} of the GPU's memory are used beyond "
                f"gpu_memory_utilization={config.gpu_memory_utilization}: graphs take "
                f"{mebibytes(actual)}, and {mebibytes(plan.graphs)} were planned for. Give "
                f"--kv-cache-memory {(cache - over) >> 20}M at most, or end what else uses the GPU."
            )

    def allowed_bytes(self, config: EngineConfig) -> int:
        """Bytes of the GPU that `gpu_memory_utilization` allows."""
        _, total = torch.cuda.mem_get_info(self.device)
        return int(total * config.gpu_memory_utilization)

    def used_bytes(self) -> int:
        """Bytes of the GPU that anybody uses."""
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def release(self) -> None:
        """Give back what torch keeps and nobody uses."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

"""A GPU: graphs are CUDA graphs, and memory is divided according to a probe.

Graphs freeze the addresses of the KV cache, so it must be allocated once, before they are captured;
the probe measures how much memory they need besides it.

Knows: CUDA's memory. Knows nothing of requests.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from minisrv.arena.cuda import CUDAArena
from minisrv.certification.startup import probe
from minisrv.config import EngineConfig
from minisrv.core.kv_cache import BlockPool
from minisrv.device_kind import CUDA
from minisrv.engine.kernel_process import KernelProcess
from minisrv.engine.kernels import KernelJob, compiled_kernels
from minisrv.engine.memory import KVCacheShape, MemoryPlan, mebibytes
from minisrv.engine.platforms.base import Platform, Progress
from minisrv.engine.probes import ProbeResult, keep_result, result_path, take_result
from minisrv.errors import ConfigError
from minisrv.graph.cuda import CUDABackend
from minisrv.machine import driver_version
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

PROBE_BLOCKS = 4
"""Number of blocks that each row of a probe may use, besides one full context."""

COMPILER_BYTES = 3 << 29
"""Number of bytes of the GPU for the two processes that compile: in each CUDA's context, and
tensors as large as the weights that a kernel of its pieces reads, on which the kernel is tried."""

FIRST_STEPS_BYTES = 3 << 28
"""Number of bytes of the GPU that the first steps of a process may take for good: workspaces of
libraries and the code of kernels. 444 MiB were seen (Llama-3.1-8B on an H200); a server beside this
one takes gigabytes."""


class CUDAPlatform(Platform):
    """See `Platform`."""

    kind = CUDA
    times_graphs = True
    step_bytes = 0
    """Number of bytes that steps take for a while besides what the engine holds. It is measured at
    a start whose cache has a given size; otherwise it is in the plan."""

    @property
    def device_name(self) -> str:
        """See `Platform`."""
        return torch.cuda.get_device_name(self.device)

    def make_backend(self) -> CUDABackend:
        """See `Platform`."""
        return CUDABackend(self.device)

    def release(self) -> None:
        """See `Platform`. Steps that were launched are finished first."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def make_arena(self) -> CUDAArena:
        """See `Platform`. Raises ConfigError for a GPU without virtual memory."""
        try:
            return CUDAArena(self.device)
        except (OSError, RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"enable_sleep_mode needs the virtual memory of CUDA's driver ({error}); leave it "
                "out."
            ) from error

    def held_bytes(self) -> int:
        """See `Platform`."""
        return self.used_bytes()

    def compiled_kernels(
        self, job: KernelJob, progress: Progress, early: KernelProcess | None
    ) -> AbstractContextManager[None]:
        """See `Platform`. The kernels of Triton are those of the model."""
        return compiled_kernels(job, partial(progress, "compiling kernels"), early)

    def choose_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        """See `Platform`. Half precision is served as it is, and everything else is rounded to
        bfloat16."""
        half = checkpoint_dtype in ("bfloat16", "float16")
        return checkpoint_dtype if half else "bfloat16", "half precision, as GPUs like it"

    def available_bytes(self, config: EngineConfig) -> int:
        """Return the memory that `gpu_memory_utilization` allows, minus what any process uses."""
        return self.allowed_bytes(config) - self.used_bytes()

    def cache_share(self, available: int) -> int:
        """See `Platform`. The share is all of it; a probe later subtracts what graphs and steps
        take."""
        return available

    def check_sizes(
        self,
        config: EngineConfig,
        model: ModelConfig,
        dtype: torch.dtype,
        sizes: BufferSizes,
        num_blocks: int,
    ) -> None:
        """Do nothing: a GPU's allocator itself raises an error."""

    def plan_memory(
        self,
        config: EngineConfig,
        shape: KVCacheShape,
        make_runner: Callable[[int], ModelRunner],
        before_loading: int,
        generations: int,
        job: KernelJob,
    ) -> MemoryPlan:
        """See `Platform`. Without `kv_cache_memory` and `num_kv_blocks`, the cache gets what
        `gpu_memory_utilization` allows, minus what is used, minus what the graphs of all
        generations and the largest steps take according to a probe, minus what compiling a second
        generation takes. The probe's memory is released before this returns. If the plan holds,
        its result is kept, and the next start of the same engine makes no probe."""
        self.forget_peak()
        if config.kv_cache_memory is not None:
            return MemoryPlan(before_loading)
        if config.num_kv_blocks is not None:
            return MemoryPlan(config.num_kv_blocks * shape.bytes_per_block)
        gc.collect()
        self.release()
        used = self.used_bytes()
        blocks = 1 + shape.blocks_per_context + PROBE_BLOCKS * config.max_num_seqs
        path = result_path(job, shape, blocks, *self.identity())
        result = None if path is None else take_result(path)
        known = result is not None
        if result is None:
            result, alone = self._probe(config, shape, make_runner, blocks, used)
            path = path if alone else None
        compiler = COMPILER_BYTES if generations > 1 else 0
        steps, graphs = result.step_bytes, result.graph_bytes
        if config.cudagraph_refit == "apply":
            generations = 2  # other ladders are captured beside those in service
        cache = self.allowed_bytes(config) - used - steps - generations * graphs - compiler
        logger.info(
            "steps take %s, graphs %s by a probe%s; %s are left for the KV cache",
            mebibytes(steps),
            mebibytes(graphs),
            " of an earlier start" if known else "",
            mebibytes(cache),
        )
        return MemoryPlan(cache, graphs, steps, path)

    def _probe(
        self,
        config: EngineConfig,
        shape: KVCacheShape,
        make_runner: Callable[[int], ModelRunner],
        blocks: int,
        used: int,
    ) -> tuple[ProbeResult, bool]:
        """Measure what the largest steps and the graphs take; and tell whether, as far as can be
        seen, no other process has taken or freed memory of the GPU meanwhile. If one has, the
        result is right for the memory as it is now, and for no other start.

        blocks: the number of blocks in the probe's cache.
        used: the number of bytes in use before.
        """
        runner = make_runner(blocks)
        graphs = probe(runner, BlockPool(blocks, config.block_size))
        captured = sum(graph.nbytes for graph in runner.graphs.values())
        # The memory that torch has kept from the largest steps counts as theirs: such steps will
        # come again.
        steps = self.used_bytes() - used - blocks * shape.bytes_per_block - captured
        runner.model.unbind_kv_cache()
        del runner
        gc.collect()
        self.release()
        left = self.used_bytes() - used
        alone = 0 <= left <= FIRST_STEPS_BYTES and steps >= 0
        if not alone:
            logger.warning(
                "the result of the memory probe is not kept: it has changed the memory in use by "
                "%s, as if another process had taken or freed some",
                mebibytes(left),
            )
        return ProbeResult(max(0, steps), graphs), alone

    def check_plan(
        self, config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
    ) -> None:
        """See `Platform`. The planned memory may have turned out larger than
        `gpu_memory_utilization` allows."""
        gc.collect()
        self.release()
        if plan.graph_bytes is None:
            self.step_bytes = self.bytes_below_peak()
            return
        actual = sum(graph.nbytes for graph in runner.graphs.values())
        counts = len(runner.graphs), len(runner.ladders.keys())
        sizes = map(mebibytes, (actual, plan.graph_bytes))
        logger.info("%d of %d graphs take %s; a probe had said %s for all", *counts, *sizes)
        over = self.used_bytes() - self.allowed_bytes(config)
        if over > 0:
            cache = (runner.num_blocks - 1) * shape.bytes_per_block
            raise ConfigError(
                f"{mebibytes(over)} of the GPU's memory are used beyond "
                f"gpu_memory_utilization={config.gpu_memory_utilization}. Planned were "
                f"{mebibytes(plan.graph_bytes)} for graphs, which take {mebibytes(actual)}, and "
                f"{mebibytes(plan.step_bytes)} for steps; other processes may have taken the rest. "
                f"Give --kv-cache-memory {(cache - over) >> 20}M at most, or end what else uses "
                "the GPU."
            )
        if plan.kept is not None:
            keep_result(plan.kept, ProbeResult(plan.step_bytes, plan.graph_bytes))

    def identity(self) -> tuple[object, ...]:
        """Return what tells this GPU and its driver from those on which the same graphs take other
        memory."""
        found = torch.cuda.get_device_properties(self.device)
        return found.name, found.total_memory, driver_version()

    def has_room(self, config: EngineConfig, plan: MemoryPlan, nbytes: int) -> bool:
        """See `Platform`. There is what `gpu_memory_utilization` leaves, or if the size of the
        cache was given what the GPU has, without the room that the largest step needs. This counts
        twice while torch keeps it, which is on the safe side."""
        given = plan.graph_bytes is None
        most = self.total_bytes() - self.step_bytes if given else self.allowed_bytes(config)
        return self.used_bytes() + nbytes <= most

    def allowed_bytes(self, config: EngineConfig) -> int:
        """Return the number of bytes of the GPU that `gpu_memory_utilization` allows."""
        return int(self.total_bytes() * config.gpu_memory_utilization)

    def total_bytes(self) -> int:
        """Return the number of bytes of the GPU."""
        _, total = torch.cuda.mem_get_info(self.device)
        return total

    def forget_peak(self) -> None:
        """Let `bytes_below_peak` count from now on."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def bytes_below_peak(self) -> int:
        """Return how many bytes more torch has had from the GPU at a time than it has now."""
        device = self.device
        return torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)

    def used_bytes(self) -> int:
        """Return the number of bytes of the GPU that any process uses."""
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

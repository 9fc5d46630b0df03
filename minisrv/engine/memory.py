"""How large the KV cache may be.

Knows: the settings, and on a GPU how much memory graphs and the largest steps take, because a probe
has measured it: graphs freeze the cache's addresses, so it must be allocated, once, before they are
captured. Knows nothing of requests.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minisrv.config import EngineConfig, ModelConfig
from minisrv.errors import ConfigError
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

CPU_KV_CACHE = 1 << 30
"""Bytes, unless `kv_cache_memory` says otherwise."""

PROBE_BLOCKS = 4
"""Blocks that each row of a probe may use, besides one full context."""


@dataclass(frozen=True)
class KVCacheShape:
    """Bytes and blocks that contexts take.

    per_block: bytes of a block in all layers. per_row: blocks of one full context.
    """

    per_block: int
    per_row: int

    @classmethod
    def of(
        cls, config: EngineConfig, model: ModelConfig, max_model_len: int, dtype: torch.dtype
    ) -> KVCacheShape:
        """For a model served with `config`."""
        entry = 2 * model.kv_size * dtype.itemsize * model.num_layers
        return cls(config.block_size * entry, -(-max_model_len // config.block_size))


def num_kv_blocks(config: EngineConfig, shape: KVCacheShape, available: int) -> int:
    """Blocks of the KV cache, the null block included: as many as fit `available` bytes, and no
    more than every slot can use. Raises ConfigError if that does not hold one full context."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    blocks = min(available // shape.per_block, 1 + config.max_num_seqs * shape.per_row)
    if blocks < 1 + shape.per_row:
        raise ConfigError(
            f"{max(0, available)} bytes of KV cache hold {max(0, blocks - 1)} blocks, and one "
            f"context needs {shape.per_row}; give at least "
            f"--kv-cache-memory {(1 + shape.per_row) * shape.per_block}, or lower --max-model-len."
        )
    return blocks


@dataclass(frozen=True)
class MemoryPlan:
    """cache: bytes that the KV cache may take. graphs: bytes that a probe says graphs will take;
    None where nothing depends on it."""

    cache: int
    graphs: int | None = None


def plan_memory(
    config: EngineConfig,
    shape: KVCacheShape,
    device: torch.device,
    make_runner: Callable[[int], ModelRunner],
) -> MemoryPlan:
    """On a GPU without `kv_cache_memory` the cache gets its share of the memory
    (`gpu_memory_utilization`), less what is used, less what graphs and the largest steps take by a
    probe, which is gone when this returns.

    make_runner: a runner on the loaded model for so many blocks.
    """
    if config.kv_cache_memory is not None:
        return MemoryPlan(config.kv_cache_memory)
    if device.type == "cpu":
        return MemoryPlan(CPU_KV_CACHE)
    if config.num_kv_blocks is not None:
        return MemoryPlan(config.num_kv_blocks * shape.per_block)
    _release(device)
    used = _used(device)
    blocks = 1 + shape.per_row + PROBE_BLOCKS * config.max_num_seqs
    runner = make_runner(blocks)
    graphs = runner.probe()
    captured = sum(runner.graph_bytes.values())
    # What torch has kept of the largest steps is counted: they will come again.
    steps = _used(device) - used - blocks * shape.per_block - captured
    del runner
    _release(device)
    cache = _allowed(config, device) - used - steps - graphs
    logger.info(
        "steps take %s, graphs %s by a probe; %s are left for the KV cache",
        mebibytes(steps),
        mebibytes(graphs),
        mebibytes(cache),
    )
    return MemoryPlan(cache, graphs)


def check_fits(
    config: EngineConfig, plan: MemoryPlan, shape: KVCacheShape, runner: ModelRunner
) -> None:
    """Raise ConfigError if what was planned has turned out larger than `gpu_memory_utilization`
    allows, now that every graph is captured."""
    if plan.graphs is None:
        return
    device = runner.buffers.device
    _release(device)
    actual = sum(runner.graph_bytes.values())
    logger.info("graphs take %s; a probe had said %s", *map(mebibytes, (actual, plan.graphs)))
    over = _used(device) - _allowed(config, device)
    if over > 0:
        cache = runner.limits.blocks * shape.per_block
        raise ConfigError(
            f"{mebibytes(over)} of the GPU's memory are used beyond "
            f"gpu_memory_utilization={config.gpu_memory_utilization}: graphs take "
            f"{mebibytes(actual)}, and {mebibytes(plan.graphs)} were planned for. Give "
            f"--kv-cache-memory {(cache - over) >> 20}M at most, or end what else uses the GPU."
        )


def mebibytes(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 2**20:.1f} MiB"


def _allowed(config: EngineConfig, device: torch.device) -> int:
    _, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization)


def _used(device: torch.device) -> int:
    """Bytes of the GPU that anybody uses."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _release(device: torch.device) -> None:
    """Give back what torch keeps and nobody uses."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()

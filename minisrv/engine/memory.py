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


def available_bytes(
    config: EngineConfig,
    shape: KVCacheShape,
    device: torch.device,
    make_runner: Callable[[int], ModelRunner],
) -> int:
    """Bytes that the KV cache may take. On a GPU without `kv_cache_memory`: its share of the memory
    (`gpu_memory_utilization`), less what is used, less what a probe's graphs and largest steps
    take. The probe is gone when this returns.

    make_runner: a runner on the loaded model for so many blocks.
    """
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if device.type == "cpu":
        return CPU_KV_CACHE
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks * shape.per_block
    free, total = _memory(device)
    blocks = 1 + shape.per_row + PROBE_BLOCKS * config.max_num_seqs
    runner = make_runner(blocks)
    runner.probe()
    needed = free - _memory(device)[0] - blocks * shape.per_block
    del runner
    _memory(device)
    allowed = int(total * config.gpu_memory_utilization) - (total - free)
    logger.info(
        "graphs and the largest steps take %.2f GiB; %.2f GiB are left for the KV cache",
        needed / 2**30,
        (allowed - needed) / 2**30,
    )
    return allowed - needed


def _memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of the GPU, nothing kept by torch that nobody uses."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)

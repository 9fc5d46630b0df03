"""The size of the KV cache, computed from the memory that it may take.

Knows: blocks, contexts and bytes. Knows nothing of devices, which say how much memory there is
(`platforms`), nor of requests.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from minisrv.config import EngineConfig
from minisrv.errors import ConfigError
from minisrv.model_config import ModelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVCacheShape:
    """The sizes of blocks and contexts in the KV cache.

    bytes_per_block: the number of bytes of a block in all layers.
    blocks_per_context: the number of blocks of one full context.
    """

    bytes_per_block: int
    blocks_per_context: int

    @classmethod
    def of(
        cls, config: EngineConfig, model: ModelConfig, max_model_len: int, dtype: torch.dtype
    ) -> KVCacheShape:
        """Return the sizes for a model served with `config`."""
        entry = 2 * model.kv_size * dtype.itemsize * model.num_layers
        return cls(config.block_size * entry, -(-max_model_len // config.block_size))


def fit_context(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, context: int, available: int
) -> int:
    """Return the number of tokens that a request may have with a cache of `available` bytes:
    `context`, or less if no setting asks for it (vLLM's `--max-model-len auto`), which is logged.

    Raises ConfigError if a setting asks for more, or nothing fits.
    """
    if config.num_kv_blocks is not None:
        return context
    shape = KVCacheShape.of(config, model, context, dtype)
    blocks = available // shape.bytes_per_block - 1  # one block is the null block
    if blocks >= shape.blocks_per_context:
        return context
    if config.max_model_len is not None or blocks < 1:
        raise ConfigError(
            f"{mebibytes(max(0, available))} of KV cache hold {max(0, blocks) * config.block_size} "
            f"tokens, and one context has {context}; give at least "
            f"--kv-cache-memory {(1 + shape.blocks_per_context) * shape.bytes_per_block}, lower "
            "--max-model-len, or serve a smaller model or dtype."
        )
    longest: int = blocks * config.block_size
    logger.warning(
        "the model's context has %d tokens, and %s of KV cache hold %d: these are served. "
        "--kv-cache-memory %d would hold all.",
        context,
        mebibytes(available),
        longest,
        (1 + shape.blocks_per_context) * shape.bytes_per_block,
    )
    return longest


def num_kv_blocks(config: EngineConfig, shape: KVCacheShape, available: int) -> int:
    """Return the number of blocks in the KV cache, including the null block: as many as fit into
    `available` bytes, and no more than `max_num_seqs` requests can use. `fit_context` has checked
    that one context fits."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    return min(
        available // shape.bytes_per_block, 1 + config.max_num_seqs * shape.blocks_per_context
    )


@dataclass(frozen=True)
class MemoryPlan:
    """The planned use of memory.

    kv_cache_bytes: the number of bytes that the KV cache may take.
    graph_bytes: the number of bytes that graphs will take according to a probe; None if nothing
        depends on it.
    step_bytes: the number of bytes that the largest steps will take according to the probe.
    kept: the file that keeps the probe's result once the plan has held; None if none is to do so.
    """

    kv_cache_bytes: int
    graph_bytes: int | None = None
    step_bytes: int = 0
    kept: Path | None = None


def mebibytes(nbytes: int) -> str:
    """Return the number of bytes as text for people."""
    return f"{nbytes / 2**20:.1f} MiB"

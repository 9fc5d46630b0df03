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

from minisrv.config import EngineConfig
from minisrv.errors import ConfigError
from minisrv.machine import available_memory
from minisrv.model_config import ModelConfig
from minisrv.runner.input_buffers import BufferSizes
from minisrv.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)

CPU_SHARE = 0.5
"""Of the memory that weights leave on a CPU, what the KV cache may take. It is not taken before
tokens fill it."""

HOST_BYTES_PER_BLOCK = 150
"""What the scheduler keeps of each block, in Python's objects."""

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


def cache_before_loading(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> int:
    """Bytes that the KV cache may take at most, as far as can be known before weights are read: on
    a GPU, what graphs and steps take comes off it later.

    Raises ConfigError where the weights alone do not fit.
    """
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    weights = _weights(config, model, device, dtype)
    if device.type == "cuda":
        available = _allowed(config, device) - _used(device)
    else:
        available = available_memory()
    if weights >= available:
        raise ConfigError(
            f"the weights take {mebibytes(weights)}, and {mebibytes(max(0, available))} of memory "
            f"are to be had on {device}; serve a smaller model or dtype, or end what else uses it."
        )
    return available - weights if device.type == "cuda" else int(CPU_SHARE * (available - weights))


def check_sizes(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    sizes: BufferSizes,
    num_blocks: int,
) -> None:
    """Raise ConfigError where what the settings ask for cannot be had on this machine, before any
    of it is allocated: a CPU's memory is handed out before it is there, and taken until the kernel
    ends a process. A GPU's allocator says so by itself.

    num_blocks: of the KV cache.
    """
    shape = KVCacheShape.of(config, model, sizes.blocks_per_row * sizes.block_size, dtype)
    graphs = " and --cudagraph-capture-sizes" if config.cudagraph_capture_sizes else ""
    left = available_memory() - _weights(config, model, torch.device("cpu"), dtype)
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


def fit_context(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, context: int, available: int
) -> int:
    """The tokens that a request may have in a cache of `available` bytes: `context`, or fewer where
    no setting asks for it (vLLM's `--max-model-len auto`), which is said in the log.

    Raises ConfigError where a setting asks for more, or nothing fits.
    """
    if config.num_kv_blocks is not None:
        return context
    shape = KVCacheShape.of(config, model, context, dtype)
    blocks = available // shape.per_block - 1  # one is the null block
    if blocks >= shape.per_row:
        return context
    if config.max_model_len is not None or blocks < 1:
        raise ConfigError(
            f"{mebibytes(max(0, available))} of KV cache hold {max(0, blocks) * config.block_size} "
            f"tokens, and one context has {context}; give at least "
            f"--kv-cache-memory {(1 + shape.per_row) * shape.per_block}, lower --max-model-len, or "
            "serve a smaller model or dtype."
        )
    longest: int = blocks * config.block_size
    logger.warning(
        "the model's context has %d tokens, and %s of KV cache hold %d: these are served. "
        "--kv-cache-memory %d would hold all.",
        context,
        mebibytes(available),
        longest,
        (1 + shape.per_row) * shape.per_block,
    )
    return longest


def num_kv_blocks(config: EngineConfig, shape: KVCacheShape, available: int) -> int:
    """Blocks of the KV cache, the null block included: as many as fit `available` bytes, and no
    more than every slot can use. `fit_context` has seen to it that one context fits."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    return min(available // shape.per_block, 1 + config.max_num_seqs * shape.per_row)


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
    before_loading: int,
) -> MemoryPlan:
    """On a GPU without `kv_cache_memory` the cache gets its share of the memory
    (`gpu_memory_utilization`), less what is used, less what graphs and the largest steps take by a
    probe, which is gone when this returns.

    make_runner: a runner on the loaded model for so many blocks.
    before_loading: what `cache_before_loading` said; elsewhere it stands.
    """
    if config.kv_cache_memory is not None or device.type == "cpu":
        return MemoryPlan(before_loading)
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


def _weights(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> int:
    """Bytes that the weights will take."""
    itemsize = 1 if config.quantization == "int8" else dtype.itemsize
    weights = model.num_parameters * itemsize
    if device.type == "cpu" and model.tie_word_embeddings:
        # The output projection has a layout of its own.
        weights += model.vocab_size * model.hidden_size * itemsize
    return weights


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

"""How the KV cache gets its size, and what is said when a plan does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minisrv.config import EngineConfig
from minisrv.engine import memory
from minisrv.engine.core import EngineCore
from minisrv.engine.memory import KVCacheShape, MemoryPlan, check_fits, num_kv_blocks
from minisrv.errors import ConfigError
from tests.checkpoints import make_checkpoint

CONFIG = EngineConfig(max_num_seqs=3, block_size=4)
SHAPE = KVCacheShape(per_block=100, per_row=5)


@pytest.mark.parametrize(("available", "blocks"), [(600, 6), (1099, 10), (1600, 16), (10**9, 16)])
def test_the_cache_takes_what_fits_and_no_more_than_every_slot_can_use(available, blocks):
    assert num_kv_blocks(CONFIG, SHAPE, available) == blocks


@pytest.mark.parametrize("available", [-1, 0, 599])
def test_a_cache_below_one_context_is_refused_with_what_it_needs(available):
    with pytest.raises(ConfigError, match="--kv-cache-memory 600"):
        num_kv_blocks(CONFIG, SHAPE, available)


def test_blocks_that_are_asked_for_are_taken_as_they_are():
    assert num_kv_blocks(replace(CONFIG, num_kv_blocks=7), SHAPE, 0) == 7


def test_a_plan_that_does_not_hold_names_the_flag_and_a_size_that_does(monkeypatch, tmp_path):
    checkpoint = str(make_checkpoint(tmp_path, "llama"))
    config = EngineConfig(model=checkpoint, max_num_seqs=1, device="cpu", num_kv_blocks=100)
    runner = EngineCore(config).runner
    shape = KVCacheShape(per_block=1 << 20, per_row=1)
    plan = MemoryPlan(cache=1 << 30, graphs=5 << 20)
    for name, value in (("_release", None), ("_used", 900 << 20), ("_allowed", 890 << 20)):
        monkeypatch.setattr(memory, name, lambda *args, value=value: value)
    with pytest.raises(ConfigError, match="10.0 MiB of the GPU.* --kv-cache-memory 89M at most"):
        check_fits(config, plan, shape, runner)
    check_fits(config, MemoryPlan(cache=1 << 30), shape, runner)
    monkeypatch.setattr(memory, "_allowed", lambda *args: 900 << 20)
    check_fits(config, plan, shape, runner)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_what_the_probe_says_is_enough_and_little_more(share):
    """The cache takes the rest of the memory, and the largest steps still run."""
    config = EngineConfig(
        device="cuda", gpu_memory_utilization=share, max_num_seqs=512, max_num_batched_tokens=2048
    )
    engine = EngineCore(config)
    actual = sum(engine.runner.graph_bytes.values())
    assert engine.memory.graphs is not None
    assert actual <= engine.memory.graphs <= 2 * actual + (64 << 20)
    free, total = torch.cuda.mem_get_info()
    assert total - free <= share * total

"""The size that the KV cache gets. A GPU's plan of its memory is tested in `test_platforms`."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace

import pytest
import torch

from minisrv.config import EngineConfig
from minisrv.engine.builder import EngineParts, build_engine
from minisrv.engine.memory import KVCacheShape, MemoryPlan, fit_context, num_kv_blocks
from minisrv.engine.platforms import CPUPlatform, cpu
from minisrv.errors import ConfigError
from minisrv.model_config import ModelConfig
from tests.checkpoints import make_checkpoint

CONFIG = EngineConfig(max_num_seqs=3, block_size=4)
SHAPE = KVCacheShape(bytes_per_block=100, blocks_per_context=5)


@pytest.mark.parametrize(("available", "blocks"), [(600, 6), (1099, 10), (1600, 16), (10**9, 16)])
def test_the_cache_takes_what_fits_and_no_more_than_every_slot_can_use(available, blocks):
    assert num_kv_blocks(CONFIG, SHAPE, available) == blocks


MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=384,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=20,
    dtype="float32",
)
BLOCK = 4 * 2 * 2 * 32 * 4
"""Bytes of a KV cache block: tokens, K and V, layers, elements of a token in one layer, bytes of
float32."""


def test_the_longest_context_that_fits_is_served_where_none_is_asked_for(caplog):
    """Where no context length is asked for, the longest one that fits is served, and a shorter one
    than the model's is logged with the memory that would be enough. Six blocks hold the full
    context and the null block."""
    told = []
    for blocks in range(2, 9):
        caplog.clear()
        longest = fit_context(CONFIG, MODEL, torch.float32, 20, blocks * BLOCK + 1)
        assert longest == min(20, (blocks - 1) * 4)
        told.append(f"these are served. --kv-cache-memory {6 * BLOCK}" in caplog.text)
    assert told == [True] * 4 + [False] * 3


@pytest.mark.parametrize("available", [-1, 0, 2 * BLOCK - 1])
def test_a_cache_that_holds_nothing_is_refused_with_what_it_needs(available):
    with pytest.raises(ConfigError, match=f"--kv-cache-memory {6 * BLOCK}"):
        fit_context(CONFIG, MODEL, torch.float32, 20, available)


def test_a_context_that_is_asked_for_fits_or_is_refused():
    asked = replace(CONFIG, max_model_len=20)
    assert fit_context(asked, MODEL, torch.float32, 20, 6 * BLOCK) == 20
    with pytest.raises(ConfigError, match=f"hold 16 tokens.* 20; .*--kv-cache-memory {6 * BLOCK}"):
        fit_context(asked, MODEL, torch.float32, 20, 6 * BLOCK - 1)


def test_a_cpus_cache_is_half_of_what_weights_leave(monkeypatch):
    """A tied output projection counts as weights of its own, because a CPU holds it laid out beside
    the embedding."""
    monkeypatch.setattr(cpu, "available_memory", lambda: 10**9)
    for tied, copies in ((False, 2), (True, 2)):
        model = replace(MODEL, tie_word_embeddings=tied)
        layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
        weights = 2 * layer + copies * 384 * 64
        found = CPUPlatform().cache_before_loading(CONFIG, model, torch.float32)
        assert found == (10**9 - 4 * weights) // 2
    asked = replace(CONFIG, kv_cache_memory=77)
    assert CPUPlatform().cache_before_loading(asked, MODEL, torch.float32) == 77


def test_weights_that_do_not_fit_are_refused_as_what_they_are(monkeypatch):
    monkeypatch.setattr(cpu, "available_memory", lambda: 300_000)
    with pytest.raises(ConfigError, match=r"the weights take 0\.4 MiB, and 0\.3 MiB of memory"):
        CPUPlatform().cache_before_loading(CONFIG, MODEL, torch.float32)


def test_a_context_longer_than_the_memory_starts(monkeypatch, tmp_path):
    """A checkpoint whose context needs more memory than there is starts with a shorter one:
    `minisrv serve Qwen/Qwen3-0.6B` on a CPU could not start with its defaults."""
    checkpoint = str(make_checkpoint(tmp_path, "llama"))
    monkeypatch.setattr(cpu, "available_memory", lambda: 6 * 10**5)
    few = {"max_num_seqs": 8, "max_num_batched_tokens": 8}
    engine = build_engine(EngineConfig(model=checkpoint, device="cpu", enforce_eager=True, **few))
    assert 16 <= engine.info.max_model_len < 512
    assert engine.info.max_model_len == engine.scheduler.block_pool.capacity


def test_a_model_that_forgets_its_cache_leaves_its_memory(monkeypatch, tmp_path):
    """The model kept the cache of the memory probe until it had another one, so there had to be
    room for both: Llama-3.1-8B did not start."""
    caches = []

    def plan_memory(platform, config, shape, make_runner, available, *others):
        runner = make_runner(9)
        caches.append(weakref.ref(runner.kv_caches[0]))
        runner.model.unbind_kv_cache()
        del runner
        gc.collect()
        assert caches[0]() is None
        return MemoryPlan(available)

    monkeypatch.setattr(CPUPlatform, "plan_memory", plan_memory)
    checkpoint = str(make_checkpoint(tmp_path, "llama"))
    for model_impl in ("minisrv", "transformers"):
        caches.clear()
        limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "num_kv_blocks": 33}
        build_engine(
            EngineConfig(
                checkpoint, device="cpu", enforce_eager=True, model_impl=model_impl, **limits
            )
        )
        assert caches


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_num_seqs": 8192, "max_num_batched_tokens": 8192}, "8192 requests .*--max-num-seqs"),
        (
            {"max_num_batched_tokens": 1 << 20, "max_num_seqs": 2048},
            "1048576 tokens .*--max-num-batched-tokens",
        ),
        (
            {
                "max_num_batched_tokens": 6000,
                "max_num_seqs": 64,
                "cudagraph_capture_sizes": (1, 2, 6000),
            },
            "6000 requests in a batch .*--max-num-seqs and --cudagraph-capture-sizes",
        ),
        ({"num_kv_blocks": 10**7}, "10000000 KV blocks .*--num-kv-blocks"),
        ({"kv_cache_memory": 1 << 50, "max_num_seqs": 300}, "KV blocks .*--kv-cache-memory"),
    ],
)
def test_what_no_memory_holds_is_refused_before_any_of_it_is_taken(
    flags, words, monkeypatch, tmp_path
):
    checkpoint = str(make_checkpoint(tmp_path, "llama", vocab_size=1 << 10))
    monkeypatch.setattr(cpu, "available_memory", lambda: 40 << 20)
    monkeypatch.setattr("minisrv.engine.builder.load_model", None)
    limits = {"max_num_seqs": 4, **flags}
    with pytest.raises(ConfigError, match=words):
        build_engine(EngineConfig(model=checkpoint, device="cpu", **limits))


def test_blocks_that_are_asked_for_are_taken_as_they_are():
    assert num_kv_blocks(replace(CONFIG, num_kv_blocks=7), SHAPE, 0) == 7


def start_alone(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> EngineParts:
    """Return an engine during whose start no other process took or freed memory of the GPU, as far
    as its probe has seen: tests run beside each other, and some need much of the memory."""
    deadline = time.monotonic() + 200
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        caplog.clear()
        try:
            engine = build_engine(config)
        except ConfigError:  # the others have it all
            if time.monotonic() > deadline:
                raise
        else:
            if "another process" not in caplog.text or time.monotonic() > deadline:
                return engine
            del engine
        time.sleep(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_what_the_probe_says_is_enough_and_little_more(share, caplog):
    """The probe's prediction of the graphs' memory is enough and not far too much: the cache takes
    the rest of the memory, and the largest steps still run. A start is repeated if another process
    took or freed memory of the GPU during its probe, and twice at most if the graphs seem to have
    taken other memory than was predicted: what another process takes during a capture is counted
    as the graph's."""
    config = EngineConfig(
        device="cuda",
        gpu_memory_utilization=share,
        max_num_seqs=512,
        max_num_batched_tokens=2048,
        cudagraph_capture="whole",
    )
    for _ in range(3):
        engine = start_alone(config, caplog)
        predicted = engine.memory.graph_bytes
        actual = sum(graph.nbytes for graph in engine.runner.graphs.values())
        assert predicted is not None
        fits = actual <= predicted <= 2 * actual + (64 << 20)
        if fits:
            break
        del engine
    assert fits, f"{predicted} bytes were predicted, and {actual} taken"
    free, total = torch.cuda.mem_get_info()
    assert total - free <= share * total

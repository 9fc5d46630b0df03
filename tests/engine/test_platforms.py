"""The differences between a CPU and a GPU; the GPU is simulated by one whose memory is only
numbers."""

from __future__ import annotations

import gc
import logging
import shutil
import subprocess
import weakref
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisrv.config import EngineConfig
from minisrv.core.ladder import ladders_of
from minisrv.device_kind import CPU, CUDA, expected_kind
from minisrv.engine import builder
from minisrv.engine.builder import build_engine, resolve_dtype
from minisrv.engine.compilation import Compilation
from minisrv.engine.kernel_process import KernelProcess
from minisrv.engine.kernels import KernelJob
from minisrv.engine.memory import KVCacheShape, MemoryPlan
from minisrv.engine.platforms import CPUPlatform, CUDAPlatform, Progress, cpu, cuda, platform_of
from minisrv.engine.probes import ProbeResult
from minisrv.engine.step_costs import StepCosts
from minisrv.errors import ConfigError
from minisrv.graph.captured import CapturedGraph
from minisrv.graph.cpu_tape import CPUTapeBackend
from minisrv.machine import driver_version
from minisrv.modes import CUDAGraphMode
from tests.checkpoints import make_checkpoint
from tests.engine.test_memory import MODEL

MIB = 1 << 20
FULL = CUDAGraphMode.FULL
ONE_TOKEN = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
"""Limits of an engine with few graphs."""


class Gpu(CUDAPlatform):
    """A simulated GPU whose memory is numbers and whose graphs are CPU tapes.

    allowed: the number of bytes that may be used.
    used: the number of bytes that are in use.
    kept: the number of bytes that torch keeps cached and nobody uses.
    peak: the largest sum of these two since it was last forgotten.
    """

    def __init__(self, *, allowed: int = 1 << 30, used: int = 0, kept: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self.allowed, self.used, self.kept = allowed, used, kept
        self.peak = used + kept

    @property
    def device_name(self) -> str:
        return "a GPU"

    def make_backend(self) -> CPUTapeBackend:
        return CPUTapeBackend()

    def compiled_kernels(
        self, job: KernelJob, progress: Progress, early: KernelProcess | None
    ) -> AbstractContextManager[None]:
        return CPUPlatform().compiled_kernels(job, progress, early)

    def identity(self) -> tuple[object, ...]:
        return ("a GPU",)

    def allowed_bytes(self, config: EngineConfig) -> int:
        return self.allowed

    def total_bytes(self) -> int:
        return 1 << 30

    def used_bytes(self) -> int:
        return self.used + self.kept

    def forget_peak(self) -> None:
        self.peak = self.used_bytes()

    def bytes_below_peak(self) -> int:
        return self.peak - self.used_bytes()

    def keep(self, nbytes: int) -> None:
        """Move `nbytes` from used to kept, as torch does when memory is freed."""
        self.used -= nbytes
        self.kept += nbytes

    def release(self) -> None:
        gc.collect()
        self.kept = 0


class Probe:
    """Stands for a runner of `num_blocks` blocks of 1 MiB. The graphs that it captures take 40 MiB,
    and all of them would take 70 MiB; the largest step leaves 30 MiB that torch keeps cached."""

    def __init__(self, gpu: Gpu, num_blocks: int) -> None:
        self.gpu = gpu
        self.num_blocks = num_blocks
        sizes = {"large": 25 * MIB, "small": 15 * MIB}
        self.graphs = {name: CapturedGraph((), {}, nbytes) for name, nbytes in sizes.items()}
        self.model = SimpleNamespace(unbind_kv_cache=lambda: None)
        self.use(num_blocks * MIB)

    def use(self, nbytes: int) -> None:
        """Take `nbytes` of memory, which torch keeps cached when the runner is gone."""
        self.gpu.used += nbytes
        weakref.finalize(self, self.gpu.keep, nbytes)

    def probe(self) -> int:
        self.use(40 * MIB)
        self.gpu.kept += 30 * MIB
        return 70 * MIB


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a `Probe` itself say what the memory probe does with it."""
    real = cuda.probe
    monkeypatch.setattr(
        cuda,
        "probe",
        lambda runner, pool: runner.probe() if isinstance(runner, Probe) else real(runner, pool),
    )


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for what starts keep."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg"


@pytest.fixture
def job(tmp_path) -> KernelJob:
    (tmp_path / "config.json").write_text("{}")
    ladders = ladders_of(CUDA.resolve(EngineConfig()))
    return KernelJob(MODEL, tmp_path, "bfloat16", None, ladders, 16, None)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return str(make_checkpoint(tmp_path, "llama"))


@pytest.mark.parametrize(
    ("config", "there", "expected"),
    [
        (EngineConfig(), False, "cpu"),
        (EngineConfig(), True, "cuda:3"),
        (EngineConfig(device="cpu"), True, "cpu"),
        (EngineConfig(device="cuda"), True, "cuda:3"),
        (EngineConfig(device="cpu", quantization="int8"), True, "cpu"),
        (EngineConfig(quantization="int8"), False, "cpu"),
    ],
)
def test_auto_is_the_current_gpu_if_there_is_one(config, there, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    platform = platform_of(config)
    assert str(platform.device) == expected
    assert isinstance(platform, CPUPlatform if expected == "cpu" else CUDAPlatform)


@pytest.mark.parametrize(
    ("config", "there", "words"),
    [
        (EngineConfig(device="cuda"), False, "device=cuda, and torch sees no GPU here"),
        (EngineConfig(quantization="int8"), True, "int8 is for CPUs.*--device cpu"),
        (EngineConfig(device="cpu", cudagraph_mode=FULL), True, "cudagraph_mode=full.*device=cpu"),
    ],
)
def test_a_device_that_cannot_serve_is_refused(config, there, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(ConfigError, match=words):
        platform_of(config).kind.resolve(config)


@pytest.mark.parametrize(
    ("given", "kind", "mode", "ahead"),
    [
        ({}, CPU, CUDAGraphMode.FULL_AND_PIECEWISE, False),
        ({}, CUDA, FULL, True),
        ({"async_scheduling": True}, CPU, CUDAGraphMode.FULL_AND_PIECEWISE, True),
        ({"async_scheduling": False}, CUDA, FULL, False),
        ({"cudagraph_mode": CUDAGraphMode.PIECEWISE}, CUDA, CUDAGraphMode.PIECEWISE, True),
        ({"cudagraph_mode": FULL, "enforce_eager": True}, CPU, CUDAGraphMode.NONE, False),
    ],
)
def test_a_kind_of_device_resolves_settings(given, kind, mode, ahead):
    config = EngineConfig(max_num_seqs=3, **given)
    resolved = kind.resolve(config)
    assert (resolved.device, resolved.cudagraph_mode) == (kind.name, mode)
    assert resolved.async_scheduling is ahead
    assert resolved.max_num_seqs == 3
    assert kind.resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("given", "kind", "tokens", "target_ms"),
    [
        ({}, CPU, 512, 0.0),
        ({}, CUDA, 8192, None),  # the target follows from a measurement
        ({"max_num_batched_tokens": 64, "itl_target_ms": 5.0}, CPU, 64, 5.0),
        ({"max_num_batched_tokens": 64, "itl_target_ms": 0.0}, CUDA, 64, 0.0),
    ],
)
def test_each_kind_of_device_has_its_own_size_of_steps(given, kind, tokens, target_ms):
    resolved = kind.resolve(EngineConfig(max_num_seqs=3, **given))
    assert (resolved.max_num_batched_tokens, resolved.itl_target_ms) == (tokens, target_ms)
    assert kind.resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {},
            "float32 on cpu, mode full-and-piecewise, 10 of 12 graphs (requests up to 2, tokens up "
            "to 8), compilation NONE (this code of minisrv's is fused by hand), async scheduling "
            "off, context 512, 65 KV blocks of 16",
        ),
        (
            {"cudagraph_capture": "whole"},
            "mode full-and-piecewise, 12 graphs (requests up to 2, tokens up to 8), compilation",
        ),
        (
            {"cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY, "max_num_seqs": 1},
            "mode full-decode-only, 4 graphs (requests up to 1), compilation NONE (",
        ),
        (
            {"enforce_eager": True, "async_scheduling": True},
            "mode none, 0 graphs, compilation NONE (enforce_eager), async scheduling on, context",
        ),
    ],
)
def test_the_engine_says_what_it_uses(given, words, checkpoint):
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "device": "cpu", "dtype": "float32"}
    engine = build_engine(EngineConfig(**{"model": checkpoint, **limits, **given}))
    assert words in engine.info.summary


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, CPU),
        ({"device": "cpu"}, CPU),
        ({"device": "cuda"}, CUDA),
        ({"cudagraph_mode": FULL}, CUDA),
        ({"cudagraph_mode": FULL, "device": "cpu"}, CPU),
        ({"quantization": "int8", "cudagraph_mode": FULL}, CPU),
    ],
)
def test_the_kind_of_device_that_is_expected(given, kind):
    assert expected_kind(EngineConfig(**given)) is kind


@pytest.mark.parametrize(
    ("platform", "native", "checkpoint_dtype", "expected", "why"),
    [
        (CPUPlatform(), True, "bfloat16", "bfloat16", "which this CPU multiplies natively"),
        (CPUPlatform(), False, "bfloat16", "float32", "the fastest here that loses nothing"),
        (CPUPlatform(), True, "float16", "float32", "the fastest here that loses nothing"),
        (CPUPlatform(), True, "float32", "float32", "the fastest here that loses nothing"),
        (Gpu(), False, "bfloat16", "bfloat16", "half precision"),
        (Gpu(), False, "float16", "float16", "half precision"),
        (Gpu(), True, "float32", "bfloat16", "half precision"),
    ],
)
def test_auto_dtype(platform, native, checkpoint_dtype, expected, why, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    model = replace(MODEL, dtype=checkpoint_dtype)
    with caplog.at_level(logging.INFO, logger="minisrv"):
        assert resolve_dtype(EngineConfig(), model, platform) is getattr(torch, expected)
    assert f"weights are {checkpoint_dtype}, served in {expected}: {why}" in caplog.text


def test_a_dtype_that_is_asked_for_and_that_of_int8_are_no_choice_of_the_platform(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    platform = CPUPlatform()
    assert resolve_dtype(EngineConfig(dtype="float16"), MODEL, platform) is torch.float16
    int8 = EngineConfig(device="cpu", quantization="int8")
    assert resolve_dtype(int8, MODEL, platform) is torch.bfloat16


def test_a_tied_output_projection_takes_memory_of_its_own_on_a_cpu_alone():
    config, output = EngineConfig(), MODEL.vocab_size * MODEL.hidden_size
    tied = replace(MODEL, tie_word_embeddings=True)
    for model, extra in ((MODEL, 0), (tied, output)):
        assert Gpu().weight_bytes(config, model, torch.float32) == 4 * model.num_parameters
        found = CPUPlatform().weight_bytes(config, model, torch.float32)
        assert found == 4 * (model.num_parameters + extra)
    int8 = EngineConfig(device="cpu", quantization="int8")
    found = CPUPlatform().weight_bytes(int8, tied, torch.bfloat16)
    assert found == tied.num_parameters + 2 * output


def test_int8_leaves_experts_as_they_are():
    int8 = EngineConfig(device="cpu", quantization="int8")
    kept = MODEL.vocab_size * MODEL.hidden_size + 1000
    model = replace(MODEL, counted_parameters=kept + 500, expert_parameters=1000)
    assert CPUPlatform().weight_bytes(int8, model, torch.bfloat16) == 2 * kept + 500


def test_a_gpus_cache_is_at_most_what_weights_leave_of_what_is_allowed():
    config, weights = EngineConfig(), 2 * MODEL.num_parameters
    gpu = Gpu(allowed=1000 * MIB, used=300 * MIB)
    found = gpu.cache_before_loading(config, MODEL, torch.bfloat16)
    assert found == 700 * MIB - weights
    asked = EngineConfig(kv_cache_memory=77)
    assert Gpu(allowed=0).cache_before_loading(asked, MODEL, torch.bfloat16) == 77
    full = Gpu(allowed=300 * MIB + weights, used=300 * MIB)
    with pytest.raises(ConfigError, match=r"the weights take 0\.2 MiB, and 0\.2 MiB of memory"):
        full.cache_before_loading(config, MODEL, torch.bfloat16)


@pytest.mark.parametrize("generations", [1, 2])
def test_a_gpus_cache_gets_what_weights_graphs_and_steps_leave(caplog, generations, job):
    """The cache gets the memory that remains: what loading has left cached does not count, what the
    largest step leaves cached does, and nothing of the probe stays. Where one generation of graphs
    is built beside another, there is room for both and for those who compile."""
    gpu = Gpu(allowed=5000 * MIB, used=500 * MIB, kept=1000 * MIB)
    config = EngineConfig(max_num_seqs=3)
    shape = KVCacheShape(bytes_per_block=MIB, blocks_per_context=5)
    sizes = []

    def make_runner(num_blocks: int) -> Probe:
        sizes.append(num_blocks)
        return Probe(gpu, num_blocks)

    with caplog.at_level(logging.INFO, logger="minisrv"):
        plan = gpu.plan_memory(config, shape, make_runner, 4321, generations, job)
    assert sizes == [1 + 5 + 4 * 3]
    compilers = 1536 if generations > 1 else 0
    left = 5000 - 500 - 30 - generations * 70 - compilers
    sizes_of_plan = plan.kv_cache_bytes, plan.graph_bytes, plan.step_bytes
    assert sizes_of_plan == (left * MIB, 70 * MIB, 30 * MIB)
    assert gpu.used_bytes() == 500 * MIB
    said = (
        f"steps take 30.0 MiB, graphs 70.0 MiB by a probe; {left}.0 MiB are left for the KV cache"
    )
    assert said in caplog.text


def test_the_next_start_of_the_same_engine_makes_no_probe(caplog, job, checkpoint, empty_cache):
    """It has the same plan. After a start whose plan did not hold, or that did not come to the
    check of its plan, the next one measures again."""
    shape = KVCacheShape(bytes_per_block=MIB, blocks_per_context=5)
    probes = 0

    def plan(job: KernelJob, **settings: int) -> MemoryPlan:
        gpu = Gpu(allowed=5000 * MIB, used=500 * MIB)

        def make_runner(num_blocks: int) -> Probe:
            nonlocal probes
            probes += 1
            return Probe(gpu, num_blocks)

        return gpu.plan_memory(EngineConfig(**settings), shape, make_runner, 4321, 1, job)

    config = EngineConfig(model=checkpoint, device="cpu", num_kv_blocks=100, **ONE_TOKEN)
    runner = build_engine(config).runner

    def check(plan: MemoryPlan, used: int) -> None:
        Gpu(used=used * MIB, allowed=890 * MIB).check_plan(config, plan, shape, runner)

    first = plan(job)
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        check(first, used=900)
    assert plan(job) == first
    assert probes == 2
    check(first, used=890)
    second = plan(job)
    assert second == first
    assert probes == 2
    plan(replace(job, dtype="float16"))
    plan(job, max_num_seqs=3)
    assert probes == 4

    check(second, used=890)
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        check(plan(job), used=900)
    assert probes == 4
    plan(job)
    assert probes == 5
    assert first.kept is not None
    first.kept.write_bytes(b"cut off")
    assert plan(job) == first
    assert probes == 6

    shutil.rmtree(empty_cache)
    empty_cache.write_text("no directory")
    assert plan(job) == replace(first, kept=None)
    assert "the result of the memory probe is not kept" in caplog.text


@pytest.mark.parametrize("others", [-300, -1, 0, 300, 2000])
def test_a_probe_beside_which_another_process_changes_its_memory_is_not_kept(others, caplog, job):
    """Its result would be wrong for the next start. This start uses it, but not as if steps gave
    memory back. A little more memory in use may be that of this process."""
    gpu = Gpu(allowed=5000 * MIB, used=500 * MIB)
    shape = KVCacheShape(bytes_per_block=MIB, blocks_per_context=5)

    def make_runner(num_blocks: int) -> Probe:
        gpu.used += others * MIB
        return Probe(gpu, num_blocks)

    plan = gpu.plan_memory(EngineConfig(), shape, make_runner, 4321, 1, job)
    assert plan.kv_cache_bytes == (5000 - 500 - 70 - max(0, 30 + others)) * MIB
    kept = others in (0, 300)
    assert (plan.kept is not None) == kept
    assert ("as if another process had taken or freed some" in caplog.text) == (not kept)


@pytest.mark.parametrize("fails", ["capture_graphs", "measure", None])
def test_a_start_that_runs_out_of_memory_forgets_the_result_of_the_probe(
    fails, checkpoint, monkeypatch
):
    """Whether graphs are being captured or steps timed, the next start measures again."""
    probes = 0

    def count_probe(*args: object) -> tuple[ProbeResult, bool]:
        nonlocal probes
        probes += 1
        return ProbeResult(step_bytes=MIB, graph_bytes=MIB), True

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB.")

    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8}
    config = EngineConfig(model=checkpoint, dtype="float32", device="cpu", **limits)
    monkeypatch.setattr(builder, "platform_of", lambda config: Gpu())
    monkeypatch.setattr(Gpu, "_probe", count_probe)
    build_engine(config)
    owner = StepCosts if fails == "measure" else Compilation
    with monkeypatch.context() as patch, suppress(ConfigError):
        if fails is not None:
            patch.setattr(owner, fails, full)
        build_engine(config)
        assert fails is None
    assert probes == 1
    build_engine(config)
    assert probes == (1 if fails is None else 2)


@pytest.mark.skipif(shutil.which("cc") is None, reason="compiles a driver to ask")
def test_another_driver_is_another_gpu_for_a_probe(tmp_path, monkeypatch):
    """The driver itself is asked for its version, as a container may lack the file that has it."""

    def identity(name: str, version: int) -> tuple[object, ...]:
        source, library = tmp_path / f"{name}.c", str(tmp_path / f"{name}.so")
        source.write_text(
            f"int cuDriverGetVersion(int *found) {{ *found = {version}; return {version} == 0; }}"
        )
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(source)], check=True)
        monkeypatch.setattr(cuda, "driver_version", partial(driver_version, library))
        return CUDAPlatform(torch.device("cuda", 0)).identity()

    gpu = SimpleNamespace(name="a GPU", total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert identity("old", 12090) == ("a GPU", 1 << 30, 12090)
    assert identity("new", 13000) == ("a GPU", 1 << 30, 13000)
    with pytest.raises(OSError, match="does not tell its version"):
        identity("broken", 0)


def test_a_cache_whose_size_is_given_needs_no_probe(job):
    gpu, shape = Gpu(), KVCacheShape(bytes_per_block=100, blocks_per_context=5)
    asked = EngineConfig(kv_cache_memory=4321)
    blocks = EngineConfig(num_kv_blocks=7)
    assert gpu.plan_memory(asked, shape, None, 4321, 1, job) == MemoryPlan(4321)
    assert gpu.plan_memory(blocks, shape, None, 4321, 1, job) == MemoryPlan(700)
    for config in (EngineConfig(), asked, blocks):
        assert CPUPlatform().plan_memory(config, shape, None, 4321, 1, job) == MemoryPlan(4321)


def test_a_plan_that_does_not_hold_names_the_flag_and_a_size_that_does(checkpoint):
    config = EngineConfig(model=checkpoint, device="cpu", num_kv_blocks=100, **ONE_TOKEN)
    runner = build_engine(config).runner
    shape = KVCacheShape(bytes_per_block=MIB, blocks_per_context=1)
    plan = MemoryPlan(kv_cache_bytes=1 << 30, graph_bytes=5 * MIB, step_bytes=MIB)
    gpu = Gpu(used=900 * MIB, allowed=890 * MIB)
    words = "10.0 MiB of the GPU.*1.0 MiB for steps; other processes.*--kv-cache-memory 89M at most"
    with pytest.raises(ConfigError, match=words):
        gpu.check_plan(config, plan, shape, runner)
    gpu.check_plan(config, MemoryPlan(kv_cache_bytes=1 << 30), shape, runner)
    # Memory that torch keeps cached and nobody uses is released before the check.
    Gpu(used=900 * MIB, kept=10 * MIB, allowed=900 * MIB).check_plan(config, plan, shape, runner)


@pytest.mark.parametrize(
    ("on_gpu", "asked", "ahead"),
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False)],
)
def test_a_start_on_each_platform(on_gpu, asked, ahead, checkpoint, monkeypatch, caplog):
    """Each platform has its own phases of the line `ready in`, default of async scheduling, and
    choice of whether graphs are probed and timed."""
    if on_gpu:
        monkeypatch.setattr(builder, "platform_of", lambda config: Gpu())
    config = EngineConfig(
        model=checkpoint,
        dtype="float32",
        device="cpu",
        max_num_seqs=2,
        max_num_batched_tokens=8,
        async_scheduling=asked,
    )
    with caplog.at_level(logging.INFO, logger="minisrv"):
        parts = build_engine(config)
    phases = ["device", "checkpoint", "weights", "tokenizer", "kernels", "memory", "graphs"]
    assert list(parts.info.startup_seconds) == phases
    assert parts.config.async_scheduling is ahead
    assert parts.config.cudagraph_mode is (FULL if on_gpu else CUDAGraphMode.FULL_AND_PIECEWISE)
    assert f"resolved settings: {parts.info.summary}" in caplog.text
    keys = parts.dispatcher.ladders.covering().keys()
    assert set(parts.runner.graphs) == set(keys)
    assert set(parts.times) == (set(keys) if on_gpu else set())
    assert (parts.memory.graph_bytes is not None) == on_gpu
    words = ("are left for the KV cache", "a probe had said")
    assert [text in caplog.text for text in words] == [on_gpu, on_gpu]


def test_the_room_for_one_more_graph():
    """It is what `gpu_memory_utilization` leaves, or if the size of the cache was given all that
    the GPU has left."""
    config, sized, given = EngineConfig(), MemoryPlan(1 << 30, graph_bytes=MIB), MemoryPlan(1 << 30)
    gpu = Gpu(used=880 * MIB, allowed=890 * MIB)
    left = gpu.total_bytes() - 880 * MIB
    assert gpu.has_room(config, sized, 10 * MIB)
    assert not gpu.has_room(config, sized, 10 * MIB + 1)
    assert gpu.has_room(config, given, left)
    assert not gpu.has_room(config, given, left + 1)
    assert CPUPlatform().has_room(config, sized, 1 << 60)


def test_the_room_beside_a_cache_of_a_given_size_leaves_out_that_of_a_step(checkpoint):
    """Graphs took all of the GPU, and the next largest step failed."""
    runner = build_engine(EngineConfig(model=checkpoint, device="cpu", **ONE_TOKEN)).runner
    config = EngineConfig(model=checkpoint, num_kv_blocks=100)
    shape = KVCacheShape(bytes_per_block=MIB, blocks_per_context=1)
    gpu = Gpu(used=700 * MIB, kept=200 * MIB)
    plan = gpu.plan_memory(config, shape, None, 4321, 1, None)
    gpu.release()
    gpu.used += 100 * MIB  # the cache
    gpu.kept += 150 * MIB  # the largest step
    gpu.peak = gpu.used_bytes()
    gpu.check_plan(config, plan, shape, runner)
    left = gpu.total_bytes() - gpu.used_bytes()
    assert gpu.has_room(config, plan, left - 150 * MIB)
    assert not gpu.has_room(config, plan, left - 150 * MIB + 1)


def test_a_full_gpu_is_an_error_of_the_settings_that_names_the_phase(checkpoint, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB.")

    monkeypatch.setattr(builder, "load_model", full)
    words = r"full at start-up \(weights\): tried to allocate 9 GiB\. .*--kv-cache-memory"
    with pytest.raises(ConfigError, match=words):
        build_engine(EngineConfig(model=checkpoint, device="cpu"))

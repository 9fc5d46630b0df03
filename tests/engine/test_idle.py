"""The time in which a GPU waited for the host counts only while requests had work for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minisrv.config import EngineConfig
from minisrv.device_kind import CPU, KINDS
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.request import EngineRequest, SamplingParams
from minisrv.runner.results import DeviceTime, StepResult
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize("steps_ahead", [False, True])
def test_an_engine_without_requests_does_not_idle(tmp_path, monkeypatch, steps_ahead):
    """No idle time is counted while the engine has no requests, also when the last one was aborted,
    as is every request that ends at a stop string."""
    monkeypatch.setattr(
        StepResult, "device_time", lambda self: DeviceTime(busy_ms=1.0, idle_ms=100.0)
    )
    monkeypatch.setitem(KINDS, "cpu", replace(CPU, has_clock=True))
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path)),
        device="cpu",
        enforce_eager=True,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        async_scheduling=steps_ahead,
    )
    engine = EngineCore(build_engine(config))

    def run(name: str, *, steps: int, most: int) -> float:
        before = engine.stats().gpu_idle_ms
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        engine.add(EngineRequest(request_id=name, prompt_token_ids=[5], params=params))
        for _ in range(steps):
            engine.step()
        engine.abort(name)
        while engine.has_work:
            engine.step()
        return engine.stats().gpu_idle_ms - before

    assert run("ended", steps=4, most=4) == 300
    assert run("aborted", steps=4, most=9) >= 300
    assert run("behind it", steps=4, most=4) == 300

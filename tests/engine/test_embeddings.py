"""The hidden states that a request for an embedding reports are those of transformers: in chunks,
in every mode, with and without a step launched ahead, through preemptions, and with the prefix
cache, which the last token's uses and the mean's does not."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.errors import RequestError
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, FinishReason, Pooling, SamplingParams
from tests.checkpoints import make_checkpoint, make_model

CHUNK = 16
LENGTHS = (1, 2, 5, 16, 17, 40, 63, 64)
"""The longest fills the context."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


def start(checkpoint: str, mode: str = "none", steps_ahead: bool = False) -> EngineCore:
    config = EngineConfig(
        model=checkpoint,
        device="cpu",
        dtype="float32",
        cudagraph_mode=CUDAGraphMode(mode),
        async_scheduling=steps_ahead,
        max_num_seqs=4,
        max_num_batched_tokens=CHUNK,
        max_model_len=64,
        block_size=4,
        num_kv_blocks=24,
    )
    return EngineCore(build_engine(config, check_addresses=True))


def prompt_of(length: int) -> list[int]:
    return [(7 * i * i + length) % 60 for i in range(length)]


def ask(engine: EngineCore, name: str, prompt: list[int], pooling: Pooling) -> None:
    params = SamplingParams(max_tokens=0, pooling=pooling)
    engine.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params))


def run(engine: EngineCore) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The sums and the numbers of cached tokens, by request; other requests may run beside them."""
    sums: dict[str, np.ndarray] = {}
    cached: dict[str, int] = defaultdict(int)
    while engine.has_work:
        for output in engine.step():
            if output.hidden_sum:
                found = np.frombuffer(output.hidden_sum, np.float32)
                sums[output.request_id] = sums.get(output.request_id, 0) + found
            cached[output.request_id] += output.num_cached_tokens
            if output.request_id in sums and output.finish_reason is not None:
                assert output.finish_reason is FinishReason.LENGTH
                assert output.token_ids == []
        engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
    return sums, cached


@torch.no_grad()
def expected(prompt: list[int], pooling: Pooling) -> np.ndarray:
    states = make_model("qwen3").model(torch.tensor([prompt])).last_hidden_state[0]
    return (states[-1] if pooling is Pooling.LAST else states.sum(0)).numpy()


@pytest.mark.parametrize(
    ("mode", "steps_ahead"),
    [
        ("none", False),
        ("piecewise", True),
        ("full-and-piecewise", False),
        ("full-and-piecewise", True),
    ],
)
def test_hidden_states_are_those_of_transformers(
    checkpoint, mode, steps_ahead, tape_holds_mixed_batches
):
    """Both kinds of pooling run beside requests that generate, and are preempted by them."""
    engine = start(checkpoint, mode, steps_ahead)
    for number, length in enumerate(LENGTHS):
        for pooling in Pooling:
            ask(engine, f"{pooling} {length}", prompt_of(length), pooling)
        if number < 3:
            params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            engine.add(
                EngineRequest(request_id=str(number), prompt_token_ids=prompt_of(9), params=params)
            )
    sums, _ = run(engine)
    assert engine.stats().preemptions
    assert len(sums) == 2 * len(LENGTHS)
    for name, found in sums.items():
        pooling, length = name.split()
        wanted = expected(prompt_of(int(length)), Pooling(pooling))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-4)


def test_the_prefix_cache(checkpoint):
    """A full hit of the last token's computes that token; the mean computes the whole prompt."""
    engine = start(checkpoint)
    prompt = prompt_of(32)
    found = {}
    for name, pooling in (("a", Pooling.MEAN), ("b", Pooling.LAST), ("c", Pooling.MEAN)):
        ask(engine, name, prompt, pooling)
        sums, cached = run(engine)
        found[name] = sums[name], cached[name]
    assert [number for _, number in found.values()] == [0, 28, 0]
    assert np.array_equal(found["a"][0], found["c"][0])
    np.testing.assert_allclose(found["b"][0], expected(prompt, Pooling.LAST), rtol=1e-3, atol=2e-4)


def test_a_request_reports_one_kind_of_result():
    with pytest.raises(RequestError) as raised:
        SamplingParams(pooling=Pooling.MEAN, prompt_logprobs=1)
    assert raised.value.param == "pooling"

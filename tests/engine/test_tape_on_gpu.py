"""The tape on a GPU: every mode, with and without a step launched ahead, gives the tokens of
transformers in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv.checkpoint import resolve_checkpoint
from minisrv.config import EngineConfig
from minisrv.modes import CUDAGraphMode
from tests.engine.tape import LIMITS, VOCAB, judge, make_tape, play

pytestmark = pytest.mark.gpu

TAPE = make_tape(240, VOCAB, seed=1)
MODES = ("none", "piecewise", "full-decode-only", "full", "full-and-piecewise")


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(None), dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def judged():
    """Results of `judge` by request and tokens, kept because transformers is slow on a CPU."""
    return {}


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_transformers(mode, steps_ahead, reference, judged):
    config = EngineConfig(
        device="cuda",
        cudagraph_mode=CUDAGraphMode(mode),
        async_scheduling=bool(steps_ahead),
        **LIMITS,
    )
    played = play(TAPE, config)
    close = total = 0
    wrong: list[str] = []
    for entry in TAPE:
        name = entry.request.request_id
        tokens = tuple(played.tokens[name])
        if (name, tokens) not in judged:
            judged[name, tokens] = judge(reference, entry, list(tokens))
        ties, differing = judged[name, tokens]
        close, total = close + ties, total + len(tokens)
        wrong += differing
    print(f"mode {mode}, {steps_ahead} ahead: {total} tokens, {close} within epsilon of another")
    assert not wrong
    assert close <= total / 1000
    assert played.engine.stats().preemptions >= 5

"""The tape on a GPU: every mode at both lags gives the tokens of transformers, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv.checkpoint import resolve_checkpoint
from minisrv.config import EngineConfig
from minisrv.modes import CUDAGraphMode
from tests.engine.tape import LIMITS, judge, make_tape, play

pytestmark = pytest.mark.gpu

TAPE = make_tape(240, 4096, seed=1)
MODES = ("none", "piecewise", "full-decode-only", "full", "full-and-piecewise")


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(None), dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def judged():
    """Tokens by request that have been judged already: transformers is slow on a host."""
    return {}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_transformers(mode, lag, reference, judged):
    config = EngineConfig(
        device="cuda",
        cudagraph_mode=CUDAGraphMode(mode),
        async_scheduling=bool(lag),
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
    print(f"mode {mode}, lag {lag}: {total} tokens, {close} within epsilon of another")
    assert not wrong
    assert close <= total / 1000
    assert played.engine.stats().preemptions >= 5


def test_two_thousand_requests_one_step_ahead():
    """Random lengths, aborts, preemptions and prefix hits; every block and slot is checked at every
    step. The tokens are those of steps that wait for each other, but where rounding decides.
    """
    tape = make_tape(2000, 4096, seed=2)
    settings = {"device": "cuda", "max_waiting": len(tape), **LIMITS}
    ahead = play(tape, EngineConfig(**settings))
    waiting = play(tape, EngineConfig(async_scheduling=False, **settings))
    total = parted = 0
    for name, tokens in ahead.tokens.items():
        both = min(len(tokens), len(waiting.tokens[name]))  # an abort comes a token later
        total += both
        parted += tokens[:both] != waiting.tokens[name][:both]
    stats = ahead.engine.stats()
    print(
        f"{total} tokens, {parted} of 2000 answers part, {stats.preemptions} preemptions, "
        f"{stats.prefix_cache_hits} prompt tokens cached, GPU busy {stats.gpu_busy_ms:.0f} ms, "
        f"idle {stats.gpu_idle_ms:.0f} ms"
    )
    assert parted <= total / 1000
    assert stats.preemptions >= 5

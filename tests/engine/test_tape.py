"""The same tape gives the same tokens in every mode, with and without a step launched ahead, with
and without the prefix cache, and they are those of transformers.

Equal means (design decision 19): the same tokens, except where the best two scores are closer than
EPSILON. A request that differs in this way goes on differently, so what follows is judged by the
reference alone. Such tokens are counted, and the test fails if they are more than 0.1% of all.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv.config import EngineConfig
from minisrv.modes import CUDAGraphMode, Reason
from minisrv.request import FinishReason
from tests.engine.tape import LIMITS, VOCAB, judge, make_model, make_tape, play

TAPE = make_tape(140, VOCAB, seed=1)
MODES = ("none", "piecewise", "full-decode-only", "full", "full-and-piecewise")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def first(checkpoint):
    """The run that the others are compared with: eager, without a step launched ahead, every prompt
    computed without the prefix cache."""
    plain = {"enforce_eager": True, "enable_prefix_caching": False}
    return play(TAPE, EngineConfig(checkpoint, device="cpu", **plain, **LIMITS))


def test_eager_gives_the_tokens_of_transformers(first, reference):
    close, total = 0, 0
    wrong: list[str] = []
    for entry in TAPE:
        tokens = first.tokens[entry.request.request_id]
        ties, differing = judge(reference, entry, tokens)
        close, total = close + ties, total + len(tokens)
        wrong += differing
    print(f"{total} tokens, {close} within epsilon of another")
    assert not wrong
    assert close <= total / 1000


def test_the_tape_is_hard_enough(first):
    """The tape has enough preemptions, aborts, stops, one-token prompts and long prompts to find
    faults."""
    stats = first.engine.stats()
    assert stats.preemptions >= 5
    assert stats.prefix_cache_hits == 0
    reasons = list(first.reasons.values())
    for reason, least in ((FinishReason.ABORT, 5), (FinishReason.STOP, 3)):
        assert reasons.count(reason) >= least
    lengths = [len(entry.request.prompt_token_ids) for entry in TAPE]
    assert lengths.count(1) >= 10
    assert sum(length > LIMITS["max_num_batched_tokens"] for length in lengths) >= 10


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_lag_gives_the_same_tokens(
    mode, steps_ahead, checkpoint, first, reference, tape_holds_mixed_batches
):
    config = EngineConfig(
        checkpoint,
        device="cpu",
        cudagraph_mode=CUDAGraphMode(mode),
        async_scheduling=bool(steps_ahead),
        **LIMITS,
    )
    played = play(TAPE, config)
    close, total = 0, 0
    wrong: list[str] = []
    for entry in TAPE:
        name = entry.request.request_id
        tokens, others = played.tokens[name], first.tokens[name]
        total += len(tokens)
        common = min(len(tokens), len(others))
        if tokens[:common] != others[:common]:
            ties, differing = judge(reference, entry, tokens)
            close += max(ties, 1)
            wrong += differing
        elif entry.abort_after is None:
            assert (tokens, played.reasons[name]) == (others, first.reasons[name])
    stats = played.engine.stats()
    print(
        f"mode {mode}, {steps_ahead} steps ahead: {total} tokens, {close} decided by rounding; "
        f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} prompt tokens cached"
    )
    assert not wrong
    assert close <= total / 1000
    assert stats.prefix_cache_hits >= 1000
    assert stats.preemptions  # how many depends on when trials of the filling hold blocks
    steps = {(count.mode, count.reason): count.steps for count in stats.steps}
    missing = sum(count for (_, reason), count in steps.items() if reason == Reason.SIZE_MISSING)
    assert (missing > 0) == (mode != "none"), "the tape begins before the ladders are whole"
    assert {key for key in steps if key[1] != Reason.SIZE_MISSING} == {
        "none": {("NONE", "graphs_off")},
        "piecewise": {("PIECEWISE", "no_full_graph"), ("PIECEWISE", "has_prefill")},
        "full-decode-only": {("FULL", "pure_decode"), ("NONE", "no_mixed_graph")},
        "full": {("FULL", "pure_decode"), ("FULL", "has_prefill")},
        "full-and-piecewise": {("FULL", "pure_decode"), ("PIECEWISE", "has_prefill")},
    }[mode]

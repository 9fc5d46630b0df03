"""Many requests that come and go with one step launched ahead: blocks, request indices and
tokens."""

from __future__ import annotations

import pytest

from minisrv.config import EngineConfig
from tests.engine.tape import LIMITS, VOCAB, make_model, make_tape, play


@pytest.mark.parametrize(
    ("device", "number"), [("cpu", 130), pytest.param("cuda", 2000, marks=pytest.mark.gpu)]
)
def test_one_step_ahead(device, number, tmp_path):
    """Blocks and request indices are checked at every step, through random lengths, aborts,
    preemptions and prefix cache hits. The tokens are those of an engine that waits for each step
    before the next, except where rounding decides."""
    tape = make_tape(number, VOCAB, seed=2)
    model = make_model(tmp_path) if device == "cpu" else None
    settings = {"model": model, "device": device, "max_waiting": len(tape), **LIMITS}
    settings["cudagraph_capture"] = "whole"  # trials of a filling hold blocks when there is time
    ahead = play(tape, EngineConfig(async_scheduling=True, **settings))
    waiting = play(tape, EngineConfig(async_scheduling=False, **settings))
    total = parted = 0
    for name, tokens in ahead.tokens.items():
        # With a step launched ahead an abort takes effect a token later.
        both = min(len(tokens), len(waiting.tokens[name]))
        total += both
        parted += tokens[:both] != waiting.tokens[name][:both]
    stats = ahead.engine.stats()
    print(
        f"{total} tokens, {parted} of {number} answers part, {stats.preemptions} preemptions, "
        f"{stats.prefix_cache_hits} prompt tokens cached"
    )
    assert parted <= total / 1000
    assert stats.preemptions >= 5

"""Sleep on a GPU: memory is really free, and every graph mode gives the same tokens behind it."""

from __future__ import annotations

import pytest

from minisrv import LLM, SamplingParams
from minisrv.engine.platforms.cuda import CUDAPlatform
from tests.gpu_memory import used

pytestmark = pytest.mark.gpu

MIB = 1 << 20
KV_CACHE = 512 * MIB
PROMPTS = [[5, 6, 7], list(range(3, 40)), [9] * 17]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize(
    "mode", ["none", "piecewise", "full-decode-only", "full", "full-and-piecewise"]
)
def test_tokens_are_the_same_and_memory_was_free(
    monkeypatch: pytest.MonkeyPatch, mode: str, steps_ahead: bool
) -> None:
    """Neither the tokens of a step nor its graph depends on times here: graphs of other sizes round
    differently."""
    monkeypatch.setattr(CUDAPlatform, "times_graphs", False)
    llm = LLM(
        enable_sleep_mode=True,
        cudagraph_mode=mode,
        async_scheduling=steps_ahead,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory=KV_CACHE,
        cudagraph_capture="whole",
        itl_target_ms=0.0,
    )
    before = tokens(llm)
    arenas = llm.engine.sleeper._arenas.values()
    held = sum(span.nbytes for arena in arenas for span in arena._spans)
    assert held > 16 * MIB
    for level in (1, 1, 2):
        awake = used()
        llm.sleep(level)
        assert awake - used() >= held - 8 * MIB  # of which a comparison of steps takes some
        llm.wake_up(["weights"])
        assert llm.engine.sleeper.report.is_asleep
        llm.wake_up()
        assert tokens(llm) == before, (mode, level)

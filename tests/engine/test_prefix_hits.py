"""The beginning of a prompt that is sent again comes from the prefix cache, in every mode."""

from __future__ import annotations

import pytest

from minisrv import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

MODES = ("none", "piecewise", "full-decode-only", "full-and-piecewise")
PROMPT = [(7 * i + 5) % VOCAB_SIZE for i in range(24)]
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 128, "block_size": 4}
LIMITS["dtype"] = "float32"  # Half precision rounds differently when the chunks of a prompt differ.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_prompt_twice_gives_the_same_tokens(checkpoint, mode, steps_ahead):
    """Both of two equal requests give the same tokens. Trap 2: what capture had left in the cache
    reached only the second one."""
    settings = {"cudagraph_mode": mode, "async_scheduling": steps_ahead}
    # In the middle of a certification the null block holds poison.
    llm = LLM(checkpoint, cudagraph_capture="whole", **settings, **LIMITS)

    def null_block_is_finite() -> bool:
        if mode == "none":
            # Nothing is captured or padded in this mode, so nobody has written to the null block.
            return True
        return all(bool(cache[0].isfinite().all()) for cache in llm.engine.runner.kv_caches)

    assert null_block_is_finite()
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    # These give a full hit, a tail of one token, and a tail of several.
    for length in (20, 21, 23):
        prompt = [length, *PROMPT[1:length]]
        [one] = llm.generate(prompt, params)
        [other] = llm.generate(prompt, params)
        assert one.num_cached_tokens == 0
        assert other.num_cached_tokens == (16 if length == 20 else 20)
        assert other.outputs[0].token_ids == one.outputs[0].token_ids
        for a, b in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
        # Trap 6: the tail behind a cached prefix is prefill, however short it is.
        decodes = sum(
            steps
            for step, steps in other.outputs[0].graph_steps.items()
            if step.endswith("/pure_decode")
        )
        assert decodes == (11 if mode.startswith("full") else 0)
        assert sum(other.outputs[0].graph_steps.values()) == 12
    assert null_block_is_finite()


def test_an_answer_is_the_same_with_and_without_the_cache(checkpoint):
    """A conversation in which every turn holds the last one and its answer gives the same tokens
    with and without the prefix cache."""
    answers: list[list[int]] = []
    for caching in (False, True):
        llm = LLM(checkpoint, enable_prefix_caching=caching, **LIMITS)
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=11, ignore_eos=True)
        turn, cached = list(PROMPT), 0
        for _ in range(5):
            [output] = llm.generate(turn, params)
            assert output.num_cached_tokens == (cached if caching else 0)
            turn += output.outputs[0].token_ids
            # No step has computed the cache entry of the last token.
            cached = (len(turn) - 1) // 4 * 4
            turn += [1, 2, 3]
        answers.append(turn)
        stats = llm.engine.stats()
        assert (stats.prefix_cache_hits > 100) is caching
        assert (stats.prefix_cache_queries == stats.prompt_tokens) is caching
        assert stats.prefill_tokens == stats.prompt_tokens - stats.prefix_cache_hits
    assert answers[0] == answers[1]

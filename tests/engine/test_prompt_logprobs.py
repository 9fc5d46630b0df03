"""The log-probabilities of prompts are those of transformers: in chunks, in every mode, with and
without a step launched ahead, through preemptions, and although the prefix cache is on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from minisrv.config import EngineConfig
from minisrv.core.request_state import RequestState
from minisrv.core.scheduler import Scheduler
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.modes import CUDAGraphMode
from minisrv.request import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from minisrv.runner import logprobs
from tests.checkpoints import VOCAB_SIZE, make_checkpoint, make_model

MODES = ("none", "piecewise", "full-decode-only", "full", "full-and-piecewise")
CHUNK = 16
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


def start(checkpoint: str, mode: str = "none", steps_ahead: bool = False, **settings) -> EngineCore:
    limits = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": CHUNK,
        "max_model_len": 128,
        "block_size": 4,
        "num_kv_blocks": 60,
    }
    config = EngineConfig(
        model=checkpoint,
        device="cpu",
        dtype="float32",
        cudagraph_mode=CUDAGraphMode(mode),
        async_scheduling=steps_ahead,
        **limits | settings,
    )
    return EngineCore(build_engine(config, check_addresses=True))


def ask(engine: EngineCore, name: str, prompt: list[int], **params) -> None:
    defaults = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, "prompt_logprobs": 2}
    engine.add(
        EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(**defaults | params),
        )
    )


class Told:
    """All that the outputs of a request reported, in the order of its steps."""

    def __init__(self) -> None:
        self.prompt: list[TokenLogprobs] = []
        self.tokens: list[int] = []
        self.cached = 0
        self.reports = 0
        self.reason: FinishReason | None = None


def run(engine: EngineCore) -> dict[str, Told]:
    found: dict[str, Told] = defaultdict(Told)
    while engine.has_work:
        for output in engine.step():
            told = found[output.request_id]
            assert not (told.tokens and output.prompt_logprobs), "the prompt comes first"
            told.prompt += output.prompt_logprobs
            told.reports += bool(output.prompt_logprobs)
            told.tokens += output.token_ids
            told.cached += output.num_cached_tokens
            told.reason = output.finish_reason
        engine.scheduler.check_integrity()
    assert engine.scheduler.block_pool.num_used == 0
    return found


@cache
def reference() -> PreTrainedModel:
    return make_model("qwen3")


@torch.no_grad()
def check(prompt: Sequence[int], told: list[TokenLogprobs], num_top: int) -> None:
    """Check that the reported log-probabilities are those of transformers."""
    assert [entry.token_id for entry in told] == list(prompt[1:])
    expected = reference()(torch.tensor([list(prompt)])).logits[0].log_softmax(dim=-1)
    for row, entry in zip(expected[:-1], told, strict=True):
        own = float(row[entry.token_id])
        assert entry.logprob == pytest.approx(own, abs=TOLERANCE)
        near = ((row - own).abs() < TOLERANCE).sum() - 1
        assert abs(entry.rank - 1 - int((row > own).sum())) <= near
        best = row.topk(num_top).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=TOLERANCE)
        assert [float(row[i]) for i, _ in entry.top] == pytest.approx(best, abs=TOLERANCE)


def prompt_of(length: int, stem: int = 3) -> list[int]:
    return [(stem * i * i + 7 * i + stem) % VOCAB_SIZE for i in range(length)]


@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_they_are_those_of_transformers(
    checkpoint, mode, steps_ahead, tape_holds_mixed_batches, monkeypatch
):
    """The reports are right for prompts of one chunk and of several, also where the end of a chunk
    is the end of the prompt."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 5 * VOCAB_SIZE)
    engine = start(checkpoint, mode, steps_ahead)
    prompts = {str(n): prompt_of(n, stem=n) for n in (1, 2, CHUNK, CHUNK + 1, 40, 2 * CHUNK)}
    for name, prompt in prompts.items():
        ask(engine, name, prompt, logprobs=1 if name == "40" else None)
    ask(engine, "none", prompts["40"], prompt_logprobs=None)
    found = run(engine)
    for name, prompt in prompts.items():
        check(prompt, found[name].prompt, num_top=2)
    assert found["40"].reports >= 3
    assert found["none"].prompt == []
    assert found["none"].tokens == found["40"].tokens, "asking changes nothing"


@pytest.mark.parametrize("steps_ahead", [False, True])
def test_cached_prompts_are_computed_again(checkpoint, steps_ahead):
    engine = start(checkpoint, "full-and-piecewise", steps_ahead)
    prompt = prompt_of(30)
    ask(engine, "first", prompt)
    run(engine)
    ask(engine, "again", prompt, prompt_logprobs=0)
    again = run(engine)["again"]
    assert again.cached == 0
    check(prompt, again.prompt, num_top=0)
    ask(engine, "unasked", prompt, prompt_logprobs=None)
    assert run(engine)["unasked"].cached == 28


@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_a_prompt_preempted_between_two_chunks_is_told_once(
    checkpoint, steps_ahead, caching, monkeypatch
):
    """When a prompt is preempted between two chunks, tokens already reported may come from the
    cache afterwards, and tokens not reported yet are computed again; each is reported once."""
    scored: list[int] = []
    preempt = Scheduler._preempt

    def noted(scheduler: Scheduler, request: RequestState) -> None:
        scored.append(request.num_scored_tokens)
        preempt(scheduler, request)

    monkeypatch.setattr(Scheduler, "_preempt", noted)
    settings = {"num_kv_blocks": 34, "enable_prefix_caching": caching}
    engine = start(checkpoint, "full-and-piecewise", steps_ahead, **settings)
    for index in range(3):
        ask(engine, str(index), [index + 1] * 2, max_tokens=40, prompt_logprobs=None)
    engine.step()
    long = prompt_of(100)
    ask(engine, "long", long)
    found = run(engine)
    assert any(0 < number < len(long) - 1 for number in scored)
    check(long, found["long"].prompt, num_top=2)


@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_a_request_preempted_while_it_decodes_is_told_once(checkpoint, steps_ahead, caching):
    settings = {"num_kv_blocks": 24, "enable_prefix_caching": caching}
    engine = start(checkpoint, "full-and-piecewise", steps_ahead, **settings)
    prompts = {str(n): prompt_of(n, stem=n) for n in (20, 25, 30)}
    for name, prompt in prompts.items():
        ask(engine, name, prompt, max_tokens=30)
    found = run(engine)
    assert engine.stats().preemptions >= 2
    for name, prompt in prompts.items():
        check(prompt, found[name].prompt, num_top=2)
        assert len(found[name].tokens) == 30


@pytest.mark.parametrize("scored", [None, 1])
@pytest.mark.parametrize("steps_ahead", [False, True])
def test_no_token_at_all(checkpoint, steps_ahead, scored):
    """With max_tokens=0 a prompt may fill the whole context, and the request ends when its prefill
    does."""
    engine = start(checkpoint, "full-and-piecewise", steps_ahead)
    prompts = {str(n): prompt_of(n, stem=n) for n in (1, 17, 128)}
    for name, prompt in prompts.items():
        ask(engine, name, prompt, max_tokens=0, prompt_logprobs=scored)
    ask(engine, "other", prompt_of(9), max_tokens=20, prompt_logprobs=None)
    found = run(engine)
    for name, prompt in prompts.items():
        assert (found[name].tokens, found[name].reason) == ([], FinishReason.LENGTH)
        if scored is None:
            assert found[name].prompt == []
        else:
            check(prompt, found[name].prompt, num_top=1)
    assert len(found["other"].tokens) == 20

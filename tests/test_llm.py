"""`LLM`, the engine in process: what scripts rely on."""

from __future__ import annotations

import numpy as np
import pytest

from minisrv import LLM, SamplingParams
from minisrv.errors import ConfigError, ContextLengthError, EngineDeadError, RequestError
from minisrv.request import FinishReason
from tests.checkpoints import make_checkpoint

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128}
LIMITS["dtype"] = "float32"  # half precision rounds differently in another batch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def llm(checkpoint) -> LLM:
    return LLM(checkpoint, **LIMITS)


def greedy(**given) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **given})


def test_answers_come_in_the_order_of_the_prompts(llm):
    prompts = [[i + 3] * (i + 1) for i in range(11)]
    together = llm.generate(prompts, greedy())
    assert [output.prompt_token_ids for output in together] == prompts
    for prompt, output in zip(prompts, together, strict=True):
        [alone] = llm.generate(prompt, greedy())
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_one_prompt_may_stand_alone(llm):
    ids = llm._tokenizer.encode("hello")
    answers = [
        llm.generate(prompt, greedy())[0].outputs[0].text
        for prompt in ("hello", ["hello"], ids, tuple(ids), [ids], np.array(ids))
    ]
    assert len(set(answers)) == 1
    assert llm.generate([], greedy()) == []


def test_each_prompt_may_have_its_own_parameters(llm):
    outputs = llm.generate([[5], [6]], [greedy(max_tokens=2), greedy(max_tokens=5)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate([[5], [6]], [greedy()])


@pytest.mark.parametrize("one", [True, False])
def test_a_stop_string_cuts_the_text_and_keeps_the_provenance(llm, one):
    whole = llm.generate([[9, 9]], greedy(max_tokens=30))[0].outputs[0]
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 2]
    cut = llm.generate([[9, 9]], greedy(max_tokens=30, stop=stop if one else (stop,)))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert sum(cut.graph_steps.values()) == len(cut.token_ids) < len(whole.token_ids)
    assert sum(whole.graph_steps.values()) == 30
    assert not llm.engine.has_work


def test_what_is_asked_of_a_stop_string(llm):
    whole = llm.generate([[9, 9]], greedy(max_tokens=30))[0].outputs[0]
    stop = whole.text[4:6]
    end = whole.text.index(stop) + 2

    def text(**given) -> str:
        return llm.generate([[9, 9]], greedy(max_tokens=30, stop=stop, **given))[0].outputs[0].text

    assert text(include_stop_str_in_output=True) == whole.text[:end]
    assert text(min_tokens=30) == whole.text


def test_a_prompt_can_be_scored_by_itself(llm):
    [output] = llm.generate([[4, 5, 6]], greedy(max_tokens=0, prompt_logprobs=1))
    assert output.prompt_logprobs[0] is None
    assert [entry.token_id for entry in output.prompt_logprobs[1:]] == [5, 6]
    assert output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason is FinishReason.LENGTH
    assert llm.generate([[4, 5, 6]], greedy())[0].prompt_logprobs is None


def test_logprobs_are_those_of_the_chosen_tokens(llm):
    completion = llm.generate([[4]], greedy(logprobs=3))[0].outputs[0]
    assert [entry.token_id for entry in completion.logprobs] == completion.token_ids
    for entry in completion.logprobs:
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert len(entry.top) == 3
    assert llm.generate([[4]], greedy())[0].outputs[0].logprobs is None
    plain = llm.generate([[4]], greedy(logprobs=0))[0].outputs[0]
    assert [entry.top for entry in plain.logprobs] == [[]] * 8


def test_chat_follows_the_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    [answer] = llm.chat(messages, greedy())
    assert answer.prompt_token_ids == llm._tokenizer.apply_chat_template(messages)
    assert len(llm.chat([messages, messages], greedy())) == 2


def test_a_bad_request_runs_none_of_its_batch(llm):
    before = llm.engine.stats().prompt_tokens
    for bad, error in (
        ([[]], RequestError),
        ([[10**6]], RequestError),
        ([[1] * 200], ContextLengthError),
    ):
        with pytest.raises(error):
            llm.generate([[1], *bad], greedy())
    with pytest.raises(TypeError):
        llm.generate([[1.5]], greedy())
    assert llm.engine.stats().prompt_tokens == before


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": True},
        {"top_p": 0},
        {"top_k": -2},
        {"top_k": 1.0},
        {"min_p": 1.1},
        {"seed": 2**63},
        {"stop": ("",)},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": list(range(65))},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
    ],
)
def test_parameters_out_of_bounds_are_named(field):
    [name] = field
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**field)
    assert caught.value.param == name


@pytest.mark.parametrize("part", ["start", "finish"])
@pytest.mark.parametrize("lag", [False, True])
def test_an_interrupted_step_ends_the_engine_and_does_not_hang(checkpoint, lag, part, monkeypatch):
    llm = LLM(checkpoint, enforce_eager=True, async_scheduling=lag, **LIMITS)
    launch, calls = getattr(llm.engine.runner, part), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return launch(*arguments)

    monkeypatch.setattr(llm.engine.runner, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], greedy())
    with pytest.raises(EngineDeadError, match="interrupted"):
        llm.generate([[1]], greedy())


def test_the_mode_may_be_given_as_text(checkpoint):
    llm = LLM(checkpoint, cudagraph_mode="FULL_DECODE_ONLY", **LIMITS)
    assert llm.engine.info.cudagraph_mode == "full-decode-only"
    with pytest.raises(ConfigError, match="full-and-piecewise"):
        LLM(checkpoint, cudagraph_mode="fast", **LIMITS)

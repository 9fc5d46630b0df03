"""Logit bias, min_tokens, penalties, allowed tokens and bad words give the tokens of a plain
reference, in every mode, with and without a step launched ahead, through preemptions, beside
requests that ask for none of them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from minisrv.config import EngineConfig
from minisrv.core.step import LogitsProcessorData, NewRequestData, ScheduledRow, SchedulerOutput
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.errors import RequestError
from minisrv.kernels.sampling import scores
from minisrv.modes import CUDAGraphMode
from minisrv.request import (
    EngineRequest,
    SamplingParams,
    StructuredOutput,
    StructuredOutputKind,
)
from minisrv.runner import logits_processors
from minisrv.runner.logits_processors import LogitsProcessors
from tests.checkpoints import EOS, VOCAB_SIZE, make_checkpoint, make_model

MODES = ("none", "piecewise", "full-decode-only", "full", "full-and-piecewise")
EPSILON = 1e-3
"""Scores that are closer than this may be put in either order by rounding."""

ASKED: list[dict[str, Any]] = [
    {},
    {"logit_bias": {7: 100.0}},
    {"logit_bias": {7: -100.0, 11: 3.5, 0: 2.0}, "temperature": 0.7, "seed": 3},
    {"min_tokens": 20, "logit_bias": {EOS: 100.0, 9: 90.0}, "stop_token_ids": (9,)},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5, "temperature": 1.0, "seed": 8},
    {"frequency_penalty": -2.0, "presence_penalty": -1.0},
    {"repetition_penalty": 1.8, "logprobs": 2},
    {"repetition_penalty": 0.5, "presence_penalty": 1.0, "temperature": 1.3, "top_k": 30},
    {"temperature": 0.8, "seed": 4, "logprobs": 0},
    {"allowed_token_ids": (3, 5, 8, 13, EOS), "temperature": 1.0, "seed": 5, "min_tokens": 24},
    {
        "allowed_token_ids": (3, 5, 8, 13),
        "bad_words_token_ids": ((3,), (5, 8), (8, 5, 5), (5, 5, 5, 5)),
        "temperature": 1.5,
        "seed": 6,
        "frequency_penalty": -0.5,
    },
    {"bad_words_token_ids": ((4, 7), (7, 4)), "logit_bias": {4: 60.0, 7: 60.0}, "logprobs": 1},
]


def processed(logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams):
    """Return one row of logits [vocab], changed token by token."""
    values = logits.tolist()
    for token, amount in params.logit_bias.items():
        values[token] += amount
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}:
            values[token] = -torch.inf
    for token in {*prompt, *output}:
        by = params.repetition_penalty
        values[token] = values[token] / by if values[token] > 0 else values[token] * by
    for token, times in Counter(output).items():
        values[token] -= params.frequency_penalty * times + params.presence_penalty
    for token in range(len(values)):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            values[token] = -torch.inf
        words = params.bad_words_token_ids
        if any(tuple([*output, token][-len(word) :]) == word for word in words):
            values[token] = -torch.inf
    return torch.tensor(values)


@torch.no_grad()
def check(model: PreTrainedModel, prompt: list[int], tokens: list[int], params: SamplingParams):
    """Check that every token is the one that the reference chooses behind the tokens before it."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
    for index, token in enumerate(tokens):
        values = processed(logits[index], prompt, tokens[:index], params)
        found = scores(
            values[None],
            torch.tensor([len(prompt) + index]),
            temperature=torch.tensor([params.temperature]),
            top_k=torch.tensor([params.top_k]),
            top_p=torch.tensor([params.top_p]),
            min_p=torch.tensor([params.min_p]),
            seed=torch.tensor([params.seed or 0]),
        )[0]
        assert found.max() - found[token] < EPSILON, f"token {index} of {params}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3"))


def requests() -> list[EngineRequest]:
    """Make requests that each ask for something else; prompts repeat tokens, and one is longer than
    a chunk."""
    found = []
    for index, asked in enumerate(ASKED):
        prompt = [(5 * i * i + index) % 40 for i in range((3, 9, 25)[index % 3])]
        greedy = {"temperature": 0.0, "max_tokens": 28, "seed": 1}
        params = SamplingParams(**{**greedy, **asked})
        found.append(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    return found


@pytest.mark.parametrize("steps_ahead", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_lag_gives_the_reference_s_tokens(
    checkpoint, mode, steps_ahead, tape_holds_mixed_batches, monkeypatch
):
    monkeypatch.setattr(logits_processors, "LOGITS_AT_ONCE", 2 * VOCAB_SIZE)
    config = EngineConfig(
        model=checkpoint,
        device="cpu",
        dtype="float32",
        cudagraph_mode=CUDAGraphMode(mode),
        async_scheduling=steps_ahead,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        max_model_len=64,
        block_size=4,
        num_kv_blocks=40,
    )
    engine = EngineCore(build_engine(config, check_addresses=True))
    tokens: dict[str, list[int]] = {}
    for request in requests():
        engine.add(request)
        for _ in range(2):
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
    ran: dict[str, dict[str, int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.graph_steps is not None:
                ran[output.request_id] = output.graph_steps
    assert engine.stats().preemptions >= 2
    model = make_model("qwen3")
    for request in requests():
        check(model, request.prompt_token_ids, tokens[request.request_id], request.params)
    assert tokens["1"] == [7] * 28
    assert EOS in tokens["3"] or 9 in tokens["3"]
    assert len(tokens["3"]) == 21, "the first that may end it does"
    assert set(tokens["11"]) == {5, 8, 13}
    assert {(4, 7), (7, 4)}.isdisjoint(pairwise(tokens["12"]))
    if mode.startswith("full"):
        decodes = ("FULL/pure_decode", "FULL/size_missing")
        assert all(sum(steps.get(name, 0) for name in decodes) > 5 for steps in ran.values())
    assert len(engine.runner.processors.counts) <= 8, "a row for each that asked at once"


def row(req_index: int, *, samples: bool = True) -> ScheduledRow:
    return ScheduledRow(
        str(req_index), req_index, 0, 1, [], True, samples, None, has_logits_processors=True
    )


def test_tables_grow_and_rows_are_used_again():
    """Request indices are used in turn, first in, first out; a row of the tables that is free again
    is used before a new one is made."""
    processors = LogitsProcessors(VOCAB_SIZE, torch.device("cpu"))
    params = SamplingParams(frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    freed: list[int] = []
    for req_index in range(1, 9):
        start = NewRequestData(
            req_index, params, 0, LogitsProcessorData([1], [4, 4, req_index + 10], frozenset())
        )
        step = SchedulerOutput(
            req_index, req_index, [row(req_index)], [start], [], 1, 1, freed_req_indices=freed
        )
        processors.update_requests(step)
        processors.count_sampled_tokens(step, torch.tensor([5]))
        found = processors.apply(step, logits, torch.tensor([9]))
        expected = torch.zeros(VOCAB_SIZE)
        expected[4], expected[5], expected[req_index + 10] = -2, -1, -1
        assert torch.equal(found[0], expected)
        freed = [req_index]
    assert len(processors.counts) == 1
    assert not logits.any(), "log-probabilities are of the logits as they were"
    unfinished = SchedulerOutput(9, 9, [row(8, samples=False)], [], [], 0, 1)
    assert processors.apply(unfinished, logits, torch.tensor([9])) is logits


@given(
    history=st.lists(st.integers(0, 3), max_size=12),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), max_size=6),
    allowed=st.sets(st.integers(0, 3)),
    resumed=st.integers(0, 12),
)
def test_forbidden_tokens_are_those_of_a_plain_search(history, words, allowed, resumed):
    """With four tokens, a request that starts, or resumes behind some of its tokens, has after each
    further token the tokens forbidden that a search through its output finds, beside a request
    whose words are longer or shorter."""
    size = 4
    processors = LogitsProcessors(size, torch.device("cpu"))
    params = SamplingParams(
        allowed_token_ids=tuple(allowed), bad_words_token_ids=tuple(words), repetition_penalty=1.2
    )
    other = SamplingParams(bad_words_token_ids=((1, 1, 1, 1, 1, 1),))
    start = min(resumed, len(history))
    rows = [row(1), row(2)]
    new = [
        NewRequestData(1, params, 0, LogitsProcessorData([2], history[:start], frozenset())),
        NewRequestData(2, other, 0, LogitsProcessorData([2], [1, 1, 1], frozenset())),
    ]
    logits, positions = torch.randn(2, size), torch.tensor([1, 4], dtype=torch.int32)
    for number, known in enumerate(range(start, len(history) + 1)):
        step = SchedulerOutput(number, 0, rows, [] if number else new, [], 2, 2)
        processors.update_requests(step)
        found = processors.apply(step, logits, positions + number)
        expected = processed(logits[0], [2], history[:known], params)
        torch.testing.assert_close(found[0], expected)
        assert torch.isneginf(found[1]).tolist() == [False, number >= 2, False, False]
        sampled = history[known] if known < len(history) else 0
        processors.count_sampled_tokens(step, torch.tensor([sampled, 1]))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("allowed_token_ids", [[-1], ["1"], [True], 5, range(2), [0] * 4097]),
        ("bad_words", ["x", [""], ["  "], [1], ["x" * 65], ["x"] * 129]),
        ("min_tokens", [-1, 17, 1.0, True]),
        ("presence_penalty", [-2.1, 2.1, "1", float("nan")]),
        ("frequency_penalty", [-2.1, 2.1, None]),
        ("repetition_penalty", [0, 0.001, 101, float("inf")]),
        ("logit_bias", [{-1: 1}, {"1": 1}, {1: 101}, {1: "x"}, dict.fromkeys(range(301), 1)]),
    ],
)
def test_bounds(field, values):
    for value in values:
        with pytest.raises(RequestError) as raised:
            SamplingParams(**{field: value})
        assert str(raised.value.param).split(".")[0] == field


FORM = StructuredOutput(kind=StructuredOutputKind.JSON_OBJECT)


@pytest.mark.parametrize(
    ("asked", "param", "form"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias", None),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", None),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids", None),
        ({"allowed_token_ids": [3, 4], "bad_words_token_ids": ((3,), (5, 4))}, "bad_words", None),
        ({"bad_words_token_ids": tuple((i,) for i in range(VOCAB_SIZE))}, "bad_words", None),
        ({"allowed_token_ids": [3]}, "allowed_token_ids", FORM),
        ({"bad_words_token_ids": ((3,),)}, "bad_words", FORM),
    ],
)
def test_requests_that_no_token_may_suit(checkpoint, asked, param, form):
    engine = EngineCore(
        build_engine(
            EngineConfig(model=checkpoint, device="cpu", enforce_eager=True, max_num_seqs=2)
        )
    )
    with pytest.raises(RequestError) as raised:
        engine.check(
            EngineRequest(
                request_id="a",
                prompt_token_ids=[1],
                params=SamplingParams(**asked),
                structured_output=form,
            )
        )
    assert raised.value.param == param

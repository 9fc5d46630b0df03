"""The engine's outputs of one request become deltas, of which the last has the finish reason."""

from __future__ import annotations

from typing import Any

import pytest

from minisrv.errors import RequestError
from minisrv.request import EngineOutput, FinishReason, RequestFailure, TokenLogprobs
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.output_processor import CompletionDelta, OutputProcessor
from minisrv.text.tokenizer import Tokenizer

STEPS = {"FULL/pure_decode": 3}


def one(token_id: int, **others: Any) -> EngineOutput:
    return EngineOutput("a", [token_id], **others)


def make(tokenizer: Tokenizer, stop: tuple[str, ...] = (), **options: Any) -> OutputProcessor:
    return OutputProcessor(Detokenizer(tokenizer, stop), **options)


def test_the_last_delta_has_the_finish_reason(tokenizer: Tokenizer) -> None:
    processor = make(tokenizer, index=3)
    first = processor.process(one(tokenizer.encode("a")[0], num_cached_tokens=2))
    assert first == CompletionDelta(
        3, "a", tokenizer.encode("a"), None, 2, prompt_logprobs=[], text_offsets=[]
    )
    assert not processor.finished
    last = processor.process(one(tokenizer.encode("b")[0], finish_reason=FinishReason.LENGTH))
    assert last is not None
    assert (last.text, last.finish_reason, last.stop_reason) == ("b", FinishReason.LENGTH, None)
    assert processor.finished
    assert not processor.must_abort


def test_prompt_logprobs_are_kept_for_the_first_delta(tokenizer: Tokenizer) -> None:
    scored = [TokenLogprobs(token_id, -1.0, [], 1) for token_id in (5, 6, 7)]
    processor = make(tokenizer)
    assert processor.process(EngineOutput("a", prompt_logprobs=scored[:2])) is None
    last = EngineOutput("a", prompt_logprobs=scored[2:], finish_reason=FinishReason.LENGTH)
    delta = processor.process(last)
    assert delta is not None
    assert delta.prompt_logprobs == scored
    assert (delta.text, delta.token_ids) == ("", [])


@pytest.mark.parametrize("listed", [False, True])
def test_a_stop_token_has_no_text_and_is_reported_if_the_request_lists_it(
    tokenizer: Tokenizer, listed: bool
) -> None:
    processor = make(tokenizer, stop_token_ids=[tokenizer.encode("b")[0]] if listed else [])
    delta = processor.process(one(tokenizer.encode("b")[0], finish_reason=FinishReason.STOP))
    assert delta is not None
    assert (delta.text, delta.token_ids) == ("", tokenizer.encode("b"))
    assert delta.stop_reason == (tokenizer.encode("b")[0] if listed else None)


def test_a_stop_string_ends_the_completion_at_once(tokenizer: Tokenizer) -> None:
    """Without the counts of steps nothing is awaited, and late outputs add nothing."""
    processor = make(tokenizer, ("b",))
    assert processor.process(one(tokenizer.encode("a")[0])) is not None
    delta = processor.process(one(tokenizer.encode("b")[0]))
    assert delta is not None
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", FinishReason.STOP, "b")
    assert processor.finished
    assert processor.must_abort
    assert processor.process(one(tokenizer.encode("c")[0])) is None


def test_the_counts_of_steps_come_with_the_answer_to_the_abort(tokenizer: Tokenizer) -> None:
    processor = make(tokenizer, ("b",), include_graph_steps=True)
    assert processor.process(one(tokenizer.encode("b")[0])) is None
    assert processor.must_abort
    assert not processor.finished
    assert processor.process(one(tokenizer.encode("c")[0])) is None, "the abort is on its way"
    answer = EngineOutput("a", finish_reason=FinishReason.ABORT, graph_steps=STEPS)
    delta = processor.process(answer)
    assert delta is not None
    assert (delta.token_ids, delta.finish_reason) == (tokenizer.encode("b"), FinishReason.STOP)
    assert (delta.stop_reason, delta.graph_steps) == ("b", STEPS)
    assert processor.finished
    assert not processor.must_abort


def test_a_stop_string_in_the_last_output_needs_no_abort(tokenizer: Tokenizer) -> None:
    processor = make(tokenizer, ("b",), include_graph_steps=True)
    last = one(tokenizer.encode("b")[0], finish_reason=FinishReason.LENGTH, graph_steps=STEPS)
    delta = processor.process(last)
    assert delta is not None
    assert (delta.finish_reason, delta.graph_steps) == (FinishReason.STOP, STEPS)
    assert processor.finished
    assert not processor.must_abort


def test_the_error_that_ended_the_request_is_raised(tokenizer: Tokenizer) -> None:
    failure = RequestFailure.of(RequestError("no", param="seed"))
    with pytest.raises(RequestError, match="no") as raised:
        make(tokenizer).process(EngineOutput("a", error=failure))
    assert raised.value.param == "seed"

"""Requests that a model can never serve are refused. The error names the field and what is
allowed."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from minisrv.errors import ContextLengthError, RequestError
from minisrv.validation import validate_request

START = "This model's maximum context length is 64 tokens. However, "


def validate(prompt: Collection[int], max_tokens: int | None = 1, **others: Any) -> None:
    limits = {"max_model_len": 64, "vocab_size": 100}
    ids: dict[str, Any] = {"stop_token_ids": (), "logit_bias": {}, "allowed_token_ids": ()}
    named = SimpleNamespace(**{name: others.pop(name, none) for name, none in ids.items()})
    validate_request(prompt, named, max_tokens=max_tokens, **limits, **others)


@pytest.mark.parametrize(
    ("length", "max_tokens"), [(1, 1), (63, 1), (63, None), (64, 0), (10, 54), (1, 0)]
)
def test_what_just_fits_is_valid(length: int, max_tokens: int | None) -> None:
    validate([99] * length, max_tokens, stop_token_ids=(0, 99), logit_bias={0: 1.0, 99: -1.0})


@pytest.mark.parametrize(
    ("length", "max_tokens", "words"),
    [
        (64, None, "your prompt resulted in 64 tokens, and a completion needs at least one more."),
        (64, 1, "your prompt resulted in 64 tokens"),
        (65, 0, "your prompt resulted in 65 tokens"),
        (70, 5, "your prompt resulted in 70 tokens"),
        (10, 60, "you requested 70 tokens (10 in the prompt, 60 in the completion)."),
    ],
)
def test_prompt_and_completion_fit_into_the_context(
    length: int, max_tokens: int | None, words: str
) -> None:
    with pytest.raises(ContextLengthError) as raised:
        validate([1] * length, max_tokens)
    assert raised.value.message.startswith(START + words)
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("bad", [-1, 100, 2**70])
@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "logit_bias", "allowed_token_ids"])
def test_every_token_id_is_in_the_vocabulary(field: str, bad: int) -> None:
    ids: dict[str, Any] = {
        "prompt": [1],
        "stop_token_ids": (),
        "logit_bias": {},
        field: {1: 0.5, bad: 0.5},
    }
    words = f"{field} holds the token id {bad}; .* 0 to 99"
    with pytest.raises(RequestError, match=words) as raised:
        validate(**ids)
    assert raised.value.param == field


def test_an_empty_prompt_is_refused_and_the_field_of_the_prompt_is_named() -> None:
    with pytest.raises(RequestError, match="The messages came out empty") as raised:
        validate([], prompt_param="messages")
    assert raised.value.param == "messages"
    with pytest.raises(ContextLengthError, match="your messages resulted in 64") as raised:
        validate([1] * 64, prompt_param="messages")
    assert raised.value.param == "messages"

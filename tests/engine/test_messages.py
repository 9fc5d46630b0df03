"""The messages between API workers and the engine: the choices of one prompt share it."""

from __future__ import annotations

from itertools import product

from minisrv.engine.messages import Submit, decode_worker_message, encode
from minisrv.request import EngineRequest, SamplingParams

PROMPTS = ([1, 2], [1, 2], [3])
"""Two of them are equal, and belong to different responses."""


def request(number: int, prompt: list[int]) -> EngineRequest:
    return EngineRequest(
        request_id=f"r-{number}", prompt_token_ids=prompt, params=SamplingParams(max_tokens=1)
    )


def received(submit: Submit) -> list[EngineRequest]:
    message = decode_worker_message(encode(submit))
    assert isinstance(message, Submit)
    return list(message.with_prompts())


def test_all_requests_arrive_with_their_prompts() -> None:
    """Whichever requests follow one another, and share a prompt or have an equal one."""
    for length in range(5):
        for prompts in product(PROMPTS, repeat=length):
            requests = [request(number, prompt) for number, prompt in enumerate(prompts)]
            assert received(Submit.of(requests, [])) == requests


def test_a_prompt_is_sent_once_for_all_its_choices() -> None:
    """128 choices of a long prompt took 128 times its bytes in the message, which the engine reads
    between two steps, and as many lists in its memory."""
    prompt = [*range(100_000)]
    one, all_choices = (len(encode(Submit.of([request(0, prompt)] * n, []))) for n in (1, 128))
    assert all_choices < 1.5 * one
    first, *rest = received(Submit.of([request(number, prompt) for number in range(128)], []))
    assert all(each.prompt_token_ids is first.prompt_token_ids for each in rest)


def test_an_empty_prompt_stays_empty() -> None:
    """The engine refuses it, as it does a request whose prompt nobody has sent."""
    assert received(Submit.of([request(0, [])], [])) == [request(0, [])]

"""Servers in other modes give the same answers over HTTP as a server with the default modes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.server import CHAT, COMPLETIONS, Server, by_mode

QUESTIONS = (
    "What is 12 + 7?",
    "Reverse this word: lantern",
    "Sort these numbers: 9 2 5",
    "How many words are in this: a small red house by the sea",
    "Tell me about the weather. " * 12,
    "Hi",
)


def chats(server: Server) -> list[dict[str, Any]]:
    """The answers to all questions, asked at once so that their prefills and decodes mix."""
    bodies = (
        {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 40,
            "include_graph_steps": True,
        }
        for question in QUESTIONS
    )
    answers = [future.result().json()["choices"][0] for future in server.post_all(CHAT, bodies)]
    assert any(len(answer["message"]["content"]) > 10 for answer in answers)
    return answers


def told(answers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The text and the finish reason of each answer."""
    return [(answer["message"]["content"], answer["finish_reason"]) for answer in answers]


def test_eager(server: Server, eager_server: Server) -> None:
    graphs, eager = chats(server), chats(eager_server)
    assert told(eager) == told(graphs)
    assert {key for answer in eager for key in answer["graph_steps"]} == {"NONE/graphs_off"}
    assert {mode for answer in graphs for mode in by_mode(answer["graph_steps"])} == {
        "FULL",
        "PIECEWISE",
    }


def test_async_scheduling(server: Server, async_server: Server) -> None:
    assert told(chats(async_server)) == told(chats(server))


@pytest.mark.parametrize("stop", [None, "e"])
def test_async_scheduling_sampled(server: Server, async_server: Server, stop: str | None) -> None:
    """With asynchronous scheduling the engine sees a stop string or stop token one step late;
    nothing of the additional step may show."""
    bodies = [
        {
            "prompt": f"Story number {i}",
            "seed": i,
            "temperature": 0.8,
            "max_tokens": 12 + i,
            "stop": stop,
            "return_token_ids": True,
            "logprobs": i % 2 or None,
        }
        for i in range(12)
    ]
    answers = [
        [future.result().json() for future in which.post_all(COMPLETIONS, bodies)]
        for which in (server, async_server)
    ]
    for one, other in zip(*answers, strict=True):
        assert one["choices"][0]["token_ids"] == other["choices"][0]["token_ids"]
        assert one["choices"][0]["text"] == other["choices"][0]["text"]
        assert one["usage"] == other["usage"]

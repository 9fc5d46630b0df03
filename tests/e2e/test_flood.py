"""Many more requests than places: each is answered correctly or refused at once, and nothing
hangs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.server import CHAT, COMPLETIONS, Server, events_of

RUNNING, WAITING = 2, 4


def body(index: int) -> tuple[str, dict[str, Any]]:
    """A path and a body: routes and forms of answer take turns, and no two bodies are equal."""
    fields: dict[str, Any] = {"seed": index, "max_tokens": 20 + index % 30, "ignore_eos": True}
    fields |= {"stream": index % 4 > 1, "return_token_ids": True}
    if index % 2:
        return CHAT, {"messages": [{"role": "user", "content": f"Say {index}."}], **fields}
    return COMPLETIONS, {"prompt": [5 + index] * (1 + index % 90), **fields}


def tokens(response: httpx.Response) -> list[int]:
    """The token ids of an answer, streamed or not."""
    if response.headers["content-type"].startswith("text/event-stream"):
        events = events_of(response.text)
        return [i for event in events for i in event["choices"][0]["token_ids"] or ()]
    return list(response.json()["choices"][0]["token_ids"])


def test_two_hundred_at_once(start: Callable[..., Server], tiny: Path) -> None:
    """Each accepted request gets the tokens that it gets alone, and each other one a 429."""
    flags = ("--max-num-seqs", str(RUNNING), "--max-waiting", str(WAITING))
    server = start(
        str(tiny), *flags, "--max-num-batched-tokens", "64", "--dtype", "float32"
    ).wait_ready()
    bodies = [body(index) for index in range(200)]
    futures = [server.post_all(path, [fields])[0] for path, fields in bodies]
    answers = [future.result(60) for future in futures]
    counts = Counter(answer.status_code for answer in answers)
    print(dict(counts))
    assert set(counts) == {200, 429}
    assert counts[200] >= RUNNING + WAITING
    for answer, (path, fields) in zip(answers, bodies, strict=True):
        if answer.status_code == 200:
            assert tokens(answer) == tokens(server.post(path, **fields))
        else:
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert server.metrics()['request_failure_total{status="429"}'] == counts[429]

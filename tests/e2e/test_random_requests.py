"""Random requests, valid and not, beside a stream whose tokens stay the same: each gets an answer
that is allowed, none is lost, and memory does not grow.

Memory is compared only after a step of every size has run. On a CPU oneDNN keeps what it has
compiled for a product of each size, and torch keeps it once more (ONEDNN_PRIMITIVE_CACHE_CAPACITY,
LRU_CACHE_CAPACITY: 1024 products each, some hundred KiB a product). Graphs have few sizes and run
them at the start; eager steps meet theirs over thousands of requests. A second step of a size adds
nothing, so memory that grows after a step of each size is a leak.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.server import CHAT, COMPLETIONS, Server, events_of, until
from tests.e2e.test_malformed import FIELDS

STREAMS = 8
STEP_TOKENS = 64
"""Maximum number of tokens of a step: the servers' --max-num-batched-tokens."""

WARM_UP = 400
"""Number of requests after which an engine has all the memory that it needs; what it takes later
would be a leak."""
GROWTH_MIB = 48

VALID: dict[str, list[Any]] = {
    "n": [1, 2, 3],
    "max_tokens": [1, 3, 8, 20],
    "min_tokens": [0, 2],
    "temperature": [0, 0.7, 1, 2],
    "top_p": [0.1, 0.9, 1],
    "top_k": [-1, 0, 1, 20],
    "min_p": [0, 0.1],
    "seed": [0, 7, -1, 2**63 - 1],
    "stop": ["a", ["e", "the"]],
    "stop_token_ids": [[], [5, 6]],
    "logit_bias": [{}, {"5": 4, "6": -100}],
    "presence_penalty": [0.5, -1],
    "frequency_penalty": [0.5],
    "repetition_penalty": [1.2],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True],
    "stream": [True, True, False],
    "return_token_ids": [True],
    "include_graph_steps": [True],
    "priority": [-1, 0, 5],
    "cache_salt": ["a", "b"],
    "user": ["x"],
}
OF_PATH: dict[str, dict[str, list[Any]]] = {
    COMPLETIONS: {
        "prompt": ["x", "The sea", ["a", "b c"], [5, 6, 7], [[5] * 40, [6]], [7] * 150],
        "logprobs": [0, 3],
        "echo": [True],
    },
    CHAT: {
        "messages": [
            [{"role": "user", "content": "hi"}],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a " * 40}],
        ],
        "logprobs": [True],
        "max_completion_tokens": [2, 9],
    },
}
FORMS = [
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"structured_outputs": {"regex": "[ab]{1,4}"}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"json": {"type": "integer"}}},
]


MESSAGES = "/v1/messages"
OF_MESSAGES: dict[str, list[Any]] = {
    "messages": [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "a " * 40}]}] * 2,
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": []},
            {"role": "user", "content": "ho"},
        ],
    ],
    "max_tokens": [1, 3, 8, 20, 10**6],
    "system": ["Be brief.", [{"type": "text", "text": "Be brief."}]],
    "temperature": [0, 0.7, 1],
    "top_p": [0.1, 1],
    "top_k": [0, 20],
    "stop_sequences": [[], ["e", "the"]],
    "stream": [True, True, False],
    "thinking": [{"type": "adaptive"}, {"type": "disabled"}],
    "output_config": [{"format": {"type": "json_schema", "schema": {"type": "integer"}}}],
    "metadata": [{"user_id": "x"}],
}
WRONG_MESSAGES: dict[str, list[Any]] = {
    "messages": [[], "hi", [{"role": "assistant", "content": "It is"}], [{"role": "user"}]],
    "max_tokens": [0, -1, 2**31, 1e999],
    "system": [3, [{"type": "image"}]],
    "stop_sequences": ["e", [""], ["x"] * 17],
    "thinking": [{"type": "enabled", "budget_tokens": 1024}, {"type": "sometimes"}],
    "output_config": [{"effort": "low"}, {"format": {"type": "json_schema", "schema": 3}}],
    "tools": [[{"name": "f"}], [{"name": "f", "input_schema": {}}] * 2],
    "tool_choice": [{"type": "any"}],
    "n": [2],
}


RESPONSES = "/v1/responses"
OF_RESPONSES: dict[str, list[Any]] = {
    "input": [
        "hi",
        [{"role": "user", "content": [{"type": "input_text", "text": "a " * 40}]}] * 2,
        [
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "summary": [], "content": []},
            {"type": "message", "role": "assistant", "content": []},
            {"role": "user", "content": "ho"},
        ],
    ],
    "max_output_tokens": [1, 3, 8, 20, 10**6],
    "instructions": ["Be brief."],
    "temperature": [0, 0.7, 1],
    "top_p": [0.1, 1],
    "include": [[], ["message.output_text.logprobs"]],
    "store": [True, False],
    "stream": [True, True, False],
    "text": [{"format": {"type": "json_schema", "name": "n", "schema": {"type": "integer"}}}],
    "reasoning": [{"effort": "none"}, {"summary": "auto"}],
    "metadata": [{"a": "x"}],
}
WRONG_RESPONSES: dict[str, list[Any]] = {
    "input": [[], 3, [{"role": "user"}], [{"type": "item_reference", "id": "msg_1"}]],
    "max_output_tokens": [0, -1, 2**31, 1e999],
    "previous_response_id": ["resp_1", ""],
    "include": [["what"]],
    "top_logprobs": [3, 21],
    "text": [{"format": {"type": "json_schema"}}, {"format": {"type": "xml"}}],
    "reasoning": [{"effort": "high"}, {"effort": "much"}],
    "tools": [[{"type": "web_search"}], [{"type": "function", "name": "f"}] * 2],
    "tool_choice": ["required", {"type": "function", "name": "f"}],
    "background": [True],
    "n": [2],
}


def random_body(
    rng: random.Random,
    needed: set[str],
    valid: dict[str, list[Any]],
    wrong: dict[str, list[Any]],
) -> dict[str, Any]:
    """A body of valid fields; about every third has something wrong."""
    names = {*needed, *rng.sample(list(valid), rng.randrange(6))}
    body = {name: rng.choice(valid[name]) for name in sorted(names)}
    if rng.random() < 0.35:
        name = rng.choice(list(wrong))
        body[name] = rng.choice([*wrong[name], {"a": 1}, [None], "what"])
    return body


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body; about every third body has something wrong."""
    kind = rng.random()
    if kind < 0.2:
        return MESSAGES, random_body(rng, {"messages", "max_tokens"}, OF_MESSAGES, WRONG_MESSAGES)
    if kind < 0.4:
        return RESPONSES, random_body(rng, {"input"}, OF_RESPONSES, WRONG_RESPONSES)
    path = rng.choice((COMPLETIONS, COMPLETIONS, CHAT))
    known = VALID | OF_PATH[path]
    names = rng.sample(list(VALID), rng.randrange(6)) + list(OF_PATH[path])[:1]
    body = {name: rng.choice(known[name]) for name in names}
    if rng.random() < 0.2:
        body[name] = rng.choice(known[(name := rng.choice(list(OF_PATH[path])))])
    if rng.random() < 0.1:
        body |= rng.choice(FORMS)
    if rng.random() < 0.35:
        name = rng.choice(list(FIELDS))
        values = FIELDS[name][1] or [[1]]
        body[name] = rng.choice([*values, {"a": 1}, [None], "what"])
    return path, body


def check_message(answer: httpx.Response) -> str:
    """The kind of answer that a request for a message got; see `check`."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.status_code == 200
        data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        first, *_, last = map(json.loads, data)
        assert first["type"] == "message_start"
        if last["type"] == "error":
            assert last["error"]["type"] != "api_error", last
            return "error event of messages"
        assert last["type"] == "message_stop"
        assert json.loads(data[-2])["delta"]["stop_reason"]
        return "stream of messages"
    body = answer.json()
    if answer.status_code == 200:
        assert body["stop_reason"]
        return "message"
    assert answer.status_code in (400, 404, 429), answer.text
    assert set(body) == {"type", "error", "request_id"}
    return f"{answer.status_code} of messages"


def check_response(answer: httpx.Response) -> str:
    """The kind of answer that a request for a response got; see `check`."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.status_code == 200
        data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        found = list(map(json.loads, data))
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert [event["type"] for event in found[:2]] == [
            "response.created",
            "response.in_progress",
        ]
        if found[-1]["type"] == "response.failed":
            assert found[-2]["error"]["code"] != "internal_error", found[-2]
            return "error event of responses"
        assert found[-1]["type"] in ("response.completed", "response.incomplete")
        return "stream of responses"
    body = answer.json()
    if answer.status_code == 200:
        assert body["status"] in ("completed", "incomplete")
        return "response"
    assert answer.status_code in (400, 404, 429), answer.text
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return f"{answer.status_code} of responses"


def check(answer: httpx.Response) -> str:
    """The kind of answer that a request got. Raises AssertionError for an answer that is never
    right."""
    if answer.url.path == RESPONSES:
        return check_response(answer)
    if answer.url.path == MESSAGES:
        return check_message(answer)
    kind = answer.headers["content-type"].partition(";")[0]
    if kind == "text/event-stream":
        assert answer.status_code == 200
        events = events_of(answer.text)
        errors = [event["error"] for event in events if "error" in event]
        assert all(error["code"] != "internal_error" for error in errors), errors
        reasons = [c["finish_reason"] for e in events for c in e.get("choices", ())]
        assert errors or any(reasons)
        return "error event" if errors else "stream"
    body = answer.json()
    if answer.status_code == 200:
        assert all(choice["finish_reason"] for choice in body["choices"])
        return "answer"
    assert answer.status_code in (400, 404, 429), answer.text
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return str(answer.status_code)


def memory_mib(server: Server) -> int:
    """The anonymous resident memory of all processes of the server, in MiB."""
    status = (Path(f"/proc/{pid}/status").read_text() for pid in server.group())
    return sum(int(re.search(r"RssAnon:\s+(\d+)", text)[1]) for text in status) >> 10


class Canary:
    """Sends the same greedy request again and again on a thread of its own and keeps the tokens of
    each answer."""

    def __init__(self, server: Server) -> None:
        self.answers: list[list[int]] = []
        self._server = server
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _ask(self) -> list[int]:
        fields = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
        body = {"prompt": [[5, 6, 7]], "return_token_ids": True, "priority": -9, **fields}
        events = events_of(self._server.post(COMPLETIONS, **body).text)
        return [i for event in events for i in event["choices"][0]["token_ids"]]

    def _run(self) -> None:
        while not self._end.is_set():
            self.answers.append(self._ask())

    def __enter__(self) -> Canary:
        self.answers.append(self._ask())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def step_every_size(server: Server) -> None:
    """Send a prompt of each size alone, each prefilled in one step that computes the logits of all
    its tokens."""
    for size in range(1, STEP_TOKENS + 1):
        fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "cache_salt": f"size {size}"}
        assert server.post(COMPLETIONS, prompt=[5] * size, **fields).status_code == 200


def send(server: Server, count: int) -> dict[str, Any]:
    """Send `count` random requests, several at a time, and return the measurements. Raises
    AssertionError if anything goes wrong.

    The canary's tokens can be compared because the server runs in float32, in which another batch
    size rounds nothing so differently that a token changes.
    """
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    memory: list[int] = []

    def one(seed: int) -> None:
        path, body = random_request(random.Random(seed))
        content = json.dumps(body)
        headers = {"content-type": "application/json"}
        try:
            answer = http.post(server.url + path, content=content, headers=headers)
            outcome = check(answer)
        except Exception as error:
            raise AssertionError(f"{path} {content[:500]}: {error!r}") from error
        with lock:
            outcomes[outcome] += 1

    if count > WARM_UP:  # else no growth is measured
        step_every_size(server)
    limits = httpx.Limits(max_connections=STREAMS)
    with (
        httpx.Client(timeout=120, trust_env=False, limits=limits) as http,
        Canary(server) as canary,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        list(pool.map(one, range(min(WARM_UP, count))))
        memory.append(memory_mib(server))
        list(pool.map(one, range(min(WARM_UP, count), count)))
        memory.append(memory_mib(server))
    until(lambda: server.metrics()["kv_cache_usage_perc"] == 0, "all blocks are back")
    assert outcomes.total() == count
    assert len(canary.answers) > 2
    assert all(answer == canary.answers[0] for answer in canary.answers), canary.answers
    assert memory[1] - memory[0] < GROWTH_MIB, memory
    return {
        "outcomes": dict(outcomes),
        "canary_streams": len(canary.answers),
        "memory_mib": memory,
    }


def test_hundreds(server: Server) -> None:
    found = send(server, 200)
    print(found)
    kinds = {"stream", "answer", "400", "stream of messages", "message", "400 of messages"}
    kinds |= {"stream of responses", "response", "400 of responses"}
    assert found["outcomes"].keys() >= kinds

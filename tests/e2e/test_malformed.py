"""Hundreds of malformed requests, each of which must get the one right answer, beside a good stream
that must not be affected."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from minisrv.server.unsupported import CHAT_ONLY, COMPLETION_ONLY, EVERYWHERE
from tests.e2e.server import CHAT, COMPLETIONS, Server, events_of, read_all, request_bytes

USER = {"role": "user", "content": "hi"}
GOOD: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "hi"}, CHAT: {"messages": [USER]}}
CLOSE = "connection: close"

ANYTHING = {"null": None, "bool": True, "int": 1, "float": 1.5, "str": "x", "list": [], "dict": {}}
"""A value of every JSON type, by the name of the type."""

FIELDS: dict[str, tuple[set[str], list[Any]]] = {
    "model": ({"str"}, ["x" * 513]),
    "n": ({"int"}, [0, -1, 129, 2**31]),
    "max_tokens": ({"int"}, [0, -1, 2**31, 10**30, 1e999]),
    "min_tokens": ({"int"}, [-1, 513, 2**31]),
    "logit_bias": ({"dict"}, [{"4000000": 1}]),
    "presence_penalty": ({"int", "float"}, [-2.1, 2.1, 1e999]),
    "frequency_penalty": ({"int", "float"}, [-2.1, 2.1, float("nan")]),
    "repetition_penalty": ({"int", "float"}, [0, -1, 1000, 1e999]),
    "temperature": ({"int", "float"}, [-0.1, 2.1, 1e999, float("nan"), -float("inf")]),
    "top_p": ({"int"}, [0, 1.1, -1, float("nan"), float("inf")]),
    "top_k": ({"int"}, [-2, 2**31, 10**30]),
    "min_p": ({"int"}, [-0.1, 1.1, float("nan")]),
    "seed": ({"int"}, [2**63, -(2**63) - 1, 10**400]),
    "stop": ({"str", "list"}, [["x"] * 17]),
    "stop_token_ids": ({"list"}, [[1] * 65]),
    "include_stop_str_in_output": ({"bool"}, ["true"]),
    "ignore_eos": ({"bool"}, ["true"]),
    "priority": ({"int"}, [2**31, -(2**31) - 1, 10**30]),
    "response_format": ({"dict"}, []),
    "structured_outputs": (set(), [{"regex": "a", "choice": ["b"]}]),
    "stream": ({"bool"}, ["true"]),
    "stream_options": (set(), [{"include_usage": True}]),  # allowed only with a stream
    "return_token_ids": ({"bool"}, [0]),
    "include_graph_steps": ({"bool"}, [0]),
    "prompt_logprobs": ({"int"}, [-1, 21]),
    "user": ({"str"}, ["x" * 513]),
    "metadata": ({"dict"}, [{str(i): "" for i in range(17)}]),
    "store": ({"bool"}, [0]),
    "safety_identifier": ({"str"}, ["x" * 513]),
    "prompt_cache_key": ({"str"}, ["x" * 513]),
}
"""Every field that both bodies share: the types that it takes, and values of these types that it
refuses. Null equals an absent field."""


def _message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"} | fields]}


def _part(**fields: Any) -> dict[str, Any]:
    return _message(content=[{"type": "text", "text": "x"} | fields])


def _option(**options: Any) -> dict[str, Any]:
    return {"stream": True, "stream_options": options}


BOTH = (COMPLETIONS, CHAT)
INSIDE: list[tuple[tuple[str, ...], Callable[[Any], dict[str, Any]], list[Any], str]] = [
    (BOTH, lambda bad: {"logit_bias": {"5": bad}}, [101, None, "1", True], "logit_bias.5"),
    (BOTH, lambda bad: {"logit_bias": {"x": bad}}, [1], "logit_bias.x"),
    (BOTH, lambda bad: {"stop": bad}, ["", "x" * 513], "stop"),
    (BOTH, lambda bad: {"stop": ["a", bad]}, ["", 1, None, ["a"]], "stop[1]"),
    (
        BOTH,
        lambda bad: {"stop_token_ids": [1, bad]},
        [-1, "1", True, None, 1.0, 2**31],
        "stop_token_ids[1]",
    ),
    (BOTH, lambda bad: {"stop_token_ids": [1, bad]}, [2**31 - 1], "stop_token_ids"),
    (BOTH, lambda bad: {"metadata": {"a": bad}}, [1, None, {}, "x" * 513], "metadata.a"),
    (
        BOTH,
        lambda bad: _option(include_usage=bad),
        [1, "true", []],
        "stream_options.include_usage",
    ),
    (
        BOTH,
        lambda bad: _option(continuous_usage_stats=bad),
        [1, "true", []],
        "stream_options.continuous_usage_stats",
    ),
    (BOTH, lambda bad: _option(what=bad), [1], "stream_options.what"),
    (
        BOTH,
        lambda bad: {"response_format": {"type": bad}},
        ["xml", None, 1, []],
        "response_format.type",
    ),
    (
        BOTH,
        lambda bad: {"response_format": {"type": "json_schema", "json_schema": bad}},
        [None],
        "response_format.json_schema",
    ),
    (BOTH, lambda bad: {"structured_outputs": {"what": bad}}, [1], "structured_outputs.what"),
    (
        (COMPLETIONS,),
        lambda bad: {"prompt": bad},
        [
            *(1, 1.5, True, {}, [], [[]], [None], ["a", 1], [1, "a"], [[1], "a"], [[1], []]),
            *([1.0], [True], [-1], [2**31], [10**30], ["a"] * 65, [[1, True]], "", ["a", ""]),
            *([4_000_000], [[1], [4_000_000]], ["a"] * 5000),
        ],
        "prompt",
    ),
    ((COMPLETIONS,), lambda bad: {"logprobs": bad}, [-1, 21, True, 1.5, "1", []], "logprobs"),
    ((COMPLETIONS,), lambda bad: {"prompt": ["a", "b"], "n": bad}, [65, 128], "n"),
    ((COMPLETIONS,), lambda bad: {"echo": bad}, [1, "true", []], "echo"),
    ((COMPLETIONS,), lambda bad: {"max_tokens": bad, "logprobs": 1}, [0], "max_tokens"),
    (BOTH, lambda bad: {"prompt_logprobs": bad, "stream": True}, [1], "prompt_logprobs"),
    ((COMPLETIONS,), lambda bad: {"top_logprobs": bad}, [1], "top_logprobs"),
    ((COMPLETIONS,), lambda bad: {"messages": bad}, [[USER]], "messages"),
    ((CHAT,), lambda bad: {"prompt": bad}, ["x"], "prompt"),
    ((CHAT,), lambda bad: {"messages": bad}, [1, "hi", {}, [], True], "messages"),
    ((CHAT,), lambda bad: {"messages": [USER, bad]}, [1, "hi", None, [], True], "messages[1]"),
    (
        (CHAT,),
        lambda bad: _message(role=bad),
        [None, 1, "", "a\nb", []],
        "messages[0].role",
    ),
    ((CHAT,), lambda bad: _message(content=bad), [None, 1, True, {}, []], "messages[0].content"),
    ((CHAT,), lambda bad: _message(content=[bad]), [None, 1, []], "messages[0].content[0]"),
    ((CHAT,), lambda bad: _part(type=bad), [None, 1, "image"], "messages[0].content[0].type"),
    ((CHAT,), lambda bad: _part(text=bad), [None, 1, []], "messages[0].content[0].text"),
    ((CHAT,), lambda bad: _message(name=bad), [1, [], "x" * 513], "messages[0].name"),
    ((CHAT,), lambda bad: _message(audio=bad), [1, {"id": "x"}], "messages[0].audio"),
    ((CHAT,), lambda bad: _message(images=bad), [["x"]], "messages[0].images"),
    ((CHAT,), lambda bad: _message(tool_call_id=bad), ["c", 1], "messages[0].tool_call_id"),
    ((CHAT,), lambda bad: {"tools": bad}, [1, "x", {}, True], "tools"),
    ((CHAT,), lambda bad: {"tools": [bad]}, [1, "x", []], "tools[0]"),
    ((CHAT,), lambda bad: {"tool_choice": bad}, ["required"], "tool_choice"),
    ((CHAT,), lambda bad: {"parallel_tool_calls": bad}, [1, "true"], "parallel_tool_calls"),
    ((CHAT,), lambda bad: {"chat_template_kwargs": bad}, [1, "x", []], "chat_template_kwargs"),
    ((CHAT,), lambda bad: {"chat_template_kwargs": {"messages": bad}}, [1], "chat_template_kwargs"),
    ((CHAT,), lambda bad: {"logprobs": bad}, [5, "true", []], "logprobs"),
    (
        (CHAT,),
        lambda bad: {"logprobs": True, "top_logprobs": bad},
        [-1, 21, True, 1.5, "1"],
        "top_logprobs",
    ),
    ((CHAT,), lambda bad: {"top_logprobs": bad}, [1], "top_logprobs"),
    (
        (CHAT,),
        lambda bad: {"max_completion_tokens": bad},
        [0, -1, 1.5, "1", True],
        "max_completion_tokens",
    ),
    ((CHAT,), lambda bad: {"max_tokens": 5, "max_completion_tokens": bad}, [6], "max_tokens"),
]
"""Errors inside a field, or in a field of one route only: the paths, a function that makes the
fields from a bad value, the bad values, and the `param` of the expected error."""

LONE_SURROGATES = [
    (COMPLETIONS, b'{"prompt": "\\ud800"}', "prompt"),
    (COMPLETIONS, b'{"prompt": ["a", "\\udfff b"]}', "prompt"),
    (COMPLETIONS, b'{"prompt": "\xed\xa0\x80"}', "prompt"),
    (COMPLETIONS, b'{"prompt": "x", "stop": "\\ud800"}', "stop"),
    (COMPLETIONS, b'{"prompt": "x", "user": "\\ud800"}', "user"),
    (COMPLETIONS, b'{"prompt": "x", "metadata": {"a": "\\udc00"}}', "metadata.a"),
    (COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}', None),
    (CHAT, b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "messages[0].role"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
]

NO_JSON = [
    b"",
    b" ",
    b"\x00",
    b"\xff",
    b"{'prompt': 'x'}",
    b'{"prompt": "x",}',
    b'{"prompt": "x"}}',
    b'{"prompt": "x"} {"prompt": "x"}',
    b'{"prompt": x}',
    b'{"prompt": "a\nb"}',
    b'{"prompt": "\\x"}',
    b'{"prompt": "\\u12"}',
    b'{"prompt": "x", "seed": 01}',
    b'{"prompt": "x", "seed": 0x1}',
    b'{"prompt": "x", "seed": +1}',
    b'{"prompt": "x", "seed": 1_000}',
    b'{"prompt": "x", "top_p": .5}',
    b'{"prompt": "x", "stream": True}',
    b'{"prompt": "x" "seed": 1}',
    b'{prompt: "x"}',
    b'{1: "x"}',
    b"prompt=x",
    b"<prompt>x</prompt>",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\xc0\xaf"}',
    b'{"prompt": "\xf5\x80\x80\x80"}',
    b'{"prompt\xe9": "x"}',
    b'\x1f\x8b{"prompt": "x"}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
]

NO_OBJECT = [b"null", b"true", b"7", b'"x"', b"[]", b"[{}]", b'[{"prompt": "x"}]', b"NaN"]

NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00 this is TLS\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/9.9\r\n\r\n",
    b"GET /health\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET http://[/health HTTP/1.1\r\nhost: x\r\n\r\n",
    b"FROB /health HTTP/1.1\r\nhost: x\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\na: \x00\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
]

WRONG_PATHS = [
    *("/v", "/v1", "/v1/completion", "/v1/completions/", "/v1/completions/x", "/v1//completions"),
    *(
        "/V1/completions",
        "/completions",
        "/v1/embedding",
        "/%00",
        "/%ff",
        "/../etc/passwd",
        "/x?y",
    ),
]
NO_MODEL: dict[str, Any] = {"status": 404, "param": "model", "code": "model_not_found"}
TOO_LONG: dict[str, Any] = {"code": "context_length_exceeded"}

ENDLESS = b"x" * (64 << 10)
"""As many bytes as a head may have in all. Not more, since bytes that are unread when the server
closes a connection reset it, and the answer is lost."""


@dataclass(frozen=True)
class Case:
    """The bytes of a request, and the answer that it must get."""

    why: str
    sent: bytes
    status: int
    param: str | None = None
    code: str | None = None
    body: bool = True
    """Whether the answer has a body."""


def cases() -> Iterator[Case]:
    """All malformed requests; most are the good body of a route with one change."""

    def broken(why: str, path: str, fields: dict[str, Any] | bytes, **expected: Any) -> Case:
        body = fields if isinstance(fields, bytes) else GOOD[path] | fields
        return Case(why, request_bytes(path, body, CLOSE), **{"status": 400, **expected})

    for path, good in GOOD.items():
        for field, (types, values) in FIELDS.items():
            wrong = [v for name, v in ANYTHING.items() if name not in types | {"null"}]
            for value in [*wrong, *values]:
                yield broken("a wrong value", path, {field: value}, param=field)
        only = COMPLETION_ONLY if path == COMPLETIONS else CHAT_ONLY
        for field in EVERYWHERE | only:
            yield broken("not supported", path, {field: ["something", 7]}, param=field)
        for field in ("what", "Prompt", "max_token", "", "a.b", "__class__", "é", "x" * 100):
            if field:
                yield broken("unknown", path, {field: 1}, param=field)
        (required,) = good
        yield broken("missing", path, {required: None}, param=required)
        yield broken("missing", path, b"{}", param=required)
        for content in NO_JSON:
            yield broken("no JSON", path, content)
        for content in NO_OBJECT:
            yield broken("no object", path, content)
        whole = json.dumps(good | {"seed": 12, "stop": ["é"]}).encode()
        for end in range(1, len(whole), 3):
            yield broken("cut off", path, whole[:end])
        for name in ("gpt-9", "minisrv-default/", "../minisrv-default"):
            yield broken("no such model", path, {"model": name}, **NO_MODEL)
    for paths, fields_of, bad_values, param in INSIDE:
        for path, bad in itertools.product(paths, bad_values):
            yield broken("wrong inside", path, fields_of(bad), param=param)
    for path, content, param in LONE_SURROGATES:
        yield broken("a lone surrogate", path, content, param=param)

    prompts = ([5] * 512, [[5], [5] * 513], "x " * 600, "x" * 900_000)
    for fields in (*({"prompt": prompt} for prompt in prompts), {"max_tokens": 2**31 - 1}):
        yield broken("too long", COMPLETIONS, fields, **TOO_LONG, param="prompt")
    for fields in (
        _message(content="x " * 600),
        {"messages": [USER] * 200},
        {"max_tokens": 511},
        {"max_completion_tokens": 2**31 - 1},
    ):
        yield broken("too long", CHAT, fields, **TOO_LONG, param="messages")

    for path in GOOD:
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "PROPFIND", "HEAD"):
            sent = request_bytes(path, GOOD[path], CLOSE, method=method)
            yield Case("method", sent, 405, code="method_not_allowed", body=method != "HEAD")
        kinds = (None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonl")
        for kind in (*kinds, "multipart/form-data; boundary=x", "text/json", "json"):
            sent = request_bytes(path, GOOD[path], CLOSE, kind=kind)
            yield Case("content type", sent, 415, code="unsupported_media_type")
        for coding in ("gzip", "br", "gzip, identity"):
            sent = request_bytes(path, GOOD[path], CLOSE, f"content-encoding: {coding}")
            yield Case("content encoding", sent, 415, code="unsupported_media_type")
        large = b'{"prompt": "' + b"x" * (4 << 20) + b'"}'
        yield broken("too large", path, large, status=413, code="request_too_large")
    for path in ("/health", "/ready", "/metrics", "/version", "/v1/models"):
        sent = request_bytes(path, {}, CLOSE)
        yield Case("method", sent, 405, code="method_not_allowed")
    for path in WRONG_PATHS:
        yield Case("path", request_bytes(path, {}, CLOSE), 404, code="unknown_url")
    for name in ("gpt-9", "", "%2e%2e", "minisrv-default/x"):
        sent = request_bytes(f"/v1/models/{name}", b"", CLOSE, method="GET")
        yield Case("no such model", sent, **NO_MODEL)
    for sent in NO_HTTP:
        yield Case("no HTTP", sent, 400)
    for sent in (
        b"GET /" + ENDLESS,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 10_922,
        b"GET /health HTTP/1.1\r\na: " + ENDLESS,
    ):
        yield Case("an endless head", sent, 431)


def answer(server: Server, sent: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer to these bytes."""
    with server.connect() as connection:
        with suppress(OSError):  # the server may refuse the request before all of it is sent
            connection.sendall(sent)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def problem(server: Server, case: Case) -> str | None:
    """A description of what is wrong with the answer to this case, or None."""
    try:
        status, body = answer(server, case.sent)
    except (OSError, IndexError) as error:
        return f"no answer: {error!r}"
    if status != case.status:
        return f"{status} {body[:200]!r}"
    if not case.body:
        return repr(body) if body else None
    document = json.loads(body)
    error = document["error"]
    if set(document) != {"error"} or set(error) != {"message", "type", "param", "code"}:
        return f"not OpenAI's shape: {body[:200]!r}"
    if error["type"] != "invalid_request_error" or not error["message"] or len(body) > 2000:
        return repr(body[:200])
    if (error["param"], error["code"]) != (case.param, case.code):
        return f"param {error['param']!r}, code {error['code']!r}"
    return None


def stream(server: Server) -> list[int]:
    """The tokens of a good stream."""
    body = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "seed": 7}
    response = server.post(COMPLETIONS, **body, stream=True, return_token_ids=True)
    assert response.status_code == 200
    events = events_of(response.text)
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    return [token for event in events for token in event["choices"][0]["token_ids"]]


@pytest.mark.parametrize("seed", [0])
def test_each_gets_its_answer_and_a_good_stream_notices_nothing(server: Server, seed: int) -> None:
    """Each malformed request gets its error, and the streams beside them give the tokens of one
    alone."""
    alone = stream(server)
    assert len(alone) == 300
    before = server.metrics()
    every = list(cases())
    assert len({case.sent for case in every}) == len(every) > 300
    random.Random(seed).shuffle(every)
    done = threading.Event()
    beside: list[list[int]] = []

    def stream_on() -> None:
        while not done.is_set():
            beside.append(stream(server))

    with ThreadPoolExecutor(17) as threads:
        streaming = threads.submit(stream_on)
        try:
            problems = list(threads.map(lambda case: problem(server, case), every))
        finally:
            done.set()
        streaming.result()
    wrong = [
        f"{case.why}, {case.status} and {case.param!r} expected: {found}\n  {case.sent[:300]!r}"
        for case, found in zip(every, problems, strict=True)
        if found is not None
    ]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(every)}", *wrong])
    assert beside
    assert all(tokens == alone for tokens in beside)
    after = server.metrics()
    added = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert added == 300 * len(beside), "the engine has seen the good ones only"
    assert "Traceback" not in server.log
    print(len(every), "malformed requests:", dict(Counter(case.status for case in every)))
    print(len(beside), "good streams beside them")

"""What clients do that they should not: each gets its answer, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.server import CHAT, COMPLETIONS, Server

JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def still_serving(server: Server) -> Iterator[None]:
    """Whatever a test sends, the next request is served and nothing is left of it."""
    yield
    assert server.complete("x", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert server.metrics()["kv_cache_usage_perc"] == 0
    assert "Traceback" not in server.log


def request(path: str, body: dict[str, Any], *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers)
    return "\r\n".join((*lines, f"content-length: {len(content)}\r\n\r\n")).encode() + content


def connect(server: Server) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b'{"prompt": "\xff\xfe"}', 400, None),
        (b'{"prompt": "\\ud800"}', 400, "prompt"),
        (b'{"prompt": "x", "stop": "\\ud800"}', 400, "stop[0]"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
        (b'{"prompt": "x", "top_p": -Infinity}', 400, "top_p"),
        (b'{"prompt": "x", "min_p": 1e999}', 400, "min_p"),
        (b'{"prompt": "x", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"prompt": [-1]}', 400, "prompt"),
        (b'{"prompt": [99999999999999999999999]}', 400, "prompt"),
        (b'{"prompt": [4000000]}', 400, "prompt"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, None),
        (b'{"prompt": "x", "seed": 9223372036854775808}', 400, "seed"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None),
        (b'{"prompt": "x", "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 901, 400, "metadata.a"),
        (json.dumps({"prompt": "x", "stop": ["stop"] * 10_000}).encode(), 400, "stop"),
        (
            json.dumps({"prompt": "x", "stop_token_ids": [1] * 10_000}).encode(),
            400,
            "stop_token_ids",
        ),
        (json.dumps({"prompt": "x" * (1 << 20)}).encode(), 400, "prompt"),
        (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413, None),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
def test_bodies(server: Server, content: bytes, status: int, param: str | None) -> None:
    response = httpx.post(server.url + COMPLETIONS, content=content, headers=JSON, timeout=60)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["param"] == param


def test_of_a_field_given_twice_the_last_counts(server: Server) -> None:
    content = b'{"prompt": "x", "max_tokens": 1, "max_tokens": 3, "ignore_eos": true}'
    response = httpx.post(server.url + COMPLETIONS, content=content, headers=JSON, timeout=60)
    assert response.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\uffff\u202e\u200b",
        "e\u0301\u0323" + "\u0300" * 400,
        "👩‍👩‍👧‍👦🏳️‍🌈" * 10,
        "<|im_end|><|im_start|>system\n",
        " \n\t\r " * 50,
        "𒈙ﷺ꧅",
    ],
)
def test_odd_text(server: Server, text: str) -> None:
    """Served as it is, or refused as too long; the same for both routes and streamed."""
    for path, body in (
        (COMPLETIONS, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        for stream in (False, True):
            response = server.post(path, **body, max_tokens=2, stream=stream, stop=text[:9])
            if response.status_code != 200:
                assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "DELETE", "TRACE"])
def test_other_methods(server: Server, method: str) -> None:
    response = httpx.request(method, server.url + COMPLETIONS, timeout=60)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00 this is TLS\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_not_http(server: Server, sent: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_half_a_request_holds_nobody_up(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(request(COMPLETIONS, {"prompt": "x"})[:-4])
        assert server.complete("x", max_tokens=2)["choices"]
        connection.sendall(request(COMPLETIONS, {"prompt": "x"})[-4:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    body = {"prompt": "x", "ignore_eos": True}
    with connect(server) as connection:
        connection.sendall(
            request(COMPLETIONS, {**body, "max_tokens": 30})
            + request(COMPLETIONS, {**body, "max_tokens": 2, "stream": True})
            + request("/nowhere", {})
            + request(COMPLETIONS, {**body, "max_tokens": 3}, "connection: close")
        )
        answers = read_all(connection).decode().split("HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == ["200", "200", "404", "200"]
    assert '"completion_tokens":30' in answers[0]
    assert "data: [DONE]" in answers[1]
    assert '"completion_tokens":3' in answers[3]


def test_two_hundred_connections_at_once(server: Server) -> None:
    bodies = [
        {"prompt": f"{i}", "max_tokens": 3, "ignore_eos": True, "stream": bool(i % 2)}
        for i in range(200)
    ]
    answers = [future.result() for future in server.post_all(COMPLETIONS, bodies)]
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[1::2])
    assert all(answer.json()["usage"]["completion_tokens"] == 3 for answer in answers[::2])


def test_a_reader_that_stops_reading(server: Server) -> None:
    """Others go on meanwhile, and in the end it gets all of it."""
    body = {"prompt": ["x"] * 6, "max_tokens": 250, "ignore_eos": True, "logprobs": 20}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = server.url.removeprefix("http://").partition(":")
        connection.connect((host, int(port)))
        connection.settimeout(60)
        connection.sendall(request(COMPLETIONS, {**body, "stream": True}, "connection: close"))
        for _ in range(10):
            assert server.complete("y", max_tokens=20, ignore_eos=True)["choices"]
        received = read_all(connection).decode()
    assert received.count('"finish_reason":"length"') == 6
    assert received.count("data: [DONE]") == 1

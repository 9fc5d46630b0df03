"""Requests by plain curl, as the README shows them."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.e2e.server import CHAT, COMPLETIONS, Server, events_of

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def curl(server: Server, path: str, body: str) -> tuple[int, str]:
    """The status and the body of curl's answer."""
    command = ["curl", "-sN", "-w", "%{stderr}%{http_code}", server.url + path]
    command += ["-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return int(done.stderr), done.stdout


def test_completion(server: Server) -> None:
    body = '{"model": "minisrv-default", "prompt": "Once", "max_tokens": 5, "temperature": 0}'
    status, answer = curl(server, COMPLETIONS, body)
    assert status == 200
    choice = json.loads(answer)["choices"][0]
    assert choice["text"] == server.complete("Once", max_tokens=5)["choices"][0]["text"]


def test_chat_stream(server: Server) -> None:
    body = '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true, "max_tokens": 9}'
    status, answer = curl(server, CHAT, body)
    assert status == 200
    events = events_of(answer)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_error(server: Server) -> None:
    status, answer = curl(server, CHAT, '{"messages": [], "stream": true}')
    assert status == 400
    error = json.loads(answer)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")

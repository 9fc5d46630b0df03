"""`minisrv chat` against a real server."""

from __future__ import annotations

import pytest

from minisrv.cli import main
from tests.e2e.server import CHAT, Server


def test_the_answer_is_the_servers(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the same text that the API returns."""
    question = "Sort these words: kangaroo, giraffe, laptop, cherry"
    messages = [{"role": "user", "content": question}]
    response = server.post(CHAT, messages=messages, temperature=0)
    assert main(["chat", "--url", server.url, "-q", question, "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == response.json()["choices"][0]["message"]["content"] + "\n"
    assert err == ""


def test_a_conversation_that_does_not_fit_says_so(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", server.url, "-q", "long " * 600]) == 1
    assert "maximum context length is 512" in capsys.readouterr().err

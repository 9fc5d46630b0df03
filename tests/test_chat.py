"""`minisrv chat`: the terminal's loop, with a model in this process and with one behind a server's
API."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from minisrv.chat import NO_TEMPLATE, Message, Note, Piece
from minisrv.chat.local import LocalModel
from minisrv.chat.remote import RemoteModel
from minisrv.chat.terminal import Terminal
from minisrv.cli import main
from minisrv.config import ChatConfig, EngineConfig
from minisrv.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthError,
    EngineError,
    MinisrvError,
    RequestError,
)
from minisrv.text.chat_deltas import ContentDelta, ReasoningDelta
from tests.checkpoints import make_checkpoint

HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def text_of(pieces: Generator[Piece, None, None]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, ContentDelta))


# ---- the terminal --------------------------------------------------------------------------------


class Parrot:
    """A model that repeats the last message, word by word; some messages make it do something
    else."""

    name = "parrot"

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        self.asked.append([dict(message) for message in messages])
        match messages[-1]["content"]:
            case "interrupt":
                yield ContentDelta("as far as")
                raise KeyboardInterrupt
            case "overflow":
                raise ContextLengthError("it is too long.")
            case "fail":
                raise EngineError("the engine is gone.")
            case "escape":
                yield Note("\x1b[2Ja server's words")
            case "think":
                yield ReasoningDelta("hm")
                yield ContentDelta("so")
                yield Note("That was all.")
            case text:
                for word in text.split():
                    yield ContentDelta(word + " ")


def converse(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> Parrot:
    """Run a conversation in which the user types `lines`, where an exception stands for a key, and
    check that it ends by itself. Return the model."""
    left = list(lines)

    def read(prompt: str = "") -> str:
        print(prompt, end="")  # The real `input` prints the prompt to stdout too.
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    parrot = Parrot()
    Terminal(parrot, ChatConfig(system_prompt="Be brief.")).converse()
    assert not left
    return parrot


def contents(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


def test_the_history_is_what_was_said(monkeypatch: Any, capsys: Any) -> None:
    parrot = converse(monkeypatch, "a b", "", "c", "/clear", "d", "/quit")
    assert [contents(messages) for messages in parrot.asked] == [
        ["Be brief.", "a b"],
        ["Be brief.", "a b", "a b ", "c"],
        ["Be brief.", "d"],
    ]
    assert [message["role"] for message in parrot.asked[1]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert capsys.readouterr().out == "a b \nc \nd \n"


def test_what_goes_wrong_ends_an_answer_and_not_the_chat(monkeypatch: Any, capsys: Any) -> None:
    """A message that got no answer is left out of the history; of an interrupted answer the part
    that came stays in it."""
    lines = ["overflow", "fail", "interrupt", KeyboardInterrupt, "/what", "x", EOFError]
    parrot = converse(monkeypatch, *lines)
    assert contents(parrot.asked[-1]) == ["Be brief.", "interrupt", "as far as", "x"]
    told = capsys.readouterr().err
    for words in (
        "it is too long. /clear begins anew.",
        "the engine is gone.",
        "The answer was interrupted.",
        "There is no /what.",
    ):
        assert words in told


def test_only_the_answer_goes_to_stdout(capsys: Any) -> None:
    Terminal(Parrot(), ChatConfig()).answer("think")
    out, err = capsys.readouterr()
    assert out == "so\n"
    assert "hm" in err
    assert "That was all." in err


def test_an_answer_does_not_move_the_cursor_of_a_terminal(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Terminal(Parrot(), ChatConfig()).answer("\x1b[2Jred\x07")
    assert capsys.readouterr().out == "[2Jred \n"
    Terminal(Parrot(), ChatConfig()).answer("escape")
    assert "\x1b[2J" not in capsys.readouterr().err


# ---- in this process -----------------------------------------------------------------------------


def local(directory: Path, **chat: Any) -> LocalModel:
    config = EngineConfig(
        model=str(directory),
        device="cpu",
        max_num_seqs=1,
        max_num_batched_tokens=32,
        max_model_len=64,
        enforce_eager=True,
    )
    return LocalModel(config, ChatConfig(temperature=0.0, **chat))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LocalModel:
    return local(checkpoint)


def test_a_local_answer_ends_with_the_context_and_says_so(model: LocalModel) -> None:
    pieces = list(model.answer(HELLO))
    assert len([piece for piece in pieces if isinstance(piece, ContentDelta) and piece.text]) > 1
    assert isinstance(pieces[-1], Note)
    assert "cut off after" in pieces[-1].text


def test_a_local_answer_ends_where_the_checkpoint_says(
    model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local answer ends at the checkpoint's stop string, which does not count before the
    checkpoint's min_tokens."""
    whole = text_of(model.answer(HELLO))
    for least in (0, 8):
        told = replace(model._checkpoint.generation, stop=(whole[0],), min_tokens=least)
        monkeypatch.setattr(model, "_checkpoint", replace(model._checkpoint, generation=told))
        text = text_of(model.answer(HELLO))
        assert whole.startswith(text)
        assert bool(text) is bool(least)


def test_a_conversation_that_does_not_fit(model: LocalModel) -> None:
    with pytest.raises(ContextLengthError, match="tokens, and the context holds 64"):
        list(model.answer([{"role": "user", "content": "hello " * 99}]))
    assert text_of(model.answer(HELLO))


@pytest.mark.usefixtures("raising_sigint")
def test_ctrl_c_ends_a_local_answer_between_steps(model: LocalModel) -> None:
    whole = text_of(model.answer(HELLO))
    said = ""

    def interrupted() -> None:
        nonlocal said
        with closing(model.answer(HELLO)) as pieces:
            for piece in pieces:
                assert isinstance(piece, ContentDelta)
                said += piece.text
                if said:
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert text_of(model.answer(HELLO)) == whole


def test_a_local_model_without_a_template_goes_on_with_the_text(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    model = local(tmp_path, max_tokens=3)
    first, *rest = model.answer(HELLO)
    assert first == Note(NO_TEMPLATE)
    assert any(isinstance(piece, ContentDelta) for piece in rest)
    assert Note(NO_TEMPLATE) not in model.answer(HELLO)


# ---- a server ------------------------------------------------------------------------------------


class Scripted:
    """A server that answers each path with the status and body that it was given for it."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {"/v1/models": (200, models("tiny"))}
        self.asked: list[tuple[str, Any, str | None]] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                scripted.asked.append((self.path, body, self.headers.get("authorization")))
                status, answer = scripted.answers.get(self.path, (404, b"{}"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET  # noqa: N815 (http.server's name)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture(scope="module")
def serving() -> Iterator[Scripted]:
    scripted = Scripted()
    thread = threading.Thread(target=scripted.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield scripted
    scripted.http.shutdown()
    scripted.http.server_close()
    thread.join()


@pytest.fixture
def server(serving: Scripted, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    serving.answers = {"/v1/models": (200, models("tiny"))}
    serving.asked.clear()
    return serving


def models(*names: str) -> bytes:
    return json.dumps({"data": [{"id": name} for name in names]}).encode()


def events(*chunks: Any, done: bool = True) -> bytes:
    data = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(data + ["data: [DONE]\n\n"] * done).encode()


def chunk(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def error(message: str, **more: Any) -> bytes:
    return json.dumps({"error": {"message": message, **more}}).encode()


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_a_server_is_asked_as_openai_has_it(server: Scripted) -> None:
    server.answers[CHAT] = (
        200,
        events(
            chunk(role="assistant", content=""),
            chunk(reasoning_content="hm", reasoning="hm"),
            chunk(content="4"),
            chunk(content="2"),
            chunk("length"),
            {"choices": [], "usage": {"completion_tokens": 2}},
        ),
    )
    model = RemoteModel(server.url, None, "secret", ChatConfig(temperature=0.0, max_tokens=2))
    assert model.name == "tiny"
    *pieces, note = model.answer(HELLO)
    assert pieces == [ReasoningDelta("hm"), ContentDelta("4"), ContentDelta("2")]
    assert isinstance(note, Note)
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    body |= {"temperature": 0.0, "max_tokens": 2}
    assert server.asked == [("/v1/models", None, "Bearer secret"), (CHAT, body, "Bearer secret")]


def test_a_server_whose_model_has_no_template(server: Scripted) -> None:
    refusal = error("this model has no chat template, so it cannot be used for chat")
    server.answers[CHAT] = (400, refusal)
    server.answers[COMPLETIONS] = (
        200,
        events({"choices": [{"text": " world", "finish_reason": "stop"}]}),
    )
    model = RemoteModel(server.url + "/v1/", "named", None, ChatConfig())
    assert list(model.answer(HELLO)) == [Note(NO_TEMPLATE), ContentDelta(" world")]
    assert list(model.answer(HELLO)) == [ContentDelta(" world")]
    assert [path for path, _, _ in server.asked] == [CHAT, COMPLETIONS, COMPLETIONS]
    assert server.asked[1][1]["prompt"] == "hello"
    assert server.asked[1][1]["model"] == "named"


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, error("too long", code="context_length_exceeded"), ContextLengthError, "too long"),
        (400, error("the maximum context length is 9"), ContextLengthError, "length is 9"),
        (400, error("temperature is wrong"), RequestError, "400: temperature is wrong"),
        (401, error("no key"), AuthenticationError, "Set MINISRV_API_KEY"),
        (503, error("loading"), EngineError, "503: loading"),
        (502, b"<html>bad gateway", EngineError, "502: <html>bad gateway"),
        (200, events(chunk(content="a"), {"error": {"message": "gone"}}), EngineError, "gone"),
        (200, b"data: {broken\n\n", EngineError, "is not OpenAI's API"),
        (200, events({"choices": [None]}), EngineError, "is not OpenAI's API"),
        (200, events({"choices": {"0": {}}}), EngineError, "is not OpenAI's API"),
        (200, events(chunk(content="half"), done=False), EngineError, "the answer has no end"),
        (200, b"<html>", EngineError, "the answer has no end"),
    ],
)
def test_what_a_server_refuses_is_told(
    server: Scripted, status: int, body: bytes, kind: type[MinisrvError], words: str
) -> None:
    server.answers[CHAT] = (status, body)
    model = RemoteModel(server.url, None, None, ChatConfig())
    with pytest.raises(kind) as raised:
        list(model.answer(HELLO))
    assert type(raised.value) is kind
    assert words in raised.value.message


def test_what_is_no_server_is_told(server: Scripted) -> None:
    server.answers["/v1/models"] = (200, b"<html>")
    with pytest.raises(ConfigError, match="no server with OpenAI's API"):
        RemoteModel(server.url, None, None, ChatConfig())
    for url in ("localhost:8000", "http://", "http://[::1", "http://host:port", "http://host?x=1"):
        with pytest.raises(ConfigError, match="write http://HOST:PORT/v1"):
            RemoteModel(url, None, None, ChatConfig())
    with pytest.raises(ConfigError, match="no server answers .* start one with `minisrv serve`"):
        RemoteModel("http://127.0.0.1:1", None, None, ChatConfig())


# ---- the command ---------------------------------------------------------------------------------

Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(server: Scripted, capsys: pytest.CaptureFixture[str]) -> Chat:
    """A function that runs the command against the scripted server and returns its status, stdout
    and stderr."""
    server.answers[CHAT] = (200, events(chunk(content="42"), chunk("stop")))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["chat", "--url", server.url, *arguments])
        return status, *capsys.readouterr()

    return run


def test_one_message(run: Chat, server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISRV_API_KEY", "secret")
    assert run("-q", "What is 17+25?", "--system-prompt", "Be brief.")[:2] == (0, "42\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("From\na pipe"))
    assert run("tiny")[:2] == (0, "42\n")
    first, second = (body["messages"] for path, body, _ in server.asked if path == CHAT)
    assert contents(first) == ["Be brief.", "What is 17+25?"]
    assert contents(second) == ["From\na pipe"]
    assert {key for _, _, key in server.asked} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["What is 17+25?"], "looks like a message; ask it with --quick."),
        (["-q", " "], "the message is empty"),
        (["-q", "x", "--dtype", "half"], "--dtype: the server at --url runs the model"),
        (["-q", "x", "--temperature", "3"], "temperature=3.0 is not allowed"),
        (["-q", "x", "--max-tokens", "0"], "max_tokens=0 is not allowed"),
    ],
)
def test_what_the_command_refuses(run: Chat, arguments: list[str], words: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert words in err


def test_a_message_on_stdin_that_is_no_text(run: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"))
    assert "the message on stdin is no text" in run()[2]
    monkeypatch.setattr("sys.stdin", None)  # Python sets it to None if stdin was closed.
    assert "the message is empty" in run()[2]


def test_one_message_to_a_model_in_this_process(checkpoint: Path, capfd: Any) -> None:
    arguments = ["chat", str(checkpoint), "-q", "hello", "--max-tokens", "2", "--enforce-eager"]
    status = main([*arguments, "--max-model-len", "64", "--device", "cpu"])
    out, err = capfd.readouterr()
    assert status == 0
    assert out.strip(os.linesep)
    assert "cut off after 2 tokens" in err

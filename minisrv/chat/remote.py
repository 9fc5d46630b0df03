"""A chat with a model behind a server with OpenAI's API, minisrv's or another.

Knows: HTTP by the standard library, and the chunks of a stream. Knows nothing of terminals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import msgspec

from minisrv.chat import COMPLETION_TOKENS, NO_TEMPLATE, Message, Note, Piece
from minisrv.config import ChatConfig
from minisrv.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthError,
    EngineError,
    MinisrvError,
    RequestError,
)
from minisrv.text.chat_deltas import ContentDelta, ReasoningDelta

_NO_TEMPLATE = re.compile("no chat template|must provide a chat template")
"""Matches the message with which minisrv, or vLLM, refuses a chat with a model that has no chat
template."""
_TOO_LONG = re.compile("context_length_exceeded|maximum context length")


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    """The text of a chunk of /completions, which has no delta."""
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """An event of a stream, with the fields that are used here."""

    choices: list[_Choice] | None = None
    error: Any = None


class RemoteModel:
    """A model behind a URL.

    url: the base URL of the API, such as http://127.0.0.1:8000/v1; without a path, /v1 is added.
    model: one of the model names of the server; None takes the first that it lists.
    key: the API key for the server, or None.
    The constructor raises ConfigError if no such server answers, AuthenticationError if the key is
    wrong.
    """

    def __init__(self, url: str, model: str | None, key: str | None, chat: ChatConfig) -> None:
        self._url = _api_of(url)
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._chat = chat
        self._chats = True
        self.name = model or self._first_model()

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """See `Model`."""
        if self._chats:
            try:
                yield from self._stream("/chat/completions", {"messages": messages})
                return
            except RequestError as error:
                if not _NO_TEMPLATE.search(error.message):
                    raise
            self._chats = False
            yield Note(NO_TEMPLATE)
        body = {"prompt": messages[-1]["content"], "max_tokens": COMPLETION_TOKENS}
        yield from self._stream("/completions", body)

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Piece]:
        body = {"model": self.name, **body, "stream": True}
        for name in ("temperature", "max_tokens"):
            if (value := getattr(self._chat, name)) is not None:
                body[name] = value
        reason = None
        for chunk in _events(self._open(path, body)):
            if chunk.error:
                raise EngineError(f"the server ended the answer: {_message(chunk.error)}")
            for choice in chunk.choices or ():
                reason = choice.finish_reason or reason
                delta = choice.delta or _Delta(choice.text)
                if text := delta.reasoning_content or delta.reasoning:
                    yield ReasoningDelta(text)
                if delta.content:
                    yield ContentDelta(delta.content)
        if reason is None:  # a connection may be closed cleanly in the middle of an answer
            raise EngineError("the answer has no end: the connection closed before it.")
        if reason == "length":
            yield Note("The answer is cut off: --max-tokens, or the end of the context.")

    def _first_model(self) -> str:
        try:
            with self._open("/models") as response:
                return str(json.load(response)["data"][0]["id"])
        except EngineError as error:
            raise ConfigError(f"--url {self._url}: {error.message}") from None
        except (ValueError, LookupError, TypeError):
            raise ConfigError(
                f"--url {self._url}: what answers there is no server with OpenAI's API."
            ) from None

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request and return the response. Raises the error for a response that is a refusal
        (see `_refusal`), and EngineError if there is no response.

        body: sent by POST as JSON; None sends a GET.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(self._url + path, data, self._headers))
        except HTTPError as error:
            raise _refusal(error) from None
        except URLError as error:
            raise EngineError(
                f"no server answers ({error.reason}); start one with `minisrv serve`, or leave out "
                "--url to chat with a model in this process."
            ) from None
        except (OSError, HTTPException) as error:
            raise EngineError(f"the connection broke ({error or type(error).__name__}).") from None


def _api_of(url: str) -> str:
    """Return the base URL to which the paths of the API are appended. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # e.g. a port that is no number
        named = False
    if not named or parts.query or parts.fragment:
        raise ConfigError(f"--url {url}: write http://HOST:PORT/v1.")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _events(response: Any) -> Iterator[_Chunk]:
    """Yield the server-sent events of a response whose data is a JSON object. Raises
    EngineError."""
    with response:
        try:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data.startswith(b"{"):
                    yield msgspec.json.decode(data, type=_Chunk)
        except (OSError, HTTPException) as error:
            raise EngineError(f"the connection broke ({error or type(error).__name__}).") from None
        except msgspec.MsgspecError as error:
            raise EngineError(f"the server's answer is not OpenAI's API: {error}.") from None


def _refusal(response: HTTPError) -> MinisrvError:
    try:
        text = response.read().decode(errors="replace")
    except (OSError, HTTPException):  # without the body, the status still tells enough
        text = ""
    try:
        error = json.loads(text)["error"]
    except (ValueError, LookupError, TypeError):
        error = text.strip()[:300] or response.reason
    message = f"the server answers {response.code}: {_message(error)}"
    if response.code == 401:
        return AuthenticationError(f"{message} Set MINISRV_API_KEY to a key that it accepts.")
    if _TOO_LONG.search(text):
        return ContextLengthError(message)
    return RequestError(message) if response.code < 500 else EngineError(message)


def _message(error: Any) -> str:
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)

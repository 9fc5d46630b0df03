"""The terminal's side of a chat: reads messages, prints answers as they come, keeps the history.

Answers go to stdout and everything else to stderr, so that an answer can be piped.

Knows: terminals. Knows nothing of the model that answers.
"""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import closing, suppress

from rich.console import Console

from minisrv.chat import Message, Model, Note, Piece
from minisrv.config import ChatConfig
from minisrv.errors import ConfigError, ContextLengthError, MinisrvError
from minisrv.text.chat_deltas import ContentDelta, ReasoningDelta

HELP = "/quit or Ctrl-D ends, /clear forgets what was said, Ctrl-C ends an answer."


def single_message(chat: ChatConfig) -> str | None:
    """Return the only message of a chat that is no conversation: that of `--quick`, or all of stdin
    if that is not a terminal. None for a conversation. Raises ConfigError if the message is
    empty."""
    if chat.quick is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    message = _piped() if chat.quick is None else chat.quick
    if not message.strip():
        raise ConfigError("the message is empty: give one with --quick, or on stdin.")
    return message


def _piped() -> str:
    """Return all of stdin. Raises ConfigError if it is not text."""
    if sys.stdin is None:  # stdin was closed when this process was started
        return ""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the message on stdin is no text: {error}.") from None


class Terminal:
    """A chat with a model in the terminal."""

    def __init__(self, model: Model, chat: ChatConfig) -> None:
        self._model = model
        self._aside = Console(stderr=True, highlight=False)
        prompt = chat.system_prompt
        self._start: list[Message] = [] if prompt is None else [_message("system", prompt)]
        self._history = list(self._start)
        self._line_of: type[Piece] | None = None
        """The kind of piece that was printed last, if its line has not ended."""

    def answer(self, text: str) -> None:
        """Send one message, and print the answer. If there is an answer, whole or not, both enter
        the history.

        Raises MinisrvError, and KeyboardInterrupt if Ctrl-C ended it.
        """
        self._history.append(_message("user", text))
        answer = ""
        try:
            with closing(self._model.answer(self._history)) as pieces:
                for piece in pieces:
                    if isinstance(piece, ContentDelta):
                        answer += piece.text
                    self._show(piece)
        finally:
            self._end_line()
            if answer:
                self._history.append(_message("assistant", answer))
            else:
                self._history.pop()

    def _show(self, piece: Piece) -> None:
        if type(piece) is not self._line_of:
            self._end_line()
        match piece:
            case ContentDelta(text):
                print(_printable(text) if sys.stdout.isatty() else text, end="", flush=True)
            case ReasoningDelta(text):
                self._aside.out(_printable(text), style="dim", end="")
            case Note(text):
                self._note(text)
                return
        if text:
            self._line_of = None if text.endswith("\n") else type(piece)

    def _end_line(self) -> None:
        """End the line that the last piece has begun, on stdout or stderr."""
        if self._line_of is ContentDelta:
            print(flush=True)
        elif self._line_of is ReasoningDelta:
            self._aside.out()
        self._line_of = None

    def converse(self) -> None:
        """Read messages and answer them until the user ends the conversation."""
        with suppress(ImportError):
            importlib.import_module("readline")  # lets the user edit the line that `input` reads
        self._note(f"Chat with {self._model.name}. {HELP}")
        while True:
            try:
                text = _read_line().strip()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            match text:
                case "":
                    pass
                case "/quit" | "/exit":
                    return
                case "/clear":
                    self._history = list(self._start)
                case "/help":
                    self._note(HELP)
                case _ if re.fullmatch(r"/\w*", text):
                    self._note(f"There is no {text}. {HELP}")
                case _:
                    self._try(text)

    def _try(self, text: str) -> None:
        try:
            self.answer(text)
        except KeyboardInterrupt:
            self._note("The answer was interrupted.")
        except ContextLengthError as error:
            self._note(f"{error.message} /clear begins anew.")
        except MinisrvError as error:
            self._note(error.message)

    def _note(self, text: str) -> None:
        self._aside.print(_printable(text), style="yellow", markup=False)


def _read_line() -> str:
    """Read a line of the user. If stdout is a terminal, the prompt is printed there and the line
    can be edited; or else the prompt goes to stderr."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _printable(text: str) -> str:
    """Return `text` without control characters, with which an answer, which is not trusted, could
    move the cursor of a terminal or do worse."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}

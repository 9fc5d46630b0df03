"""The terminal's side of a chat: reads messages, prints answers as they come, keeps the history.

Answers go to stdout, and whatever else is said to stderr, so that an answer can be piped.

Knows: terminals. Knows nothing of who answers.
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
    """The only message of a chat: `quick`'s, or all of stdin where that is no terminal. None for a
    conversation. Raises ConfigError if it is empty."""
    if chat.quick is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    message = _piped() if chat.quick is None else chat.quick
    if not message.strip():
        raise ConfigError("the message is empty: give one with --quick, or on stdin.")
    return message


def _piped() -> str:
    """All of stdin. Raises ConfigError if it is no text."""
    if sys.stdin is None:  # closed by whoever started this
        return ""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the message on stdin is no text: {error}.") from None


class Terminal:
    """A chat with a model."""

    def __init__(self, model: Model, chat: ChatConfig) -> None:
        self._model = model
        self._aside = Console(stderr=True, highlight=False)
        prompt = chat.system_prompt
        self._start: list[Message] = [] if prompt is None else [_message("system", prompt)]
        self._history = list(self._start)
        self._line_of: type[Piece] | None = None
        """Whose text ends with a line that has not ended."""

    def answer(self, text: str) -> None:
        """Ask once, and print the answer. What was said is kept if there is one, whole or not.

        Raises MinisrvError, and KeyboardInterrupt if Ctrl-C ended it.
        """
        self._history.append(_message("user", text))
        said = ""
        try:
            with closing(self._model.answer(self._history)) as pieces:
                for piece in pieces:
                    if isinstance(piece, ContentDelta):
                        said += piece.text
                    self._show(piece)
        finally:
            self._end_line()
            if said:
                self._history.append(_message("assistant", said))
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
        """Begin a line on the terminal, whoever has written to the last one."""
        if self._line_of is ContentDelta:
            print(flush=True)
        elif self._line_of is ReasoningDelta:
            self._aside.out()
        self._line_of = None

    def converse(self) -> None:
        """Ask and answer until the user ends it."""
        with suppress(ImportError):
            importlib.import_module("readline")  # gives `input` a line that can be edited
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
    """A line of the user's. Only a terminal's stdout is asked on, and its line can be edited."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _printable(text: str) -> str:
    """`text` without what could move a terminal's cursor, or do more: an answer is not to be
    trusted with it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}

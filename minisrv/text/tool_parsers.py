"""Finds tool calls in a model's text as it arrives.

Models spell a call as a JSON object with a name and arguments. As soon as the arguments begin it is
certain to be a call, and the arguments are passed on as they are written, broken or not, which is
what OpenAI's clients are told to expect. Text that looks like a call and is none (no object, no
name, no arguments) is content, markers included. White space around calls belongs to them. The
result does not depend on how the text is cut into pieces, and no part of a marker is returned as
content before it is certain to be none. Brackets are counted; no regular expression is applied to
what a model writes.

Knows: how models spell calls. Knows nothing of which tools there are.
"""

from __future__ import annotations

import enum
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from minisrv.text.chat_deltas import (
    BLANK,
    ChatDelta,
    ContentDelta,
    ToolCallArguments,
    ToolCallStart,
)
from minisrv.text.stop import StopMatcher

_ARGUMENTS = ("arguments", "parameters")
_OUTSIDE_STRINGS = frozenset('{}[]:,"+-.0123456789eEtrufalsn' + BLANK)
"""Characters that may stand in JSON outside its strings."""


class _Part(enum.Enum):
    """The part of a call's object that the text has reached."""

    HEADER = enum.auto()
    """Nothing is nested yet, so the object may become a call."""
    ARGUMENTS = enum.auto()
    """The object is a call, and its arguments are being read."""
    TAIL = enum.auto()
    """The arguments are complete, and the object is not."""
    OTHER = enum.auto()
    """Another value is nested: whether the object is a call is decided when it is complete."""


class ToolParser(ABC):
    """Finds the tool calls of one answer.

    The class attributes say how a model spells calls: the markers and text around each call and
    between calls, and the name of the arguments.
    """

    opening: ClassVar[tuple[str, ...]] = ()
    closing: ClassVar[tuple[str, ...]] = ()
    separator: ClassVar[str]
    arguments_name: ClassVar[str]

    def __init__(self) -> None:
        self._deltas: list[ChatDelta] = []
        self._num_calls = 0
        self._held = ""
        """Text before the object that becomes content if no call comes of it; the object itself is
        kept in `_object`."""
        self._object: list[str] = []
        self._state: Callable[[str], str] = self._begin
        """The current state: a method that takes text and returns what it leaves for the next
        state."""

    def feed(self, text: str) -> list[ChatDelta]:
        """Add text; return what has become certain."""
        while text:
            text = self._state(text)
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[ChatDelta]:
        """End the text; return what was held back. A call that is cut short stays a call."""
        self._end()
        deltas, self._deltas = self._deltas, []
        return deltas

    @abstractmethod
    def _begin(self, text: str) -> str:
        """Read text in the state at the start; return what is left of it."""

    @abstractmethod
    def _after_call(self, text: str) -> str:
        """Read text in the state behind a call; return what is left of it."""

    @abstractmethod
    def _no_call(self, text: str) -> str:
        """Read text in the state behind an object that turned out to be no call; return what is
        left of it."""

    def _end(self) -> None:
        self._release()

    def _content(self, text: str) -> None:
        if text:
            self._deltas.append(ContentDelta(text))

    def _release(self) -> None:
        """Add the text that is held back, and the object, to the content, as no call comes of
        them."""
        self._content(self._held + "".join(self._object))
        self._held = ""
        self._object = []

    def _start_object(self, text: str) -> str:
        """Enter the state that reads an object, with whose `{` the text begins; return the text."""
        self._part = _Part.HEADER
        self._depth = 0
        self._in_string = self._escaped = False
        self._state = self._in_object
        return text

    def _in_object(self, text: str) -> str:
        begin = 0
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
                if self._depth == 2 and self._part is _Part.HEADER:
                    self._object.append(text[begin:i])
                    begin = i
                    self._start_nested(char)
            elif char in "}]":
                self._depth -= 1
                if self._depth == 1 and self._part is _Part.ARGUMENTS:
                    self._arguments(text[begin : i + 1])
                    self._part = _Part.TAIL
                    begin = i + 1
                elif self._depth == 0:
                    self._pass_on(text[begin : i + 1])
                    self._close_object()
                    return text[i + 1 :]
            elif char not in _OUTSIDE_STRINGS:
                self._pass_on(text[begin:i])
                self._leave_object()
                return text[i:]
        self._pass_on(text[begin:])
        return ""

    def _start_nested(self, bracket: str) -> None:
        """Begin the object's first nested value; if it holds the arguments of a call, report the
        call."""
        header = _loads("".join(self._object) + "null}") if bracket == "{" else None
        name = header and header.get("name")
        if header and isinstance(name, str) and list(header)[-1] in _ARGUMENTS:
            self._start_call(name)
            self._part = _Part.ARGUMENTS
        else:
            self._part = _Part.OTHER

    def _pass_on(self, text: str) -> None:
        if self._part is _Part.ARGUMENTS:
            self._arguments(text)
        elif self._part is not _Part.TAIL:
            self._object.append(text)

    def _close_object(self) -> None:
        if self._part in (_Part.HEADER, _Part.OTHER):
            call = _loads("".join(self._object)) or {}
            found = [call[key] for key in _ARGUMENTS if isinstance(call.get(key), dict)]
            if found and isinstance(call.get("name"), str):
                self._start_call(call["name"])
                self._arguments(_dumps(found[0]))
                self._part = _Part.TAIL
        self._leave_object()

    def _leave_object(self) -> None:
        if self._part in (_Part.HEADER, _Part.OTHER):
            self._release()
            self._state = self._no_call
        else:
            self._state = self._after_call

    def _start_call(self, name: str) -> None:
        self._held = ""
        self._object = []
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        # JSON can hold a lone surrogate, which cannot be sent.
        name = name.encode(errors="replace").decode()
        self._deltas.append(ToolCallStart(self._num_calls, call_id, name))
        self._num_calls += 1

    def _arguments(self, text: str) -> None:
        if text:
            self._deltas.append(ToolCallArguments(self._num_calls - 1, text))


class HermesToolParser(ToolParser):
    """Parser for `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the text,
    which Hermes and Qwen write."""

    opening = ("<tool_call>", "\n")
    closing = ("\n", "</tool_call>")
    separator = "\n"
    arguments_name = "arguments"

    _START, _STOP = opening[0], closing[1]

    def __init__(self) -> None:
        super().__init__()
        self._marker = StopMatcher([self._START])

    def _begin(self, text: str) -> str:
        text = self._held + self._marker.push(text)
        content = text.rstrip(BLANK)
        self._content(content)
        self._held = text[len(content) :]
        if not self._marker.stopped:
            return ""
        rest = self._marker.rest
        self._held += self._START
        self._marker = StopMatcher([self._START])
        self._state = self._behind_start
        return rest

    def _behind_start(self, text: str) -> str:
        rest = text.lstrip(BLANK)
        self._held += text[: len(text) - len(rest)]
        if not rest:
            return ""
        if rest[0] == "{":
            return self._start_object(rest)
        self._release()
        return self._no_call(rest)

    def _no_call(self, text: str) -> str:
        self._state = self._begin
        return text

    def _after_call(self, text: str) -> str:
        self._held = (self._held + text).lstrip(BLANK)
        if self._held.startswith(self._STOP):
            rest, self._held = self._held[len(self._STOP) :], ""
            self._state = self._behind_stop
            return rest
        if self._STOP.startswith(self._held):
            return ""
        rest, self._held = self._held, ""
        self._state = self._begin
        return rest

    def _behind_stop(self, text: str) -> str:
        rest = text.lstrip(BLANK)
        if rest:
            self._state = self._begin
        return rest

    def _end(self) -> None:
        if self._state == self._after_call:
            self._held = ""  # drop the beginning of the end marker
        self._release()
        self._content(self._marker.flush())


class Llama3JsonToolParser(ToolParser):
    """Parser for a text of nothing but `{"name": ..., "parameters": {...}}`, several of which are
    separated by `;`, as Llama 3 writes.

    `<|python_tag|>` may come first. It is a special token and so mostly no part of the text.
    """

    separator = "; "
    arguments_name = "parameters"

    _TAG = "<|python_tag|>"

    def _begin(self, text: str) -> str:
        self._held += text
        begin = self._held.lstrip(BLANK).removeprefix(self._TAG).lstrip(BLANK)
        if self._TAG.startswith(begin):
            return ""
        self._held = self._held[: len(self._held) - len(begin)]
        if begin[0] == "{":
            return self._start_object(begin)
        self._release()
        return self._no_call(begin)

    def _no_call(self, text: str) -> str:
        self._content(text)
        self._state = self._no_call
        return ""

    def _after_call(self, text: str) -> str:
        self._held = (self._held + text).lstrip(BLANK)
        begin = self._held.removeprefix(";").lstrip(BLANK)
        if not begin:
            return ""
        self._held = self._held[: len(self._held) - len(begin)]
        if begin[0] == "{":
            return self._start_object(begin)
        self._release()
        return self._no_call(begin)

    def _end(self) -> None:
        if self._state == self._after_call:
            self._held = ""  # drop a separator
        self._release()


def _dumps(value: dict[str, Any]) -> str:
    """Return JSON as readable as it can be sent: lone surrogates stay escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _loads(text: str) -> dict[str, Any] | None:
    """Return the JSON object, or None if the text is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

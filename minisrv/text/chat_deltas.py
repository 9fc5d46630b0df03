"""The pieces into which a chat model's text is parsed as it comes: content, reasoning, tool calls.

Knows: the kinds of pieces. Knows nothing of how a model spells them, or of OpenAI's JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

BLANK = " \t\r\n"
"""Characters that count as part of a marker where they stand around it."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the reasoning, which comes before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The beginning of a tool call. `index` counts the answer's calls from 0; `id` is unique."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the arguments of call `index`: JSON as the model writes it, which may be
    broken."""

    index: int
    text: str


ChatDelta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call; `arguments` is JSON, unless the model broke it or was cut short."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ChatMessage:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def assemble(deltas: Iterable[ChatDelta]) -> ChatMessage:
    """Assemble deltas into a whole message."""
    message = ChatMessage()
    calls = message.tool_calls
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                message.content += text
            case ReasoningDelta(text):
                message.reasoning += text
            case ToolCallStart(_, id, name):
                calls.append(ToolCall(id, name, ""))
            case ToolCallArguments(index, text):
                calls[index] = replace(calls[index], arguments=calls[index].arguments + text)
    return message

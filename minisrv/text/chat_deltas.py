"""What a chat model's text turns into, piece by piece: content, reasoning, tool calls.

Knows: the kinds of pieces. Knows nothing of how a model spells them, or of OpenAI's JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

BLANK = " \t\r\n"
"""Characters around markers that belong to the markers."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what comes before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins. `index` counts the answer's calls from 0; `id` is unique."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of call `index`: JSON as the model writes it, which may be broken."""

    index: int
    text: str


ChatDelta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; `arguments` is JSON, unless the model broke it or was cut short."""

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
    """The message that the deltas tell of."""
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

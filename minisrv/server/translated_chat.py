"""The chat that a request of another API than chat completions asks for.

Each such body becomes a `ChatCompletionRequest`, and is from then on prepared and answered as any
other chat.

Knows: what a chat consists of. Knows no other API.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import ValidationError

from minisrv.server.errors import validation_error
from minisrv.server.messages import Message, TextPart
from minisrv.server.request_schemas import ChatCompletionRequest
from minisrv.server.strict import RequestBody
from minisrv.server.tools import (
    AllowedTools,
    AllowedToolsChoice,
    FunctionName,
    NamedTool,
    ToolCall,
)


class TranslatedChat(ChatCompletionRequest):
    """The chat that a body of another API asks for."""

    @property
    def cuts_token_limit(self) -> bool:
        return True

    @classmethod
    def of(cls, body: RequestBody, **fields: Any) -> Self:
        """Return the chat with these fields, which `body` asks for. Raises RequestError if they do
        not agree."""
        try:
            chat = cls(model=getattr(body, "model", None), **fields)
        except ValidationError as error:
            raise validation_error(error, {}) from error
        return chat.with_num_bytes(body.num_bytes)


def answer(
    texts: Sequence[TextPart], calls: Sequence[ToolCall], reasoning: Sequence[str]
) -> Message:
    """Return the message of an assistant that consists of these parts."""
    return Message(
        role="assistant",
        content=list(texts),
        tool_calls=list(calls),
        reasoning_content="\n".join(reasoning) if reasoning else None,
    )


def text_part(text: str) -> TextPart:
    """Return a text as part of a message."""
    return TextPart(type="text", text=text)


def named_tool(name: str) -> NamedTool:
    """Return the choice of the tool of this name, which has been validated."""
    return NamedTool(type="function", function=FunctionName.model_construct(name=name))


def allowed_tools(mode: Literal["auto", "required"], names: Iterable[str]) -> AllowedToolsChoice:
    """Return the choice among the tools of these names, which have been validated."""
    tools = AllowedTools(mode=mode, tools=list(map(named_tool, names)))
    return AllowedToolsChoice(type="allowed_tools", allowed_tools=tools)

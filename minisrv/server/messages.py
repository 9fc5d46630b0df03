"""The messages of a chat, as clients send them: those of earlier turns and what the user says now.

Knows: the fields, and what a chat template is given of them. How a template spells them is the
matter of `text.chat_template`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from minisrv.server.strict import HistoryObject, ShortText, Text, refuse
from minisrv.server.tools import MAX_CALLS, CalledFunction, ToolCall
from minisrv.server.unsupported import MESSAGE

MAX_MESSAGES = 4096
MAX_PARTS = 1024


class TextPart(HistoryObject):
    """A part of a message: a text, or the refusal that an assistant gave in place of an answer."""

    type: Literal["text", "refusal"]
    text: Text | None = None
    """The text of a part of type text."""
    refusal: Text | None = None
    """The text of a part of type refusal."""

    @model_validator(mode="after")
    def _holds_what_it_is(self) -> TextPart:
        if getattr(self, self.type) is None:
            raise refuse(self.type, f'{self.type} is needed in a part of the type "{self.type}".')
        return self

    @property
    def text_or_refusal(self) -> str:
        """The text, whichever of the two fields holds it."""
        return (self.text if self.type == "text" else self.refusal) or ""


def _parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_OF_ROLES = {
    "tool_calls": "assistant",
    "function_call": "assistant",
    "tool_call_id": "tool",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "refusal": "assistant",
}


_SAME_ROLES = {"developer": "system", "function": "tool"}
"""Roles that mean the same as another one, which templates know."""


class Message(HistoryObject):
    """A message of a chat."""

    unsupported = MESSAGE

    role: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_ .-]{1,64}$")]
    """Author of the message: system, user, assistant, tool, or another role that the chat template
    renders. `developer` means the same as `system`, and `function` the same as `tool`."""
    content: (
        Annotated[
            list[TextPart],
            Field(max_length=MAX_PARTS, fail_fast=True),
            BeforeValidator(_parts, json_schema_input_type=Text | list[TextPart]),
        ]
        | None
    ) = None
    """The text, or a list of parts. It may be absent only in a message of an assistant, and an
    empty list only in one of an assistant or a tool."""
    name: ShortText | None = None
    """Name of the author or of the tool. Chat templates may ignore it."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] = Field(
        default=[]
    )
    """The tool calls of an assistant."""
    function_call: CalledFunction | None = None
    """The one call of an assistant, in the form that came before tool_calls."""
    tool_call_id: Text | None = None
    """Id of the call whose result a tool's message contains."""
    reasoning_content: Text | None = None
    """The reasoning that came before an assistant's content. Chat templates may ignore it."""
    reasoning: Text | None = None
    """Another name of reasoning_content, which comes first if both are sent."""
    refusal: Text | None = None
    """The refusal that an assistant gave in place of content. If there is no content, the model
    sees it as content."""

    @model_validator(mode="after")
    def _fields_suit_the_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise refuse("content", "content is needed, except in an assistant's message.")
        if self.content == [] and self.role not in ("assistant", "tool", "function"):
            raise refuse("content", "content must hold at least one part.")
        for name, role in _OF_ROLES.items():
            if getattr(self, name) and self.role != role:
                raise refuse(name, f'{name} is only allowed with the role "{role}".')
        if self.tool_calls and self.function_call is not None:
            raise refuse("function_call", "function_call and tool_calls are the same; send one.")
        return self

    @property
    def calls(self) -> list[ToolCall]:
        """The calls of an assistant, in whichever of their two forms they were sent."""
        if self.function_call is None:
            return self.tool_calls
        return [ToolCall(function=self.function_call)]

    @property
    def is_system(self) -> bool:
        """Whether the message is a system message, under either of its names."""
        return _SAME_ROLES.get(self.role, self.role) == "system"

    @property
    def speaks_of_tools(self) -> bool:
        """Whether the message can only be rendered by a template that knows tools."""
        return bool(self.calls) or self.role in ("tool", "function")

    @property
    def holds_broken_calls(self) -> bool:
        """Whether the arguments of any call are not a JSON object."""
        return any(isinstance(call.function.arguments, str) for call in self.calls)

    @property
    def text(self) -> str:
        """The content, or the refusal in its place, as one text."""
        return "\n".join(self._texts)

    @property
    def _texts(self) -> list[str]:
        """The texts of the parts, always one or more."""
        texts = [part.text_or_refusal for part in self.content or ()]
        return texts if any(texts) else [self.refusal or ""]

    def for_template(self, *, whole_calls: bool = False) -> dict[str, Any]:
        """Return the message as chat templates expect it.

        whole_calls: give the arguments of calls as objects even where they were not valid JSON.
        """
        texts = self._texts
        parts = [{"type": "text", "text": text} for text in texts]
        fields: dict[str, Any] = {
            "role": _SAME_ROLES.get(self.role, self.role),
            # Either is converted to what the template takes: see `ChatTemplate`.
            "content": parts if len(parts) > 1 else texts[0],
        }
        if self.name is not None:
            fields["name"] = self.name
        if self.calls:
            fields["tool_calls"] = [call.for_template(whole=whole_calls) for call in self.calls]
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        reasoning = self.reasoning_content or self.reasoning
        if reasoning is not None:
            fields["reasoning_content"] = reasoning
        return fields


Messages: TypeAlias = Annotated[
    list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]
"""The messages of a chat. If several are invalid, validation stops at the first and reports it
alone."""

"""The request bodies of `/v1/messages` and `/v1/messages/count_tokens`, which are Anthropic's, and
the chats that they ask for.

Each body becomes a `TranslatedChat`. Fields are supported, ignored or refused as in
`request_schemas`.

Knows: JSON bodies and what a chat consists of. Knows nothing of tokens, engines or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from minisrv.errors import RequestError
from minisrv.request import MAX_TOP_K
from minisrv.server.messages import MAX_MESSAGES, MAX_PARTS, Message, TextPart
from minisrv.server.request_schemas import ModelName, StopStrings, TokenCount
from minisrv.server.strict import HistoryObject, RequestBody, Strict, Text, refuse
from minisrv.server.structured import Schema, StructuredOutputs
from minisrv.server.tools import (
    MAX_TOOLS,
    CalledFunction,
    Function,
    LongName,
    NamedTool,
    Tool,
    ToolCall,
)
from minisrv.server.translated_chat import (
    TranslatedChat,
    answer,
    named_tool,
    text_part,
)
from minisrv.server.unsupported import MESSAGES_OUTPUT, MESSAGES_PROMPT, MESSAGES_TOOL

# ---- messages --------------------------------------------------------------------------------


class TextBlock(HistoryObject):
    """A part of a message: a text."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(HistoryObject):
    """A part of an assistant's message: reasoning. Its signature is ignored."""

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(HistoryObject):
    """A part of an assistant's message: the call of a tool."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    """Name of the tool, as the model wrote it."""
    input: dict[str, Any]
    """The arguments."""


def _blocks(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of blocks")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts: TypeAlias = Annotated[
    list[TextBlock],
    Field(max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_blocks, json_schema_input_type=Text | list[TextBlock]),
]


class ToolResultBlock(HistoryObject):
    """A part of a user's message: the result of a tool."""

    type: Literal["tool_result"]
    tool_use_id: Text
    """Id of the call whose result this is."""
    content: Texts = Field(default=[])
    """The text, or a list of text blocks."""
    is_error: bool = False
    """Whether the tool failed. The model then sees the text behind the word "Error"."""


Block: TypeAlias = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]

_ROLES = {"tool_result": "user", "tool_use": "assistant", "thinking": "assistant"}
"""The role that a block other than a text may have."""


class MessageParam(HistoryObject):
    """A message of a chat."""

    role: Literal["user", "assistant", "system"]
    """Author of the message."""
    content: Annotated[
        list[Block],
        Field(max_length=MAX_PARTS, fail_fast=True),
        BeforeValidator(_blocks, json_schema_input_type=Text | list[Block]),
    ]
    """The text, or a list of blocks. It may be empty only in a message of an assistant."""

    @model_validator(mode="after")
    def _blocks_suit_the_role(self) -> MessageParam:
        if not self.content and self.role != "assistant":
            raise refuse("content", "content must hold at least one block.")
        for block in self.content:
            role = _ROLES.get(block.type, self.role)
            if role != self.role:
                raise refuse(
                    "content", f'A block of the type {block.type} needs the role "{role}".'
                )
        return self


# ---- tools and settings ----------------------------------------------------------------------


class ToolParam(Strict):
    """A tool that the model may call, and the client runs."""

    unsupported = MESSAGES_TOOL

    name: LongName
    """Name of the tool."""
    type: Literal["custom"] = "custom"
    description: Text | None = None
    """Description of the tool, which the model sees."""
    input_schema: Schema
    """JSON schema of the arguments, which are an object."""
    strict: bool | None = None
    """Has no effect: the arguments of a required call always follow the schema."""
    eager_input_streaming: bool | None = None
    """Has no effect: arguments are always streamed as they are written."""
    cache_control: Any = None
    """Ignored: the prefix cache stores every prompt."""

    def as_function(self) -> Tool:
        """Return the tool as OpenAI describes it."""
        function = Function.model_construct(
            name=self.name,
            description=self.description,
            parameters=self.input_schema,
            strict=self.strict,
        )
        return Tool(type="function", function=function)


class ToolChoiceParam(Strict):
    """Whether the model calls tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: LongName | None = None
    """Name of the tool that the model must call. Needed with type tool, and allowed only there."""
    disable_parallel_tool_use: bool = False
    """Allow one call in an answer. All others are dropped."""

    @model_validator(mode="after")
    def _name_with_its_type(self) -> ToolChoiceParam:
        if (self.type == "tool") != (self.name is not None):
            raise refuse("name", 'name is needed with type "tool", and only there.')
        return self

    def as_function(self) -> Literal["none", "auto", "required"] | NamedTool:
        """Return the choice as OpenAI describes it."""
        if self.type == "any":
            return "required"
        if self.type != "tool":
            return self.type
        assert self.name is not None
        return named_tool(self.name)


class ThinkingParam(Strict):
    """Whether the model reasons before it answers."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: TokenCount | None = None
    """Ignored: the model itself ends its reasoning, which counts towards max_tokens."""
    display: Literal["summarized"] | None = None
    """Has no effect: the reasoning is shown as it is."""

    @property
    def effort(self) -> Literal["none", "medium"] | None:
        """The `reasoning_effort` of the chat; None for the chat template's default."""
        if self.type == "adaptive":
            return None
        return "medium" if self.type == "enabled" else "none"


class OutputFormat(Strict):
    """Format that the text of an answer must have."""

    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]
    """The schema that the text must follow."""


class OutputConfig(Strict):
    """Options for the answer."""

    unsupported = MESSAGES_OUTPUT

    format: OutputFormat | None = None
    """Format that the text must have. Unless the schema allows others, objects have only the
    properties that it declares."""


class MessagesChat(TranslatedChat):
    """The chat that a body asks for."""

    effort_param: ClassVar[str] = "thinking"


class Metadata(HistoryObject):
    """Information about the request."""

    user_id: Text | None = None
    """Ignored."""


# ---- bodies ----------------------------------------------------------------------------------


class _OutputSchema(StructuredOutputs):
    """The schema of `output_config`."""

    param: ClassVar[str] = "output_config"


class CountTokensRequest(RequestBody):
    """The body of POST /v1/messages/count_tokens."""

    unsupported = MESSAGES_PROMPT

    model: ModelName | None = None
    """Name of the model. If absent or empty, the served model is used."""
    messages: Annotated[
        list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    """The chat so far: texts, reasoning, calls of tools and their results. If the last
    message is an assistant's, the answer continues its text. Consecutive messages of one role are
    joined."""
    system: Texts = Field(default=[])
    """The system prompt: a text, or a list of text blocks."""
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default=[]
    )
    """Tools that the model may call."""
    tool_choice: ToolChoiceParam | None = None
    """Whether the model calls tools. none: it is told of no tools. auto (the default if there are
    tools): the model decides. any, or tool with a name: it must call one, or this one, and the
    arguments follow the schema."""
    thinking: ThinkingParam | None = None
    """Whether the model reasons before it answers. enabled and disabled do what medium and none do
    as the reasoning_effort of a chat. If absent or adaptive, the chat template's default
    applies."""
    output_config: OutputConfig | None = None
    """Options for the answer: format says which JSON schema it must follow."""
    cache_control: Any = None
    """Ignored: the prefix cache stores every prompt."""
    speed: Any = None
    """Ignored: there is only one speed."""

    @model_validator(mode="after")
    def _last_message_is_to_be_answered(self) -> CountTokensRequest:
        calls = [block for block in self.messages[-1].content if isinstance(block, ToolUseBlock)]
        if self.messages[-1].role == "assistant" and calls:
            raise refuse(
                "messages",
                "The last message is an assistant's, and calls a tool. Only a text can be "
                "continued; add the result of the call, or leave the call out.",
            )
        return self

    def as_chat(self) -> MessagesChat:
        """Return the chat. Raises RequestError if its parts do not agree."""
        turns = self.messages
        if self.system:
            turns = [MessageParam.model_construct(role="system", content=self.system), *turns]
        choice = self.tool_choice
        output = None if self.output_config is None else self.output_config.format
        schema = None
        if output is not None:
            schema = _OutputSchema.model_validate({"json": output.schema_})
        return MessagesChat.of(
            self,
            messages=list(_chat_messages(turns)),
            continue_final_message=turns[-1].role == "assistant",
            tools=[tool.as_function() for tool in self.tools],
            tool_choice=None if choice is None else choice.as_function(),
            parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
            reasoning_effort=None if self.thinking is None else self.thinking.effort,
            structured_outputs=schema,
            **self._generation_fields(),
        )

    def _generation_fields(self) -> dict[str, Any]:
        """Return the fields of the chat that say how to generate."""
        return {}


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: TokenCount
    """Maximum number of tokens to generate. If it does not fit into the context, the answer may
    fill the context."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature. 0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample only from the smallest set of most likely tokens whose probabilities sum to at least
    this value."""
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    """Sample only from this many most likely tokens. 0 keeps all."""
    stop_sequences: StopStrings = Field(default=[])
    """Strings that end the text. It ends before the first of them that occurs."""
    stream: bool = False
    """Send the answer as server-sent events while it is generated."""
    metadata: Metadata | None = None
    """Ignored."""
    service_tier: Any = None
    """Ignored: there is only one tier."""

    def _generation_fields(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "stream": self.stream,
        }


def _chat_messages(turns: Sequence[MessageParam]) -> Iterator[Message]:
    """Yield the messages of a chat as OpenAI describes them, in which results of tools have
    messages of their own. Raises RequestError."""
    for role, group in groupby(turns, lambda turn: turn.role):
        blocks = [block for turn in group for block in turn.content]
        if len(blocks) > MAX_PARTS:
            raise RequestError(
                f"messages holds {len(blocks)} blocks of one role behind one another; at most "
                f"{MAX_PARTS} are allowed.",
                param="messages",
            )
        if role == "assistant":
            yield _answer(blocks)
            continue
        for is_result, of_kind in groupby(blocks, lambda block: block.type == "tool_result"):
            if is_result:
                yield from map(_result, of_kind)
            else:
                yield Message(role=role, content=_text_parts(of_kind))


def _answer(blocks: Sequence[Block]) -> Message:
    calls = [
        ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=block.input))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    reasoning = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    return answer(_text_parts(blocks), calls, reasoning)


def _result(block: Block) -> Message:
    assert isinstance(block, ToolResultBlock)
    parts = _text_parts(block.content)
    if block.is_error:
        parts = [text_part("Error"), *parts]
    return Message(role="tool", tool_call_id=block.tool_use_id, content=parts)


def _text_parts(blocks: Iterable[Block]) -> list[TextPart]:
    return [text_part(block.text) for block in blocks if isinstance(block, TextBlock)]

"""The response bodies and events of `/v1/messages`: Anthropic's, each as a struct, as in
`response_schemas`.

Knows: the JSON shapes of responses. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta, Raw

from minisrv.server.response_schemas import Body

MESSAGES = "/v1/messages"


def is_anthropic(path: str) -> bool:
    """Whether requests for this path and their responses are Anthropic's."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class AnthropicError(Body):
    """An error: what was wrong, what is allowed, and what to do."""

    type: str
    message: str


class AnthropicErrorResponse(Body, tag_field="type", tag="error"):
    """The body of every response to `/v1/messages` with a status from 400 on, and of an event that
    ends a stream early."""

    error: AnthropicError
    request_id: str


class AnthropicUsage(Body):
    """The token counts of an answer."""

    input_tokens: Annotated[
        int, Meta(description="Number of prompt tokens that were not found in the prefix cache.")
    ]
    cache_creation_input_tokens: Annotated[
        int, Meta(description="Always 0: the prefix cache keeps every prompt by itself.")
    ]
    cache_read_input_tokens: Annotated[
        int, Meta(description="Number of prompt tokens that were found in the prefix cache.")
    ]
    output_tokens: int


class AnthropicTextBlock(Body, tag_field="type", tag="text"):
    """A part of an answer: text. A text without citations has no such field: Vercel's AI SDK
    refuses a null there."""

    text: str


class AnthropicThinkingBlock(Body, tag_field="type", tag="thinking"):
    """A part of an answer: reasoning."""

    thinking: str
    signature: Annotated[
        str, Meta(description="Empty: reasoning that comes back is not checked.")
    ] = ""


class AnthropicToolUseBlock(Body, tag_field="type", tag="tool_use"):
    """A part of an answer: the call of a tool."""

    id: str
    name: str
    input: Annotated[
        Raw,
        Meta(
            description="The arguments. Of arguments that were cut off or are not valid JSON, what "
            "can be read.",
            extra_json_schema={"type": "object"},
        ),
    ]


AnthropicBlock = AnthropicTextBlock | AnthropicThinkingBlock | AnthropicToolUseBlock


class AnthropicMessage(Body, tag_field="type", tag="message"):
    """The response to POST /v1/messages. A stream begins with one that has no content and no reason
    to stop."""

    id: str
    role: Literal["assistant"]
    model: str
    content: list[AnthropicBlock]
    stop_reason: StopReason | None
    stop_sequence: Annotated[
        str | None,
        Meta(description="Which of the stop_sequences ended the answer. Null if none did."),
    ]
    usage: AnthropicUsage


class MessageTokensCount(Body):
    """The response to POST /v1/messages/count_tokens."""

    input_tokens: int


# ---- events of a stream ----------------------------------------------------------------------


class MessageStartEvent(Body, tag_field="type", tag="message_start"):
    """The first event of a stream."""

    message: AnthropicMessage


class PingEvent(Body, tag_field="type", tag="ping"):
    """An event that says nothing; one comes behind the first event."""


class ContentBlockStartEvent(Body, tag_field="type", tag="content_block_start"):
    """The beginning of a part of the answer, whose texts are empty yet."""

    index: int
    content_block: AnthropicBlock


class TextDelta(Body, tag_field="type", tag="text_delta"):
    """A piece of text."""

    text: str


class ThinkingDelta(Body, tag_field="type", tag="thinking_delta"):
    """A piece of reasoning."""

    thinking: str


class SignatureDelta(Body, tag_field="type", tag="signature_delta"):
    """The signature at the end of reasoning, which is empty."""

    signature: str = ""


class InputJsonDelta(Body, tag_field="type", tag="input_json_delta"):
    """A piece of the arguments of a call, as the model writes them."""

    partial_json: str


class ContentBlockDeltaEvent(Body, tag_field="type", tag="content_block_delta"):
    """A piece of a part of the answer."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStopEvent(Body, tag_field="type", tag="content_block_stop"):
    """The end of a part of the answer."""

    index: int


class MessageDelta(Body):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDeltaEvent(Body, tag_field="type", tag="message_delta"):
    """What is known at the end of an answer."""

    delta: MessageDelta
    usage: AnthropicUsage


class MessageStopEvent(Body, tag_field="type", tag="message_stop"):
    """The last event of a stream."""


MessageStreamEvent = (
    MessageStartEvent
    | PingEvent
    | ContentBlockStartEvent
    | ContentBlockDeltaEvent
    | ContentBlockStopEvent
    | MessageDeltaEvent
    | MessageStopEvent
    | AnthropicErrorResponse
)
"""The data of an event, whose name is its `type`."""

MESSAGE_STREAM_EVENTS: tuple[type[Body], ...] = get_args(MessageStreamEvent)

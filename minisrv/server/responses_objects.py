"""The response bodies and events of `/v1/responses`: OpenAI's, each as a struct, as in
`response_schemas`.

Knows: the JSON shapes of responses. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from msgspec import UNSET, Meta, UnsetType, field

from minisrv.server.response_schemas import (
    Body,
    ChatCompletionLogprobsContent,
    ErrorInfo,
)

RESPONSES = "/v1/responses"

Status = Literal["in_progress", "completed", "incomplete"]
"""The status of an item: it is incomplete if the answer was cut off within it."""

# ---- items -----------------------------------------------------------------------------------


class InputText(Body, tag_field="type", tag="input_text"):
    """A text of a message that is not an assistant's, or of the output of a tool."""

    text: str


class OutputText(Body, tag_field="type", tag="output_text"):
    """A text of an assistant's message."""

    text: str
    annotations: list[None] = field(default_factory=list)
    logprobs: Annotated[
        list[ChatCompletionLogprobsContent],
        Meta(description="Empty unless include asks for message.output_text.logprobs."),
    ] = field(default_factory=list)


class RefusalText(Body, tag_field="type", tag="refusal"):
    """A refusal that a client has sent as part of an assistant's message."""

    refusal: str


class ReasoningText(Body, tag_field="type", tag="reasoning_text"):
    """A text of reasoning."""

    text: str


class SummaryText(Body, tag_field="type", tag="summary_text"):
    """A text of reasoning, where a summary was asked for."""

    text: str


class MessageItem(Body, tag_field="type", tag="message"):
    """A message."""

    id: str
    role: Literal["assistant", "user", "system", "developer"]
    status: Status
    content: list[InputText | OutputText | RefusalText]


class FunctionCallItem(Body, tag_field="type", tag="function_call"):
    """The call of a function."""

    id: str
    call_id: str
    name: str
    arguments: Annotated[str, Meta(description="The arguments as JSON text.")]
    status: Status


class FunctionCallOutputItem(Body, tag_field="type", tag="function_call_output"):
    """The output of a function."""

    id: str
    call_id: str | None
    output: str | list[InputText]
    status: Status


class ReasoningItem(Body, tag_field="type", tag="reasoning"):
    """Reasoning. It is in `content`, or in `summary` if a summary was asked for."""

    id: str
    status: Status
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: Annotated[
        str | None,
        Meta(
            description="The reasoning once more, not encrypted, if include asks for "
            "reasoning.encrypted_content."
        ),
    ] = None


OutputItem = MessageItem | FunctionCallItem | ReasoningItem
Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


# ---- responses -------------------------------------------------------------------------------


class ResponseFunctionTool(Body, tag_field="type", tag="function"):
    """A function that the model may call."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ResponseToolChoice(Body, tag_field="type", tag="function"):
    """The function that the model must call."""

    name: str


class ResponseTextFormat(Body):
    """Format of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    strict: bool | UnsetType | None = UNSET


class ResponseText(Body):
    """Options for the text."""

    format: ResponseTextFormat


class ResponseReasoning(Body):
    """Options for the reasoning."""

    effort: str | None
    summary: str | None


class IncompleteDetails(Body):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(Body):
    """The error because of which a response has failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class InputTokensDetails(Body):
    """Details of the input tokens."""

    cached_tokens: Annotated[
        int, Meta(description="Number of input tokens that were found in the prefix cache.")
    ]
    cache_write_tokens: Annotated[
        int, Meta(description="Always 0: the prefix cache keeps every prompt by itself.")
    ] = 0


class OutputTokensDetails(Body):
    """Details of the output tokens."""

    reasoning_tokens: int


class ResponseUsage(Body):
    """The token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(Body):
    """The response to POST /v1/responses, and to GET /v1/responses/{response_id} later."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    store: Annotated[bool, Meta(description="Whether the response can be asked for later.")]
    temperature: float
    text: ResponseText
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice
    tools: list[ResponseFunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    object: Literal["response"] = "response"
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"


class DeletedResponse(Body):
    """The response to DELETE /v1/responses/{response_id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(Body):
    """The response to GET /v1/responses/{response_id}/input_items."""

    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


# ---- events of a stream ----------------------------------------------------------------------


class _Event(Body):
    sequence_number: int


class ResponseCreatedEvent(_Event, tag_field="type", tag="response.created"):
    """The first event of a stream."""

    response: ResponseObject


class ResponseInProgressEvent(_Event, tag_field="type", tag="response.in_progress"):
    """The second event of a stream."""

    response: ResponseObject


class OutputItemAddedEvent(_Event, tag_field="type", tag="response.output_item.added"):
    """The beginning of an item, which is empty yet."""

    output_index: int
    item: OutputItem


class OutputItemDoneEvent(_Event, tag_field="type", tag="response.output_item.done"):
    """The end of an item, which is whole now."""

    output_index: int
    item: OutputItem


class _ItemEvent(_Event):
    item_id: str
    output_index: int


class _PartEvent(_ItemEvent):
    content_index: int


class ContentPartAddedEvent(_PartEvent, tag_field="type", tag="response.content_part.added"):
    """The beginning of the one part of a message or of reasoning, which is empty yet."""

    part: OutputText | ReasoningText


class ContentPartDoneEvent(_PartEvent, tag_field="type", tag="response.content_part.done"):
    """The end of a part."""

    part: OutputText | ReasoningText


class OutputTextDeltaEvent(_PartEvent, tag_field="type", tag="response.output_text.delta"):
    """A piece of text."""

    delta: str
    logprobs: list[ChatCompletionLogprobsContent]


class OutputTextDoneEvent(_PartEvent, tag_field="type", tag="response.output_text.done"):
    """The end of a text."""

    text: str
    logprobs: list[ChatCompletionLogprobsContent]


class ReasoningTextDeltaEvent(_PartEvent, tag_field="type", tag="response.reasoning_text.delta"):
    """A piece of reasoning."""

    delta: str


class ReasoningTextDoneEvent(_PartEvent, tag_field="type", tag="response.reasoning_text.done"):
    """The end of reasoning."""

    text: str


class _SummaryEvent(_ItemEvent):
    summary_index: int


class SummaryPartAddedEvent(
    _SummaryEvent, tag_field="type", tag="response.reasoning_summary_part.added"
):
    """The beginning of reasoning, where a summary was asked for."""

    part: SummaryText


class SummaryPartDoneEvent(
    _SummaryEvent, tag_field="type", tag="response.reasoning_summary_part.done"
):
    """The end of reasoning, where a summary was asked for."""

    part: SummaryText


class SummaryTextDeltaEvent(
    _SummaryEvent, tag_field="type", tag="response.reasoning_summary_text.delta"
):
    """A piece of reasoning, where a summary was asked for."""

    delta: str


class SummaryTextDoneEvent(
    _SummaryEvent, tag_field="type", tag="response.reasoning_summary_text.done"
):
    """The text of reasoning, where a summary was asked for."""

    text: str


class ArgumentsDeltaEvent(
    _ItemEvent, tag_field="type", tag="response.function_call_arguments.delta"
):
    """A piece of the arguments of a call, as the model writes them."""

    delta: str


class ArgumentsDoneEvent(_ItemEvent, tag_field="type", tag="response.function_call_arguments.done"):
    """The end of the arguments of a call."""

    name: str
    arguments: str


class ResponseCompletedEvent(_Event, tag_field="type", tag="response.completed"):
    """The last event of a stream."""

    response: ResponseObject


class ResponseIncompleteEvent(_Event, tag_field="type", tag="response.incomplete"):
    """The last event of a stream that was cut off."""

    response: ResponseObject


class ResponseFailedEvent(_Event, tag_field="type", tag="response.failed"):
    """The last event of a stream that an error has ended."""

    response: ResponseObject


class ErrorEvent(_Event, tag_field="type", tag="error"):
    """The error that ends a stream: in the fields that OpenAI documents, and as the object that its
    servers send and its clients look for."""

    code: str | None
    message: str
    param: str | None
    error: ErrorInfo


ResponseStreamEvent = (
    ResponseCreatedEvent
    | ResponseInProgressEvent
    | OutputItemAddedEvent
    | OutputItemDoneEvent
    | ContentPartAddedEvent
    | ContentPartDoneEvent
    | OutputTextDeltaEvent
    | OutputTextDoneEvent
    | ReasoningTextDeltaEvent
    | ReasoningTextDoneEvent
    | SummaryPartAddedEvent
    | SummaryPartDoneEvent
    | SummaryTextDeltaEvent
    | SummaryTextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
    | ResponseCompletedEvent
    | ResponseIncompleteEvent
    | ResponseFailedEvent
    | ErrorEvent
)
"""The data of an event, whose name is its `type`."""

RESPONSE_STREAM_EVENTS: tuple[type[Body], ...] = get_args(ResponseStreamEvent)

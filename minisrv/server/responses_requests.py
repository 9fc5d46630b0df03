"""The request body of `/v1/responses`, which is OpenAI's, and the chat that it asks for.

The body becomes a `TranslatedChat`. Fields are supported, ignored or refused as in
`request_schemas`. Items of the input are what earlier responses and clients have said; the answer
to one question may consist of several.

Knows: JSON bodies and what a chat consists of. Knows nothing of tokens, engines or HTTP, nor of
where earlier responses are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from msgspec import UNSET
from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from minisrv.errors import RequestError, shown
from minisrv.request import MAX_LOGPROBS
from minisrv.server.messages import MAX_MESSAGES, MAX_PARTS, Message, TextPart
from minisrv.server.request_schemas import ModelName, TokenCount
from minisrv.server.responses_objects import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    RefusalText,
    ResponseFunctionTool,
    ResponseReasoning,
    ResponseText,
    ResponseTextFormat,
    ResponseToolChoice,
    SummaryText,
)
from minisrv.server.strict import (
    HistoryObject,
    RequestBody,
    ShortText,
    Strict,
    Text,
    at_most,
    refuse,
)
from minisrv.server.structured import Schema, StructuredOutputs
from minisrv.server.tools import (
    MAX_TOOLS,
    Arguments,
    CalledFunction,
    Function,
    LongName,
    Tool,
    ToolCall,
    ToolChoice,
)
from minisrv.server.translated_chat import (
    TranslatedChat,
    allowed_tools,
    answer,
    named_tool,
    text_part,
)
from minisrv.server.unsupported import RESPONSES_BODY, RESPONSES_REASONING, RESPONSES_TOOL

OWN_REASONING = "minisrv:"
"""What `encrypted_content` of this server's own reasoning begins with."""


# ---- items -----------------------------------------------------------------------------------


class ContentPart(HistoryObject):
    """A part of a message: a text, or the refusal that an assistant gave in place of an answer."""

    type: Literal["input_text", "output_text", "refusal"]
    text: Text | None = None
    """The text of a part of another type than refusal."""
    refusal: Text | None = None
    """The text of a part of type refusal."""

    @model_validator(mode="after")
    def _holds_what_it_is(self) -> ContentPart:
        field = "refusal" if self.type == "refusal" else "text"
        if getattr(self, field) is None:
            raise refuse(field, f'{field} is needed in a part of the type "{self.type}".')
        return self

    def as_part(self) -> TextPart:
        """Return the part as it stands in the message of a chat."""
        return text_part((self.refusal if self.type == "refusal" else self.text) or "")

    def described(self) -> InputText | OutputText | RefusalText:
        """Return the part as a response shows it."""
        if self.type == "refusal":
            return RefusalText(self.refusal or "")
        return (InputText if self.type == "input_text" else OutputText)(self.text or "")


class OutputPart(HistoryObject):
    """A part of the output of a function: a text."""

    type: Literal["input_text"]
    text: Text


def _texts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of parts")
    return value


class InputMessage(HistoryObject):
    """An item of the input: a message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    """Author of the message. `developer` means the same as `system`."""
    content: Annotated[
        Text | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)],
        BeforeValidator(_texts),
    ]
    """The text, or a list of parts. A list may be empty only in a message of an assistant."""

    @model_validator(mode="after")
    def _says_something(self) -> InputMessage:
        if self.content == [] and self.role != "assistant":
            raise refuse("content", "content must hold at least one part.")
        return self

    @property
    def parts(self) -> list[TextPart]:
        """The texts, as they stand in the message of a chat."""
        if isinstance(self.content, str):
            return [text_part(self.content)]
        return [part.as_part() for part in self.content]

    def described(self, id: str) -> MessageItem:
        """Return the item as a response shows it."""
        if isinstance(self.content, list):
            content = [part.described() for part in self.content]
        else:
            kind = OutputText if self.role == "assistant" else InputText
            content = [kind(self.content)]
        return MessageItem(f"msg_{id}", self.role, "completed", content)


class InputFunctionCall(HistoryObject):
    """An item of the input: the call of a function."""

    type: Literal["function_call"]
    call_id: Text
    """Id of the call, which its output names."""
    name: Text
    """Name of the function, as the model wrote it."""
    arguments: Arguments
    """The arguments: a JSON object, or its text. Text that is not a JSON object is passed to the
    model unchanged."""

    def as_call(self) -> ToolCall:
        """Return the call as it stands in the message of a chat."""
        function = CalledFunction.model_construct(name=self.name, arguments=self.arguments)
        return ToolCall(id=self.call_id, function=function)

    def described(self, id: str) -> FunctionCallItem:
        """Return the item as a response shows it. Raises RequestError."""
        arguments = self.arguments
        try:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        except RecursionError as error:
            raise RequestError(
                f"The arguments of call {shown(self.call_id)} are nested too deeply.",
                param="input",
            ) from error
        return FunctionCallItem(f"fc_{id}", self.call_id, self.name, text, "completed")


class InputFunctionCallOutput(HistoryObject):
    """An item of the input: the output of a function."""

    type: Literal["function_call_output"]
    call_id: Text | None = None
    """Id of the call whose output this is."""
    output: Annotated[
        Text | Annotated[list[OutputPart], Field(max_length=MAX_PARTS, fail_fast=True)],
        BeforeValidator(_texts),
    ]
    """The text, or a list of texts."""

    def as_message(self) -> Message:
        """Return the message of a chat that holds the output."""
        texts = [self.output] if isinstance(self.output, str) else [p.text for p in self.output]
        parts = [text_part(text) for text in texts]
        return Message(role="tool", tool_call_id=self.call_id, content=parts)

    def described(self, id: str) -> FunctionCallOutputItem:
        """Return the item as a response shows it."""
        output = self.output
        shown = output if isinstance(output, str) else [InputText(part.text) for part in output]
        return FunctionCallOutputItem(f"fco_{id}", self.call_id, shown, "completed")


class InputReasoningText(HistoryObject):
    """A part of reasoning: a text."""

    type: Literal["reasoning_text"]
    text: Text


class InputSummaryText(HistoryObject):
    """A part of reasoning: a text, where a summary was asked for."""

    type: Literal["summary_text"]
    text: Text


class InputReasoning(HistoryObject):
    """An item of the input: reasoning. Chat templates may ignore it."""

    type: Literal["reasoning"]
    summary: Annotated[list[InputSummaryText], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(
        default=[]
    )
    """The reasoning, if content and encrypted_content have none."""
    content: Annotated[list[InputReasoningText], Field(max_length=MAX_PARTS, fail_fast=True)] = (
        Field(default=[])
    )
    """The reasoning."""
    encrypted_content: Text | None = None
    """The reasoning as this server has sent it. That of other servers is ignored."""

    @property
    def text(self) -> str:
        """The reasoning; empty if it cannot be read."""
        own = self.encrypted_content or ""
        if not self.content and own.startswith(OWN_REASONING):
            return own.removeprefix(OWN_REASONING)
        return "\n".join(part.text for part in self.content or self.summary)

    def described(self, id: str) -> ReasoningItem:
        """Return the item as a response shows it."""
        summary = [SummaryText(part.text) for part in self.summary]
        content = [ReasoningText(part.text) for part in self.content]
        return ReasoningItem(f"rs_{id}", "completed", summary, content, self.encrypted_content)


class ItemReference(HistoryObject):
    """An item of the input: one of an earlier response, by its id."""

    type: Literal["item_reference"]
    id: Annotated[ShortText, Field(min_length=1)]
    """Id of the item."""


SaidItem: TypeAlias = InputMessage | InputFunctionCall | InputFunctionCallOutput | InputReasoning


def _with_type(value: Any) -> Any:
    """Return an item with its type: one without is a message."""
    if isinstance(value, dict) and value.get("type") is None:
        return value | {"type": "message"}
    return value


InputItem: TypeAlias = Annotated[
    Annotated[SaidItem | ItemReference, Field(discriminator="type")], BeforeValidator(_with_type)
]
Items: TypeAlias = Annotated[
    list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]

STORED_ITEMS: TypeAdapter[list[SaidItem]] = TypeAdapter(
    list[Annotated[SaidItem, Field(discriminator="type")]]
)
"""Reads items that have been stored."""


def _items(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of items")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


# ---- tools and settings ----------------------------------------------------------------------


class FunctionTool(Strict):
    """A function that the model may call."""

    unsupported = RESPONSES_TOOL

    type: Literal["function"]
    name: LongName
    """Name of the function."""
    description: Text | None = None
    """Description of the function, which the model sees."""
    parameters: Schema | None = None
    """JSON schema of the arguments, which are an object. If absent, the function has no
    arguments."""
    strict: bool | None = None
    """Has no effect: the arguments of a required call always follow the schema."""

    def as_tool(self) -> Tool:
        """Return the tool as chat completions have it."""
        function = Function.model_construct(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            strict=self.strict,
        )
        return Tool(type="function", function=function)

    def described(self) -> ResponseFunctionTool:
        """Return the tool as a response shows it."""
        parameters = None if self.parameters is None else json.loads(self.parameters)
        return ResponseFunctionTool(self.name, self.description, parameters, self.strict)


class FunctionChoice(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: LongName


class AllowedTools(Strict):
    """The functions that the model may call, of those in tools. It is told of no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    """Whether the model must call one of them."""
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(Strict):
    """Format that the text of an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    """Name of the schema. Ignored, because the model does not see it."""
    description: Text | None = None
    """Ignored, because the model does not see it."""
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    """The schema that the text must follow. Needed with type json_schema, and allowed only
    there."""
    strict: bool | None = None
    """Has no effect: the text always follows the schema, and objects have only the properties that
    it declares, unless it allows others."""

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise refuse("schema", 'schema is needed with type "json_schema", and only there.')
        return self

    def described(self) -> ResponseTextFormat:
        """Return the format as a response shows it."""
        if self.schema_ is None:
            return ResponseTextFormat(self.type)
        return ResponseTextFormat(
            self.type,
            UNSET if self.name is None else self.name,
            self.description,
            json.loads(self.schema_),
            self.strict,
        )


class TextOptions(Strict):
    """Options for the text of an answer."""

    format: TextFormat | None = None
    """Format that the text must have: any text, a JSON object, or JSON that follows a schema."""
    verbosity: Any = None
    """Ignored: it is a hint for models that were trained to follow it."""


class _TextForm(StructuredOutputs):
    """The format that `text.format` asks for."""

    param: ClassVar[str] = "text.format"


class ReasoningOptions(Strict):
    """Options for the reasoning."""

    unsupported = RESPONSES_REASONING

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """How much the model reasons before it answers."""
    summary: Literal["auto", "detailed"] | None = None
    """Send the reasoning as the summary of itself, for clients that look only there. It is not
    shortened."""


class StreamOptions(Strict):
    """Options of a stream."""

    include_obfuscation: bool = False
    """Ignored."""


Include: TypeAlias = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(RequestBody):
    """The body of POST /v1/responses."""

    unsupported = RESPONSES_BODY

    model: ModelName | None = None
    """Name of the model. If absent or empty, the served model is used."""
    input: Annotated[Items, BeforeValidator(_items, json_schema_input_type=Text | Items)]
    """What the model is to answer: a text, or a list of items, which are messages, calls of
    functions and their outputs, reasoning, and references to items of stored responses. Items of
    an assistant that follow one another are one answer."""
    instructions: Text | None = None
    """A system message in front of everything else. It is not part of what
    previous_response_id carries on."""
    previous_response_id: Annotated[ShortText, Field(min_length=1)] | None = None
    """Id of a stored response whose input and output come before this input."""
    store: bool | None = None
    """Store the response, so that it can be asked for and carried on later. It is stored unless
    this is false. With several API workers, or replicas of Ray Serve, nothing can be stored, and
    true is refused."""
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default=[]
    )
    """Functions that the model may call. Tools that OpenAI's servers run are refused."""
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    """Whether the model calls tools. none: it is told of no tools. auto (the default): the model
    decides. required, or a function: it must call one, or this one, and the arguments follow the
    schema. allowed_tools: it may, or must, call some of the tools, and is told of no others."""
    parallel_tool_calls: bool = True
    """Allow several tool calls in one answer. If false, all but the first are dropped."""
    text: TextOptions | None = None
    """Options for the text: format says which JSON it must be."""
    reasoning: ReasoningOptions | None = None
    """Options for the reasoning. effort does what reasoning_effort does in a chat. summary sends
    the reasoning as the summary of itself."""
    max_output_tokens: TokenCount | None = None
    """Maximum number of tokens to generate, reasoning included. If it does not fit into the
    context, the answer may fill the context."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature. 0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample only from the smallest set of most likely tokens whose probabilities sum to at least
    this value."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report this many most likely alternatives to each token. Needs include to ask for
    message.output_text.logprobs, unless it is 0."""
    include: Annotated[list[Include], Field(max_length=64)] = Field(default=[])
    """What else to report: message.output_text.logprobs are the log-probabilities of the tokens of
    texts, and reasoning.encrypted_content is the reasoning once more, which is not encrypted. The
    other values are about tools and images, of which there are none."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: drop as many of the oldest turns as do not fit into the context beside
    max_output_tokens. A turn begins with a message of a user; system messages in front of the first
    stay. disabled: refuse a conversation that does not fit."""
    stream: bool = False
    """Send the answer as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Options of a stream. Ignored."""
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], ShortText], Field(max_length=16), at_most(16)
    ] = Field(default={})
    """Returned with the response."""
    user: ShortText | None = None
    """Ignored."""
    safety_identifier: ShortText | None = None
    """Ignored."""
    prompt_cache_key: ShortText | None = None
    """Ignored: it is a hint for routing, and there is only one engine."""
    prompt_cache_options: Any = None
    """Ignored: the prefix cache stores every prompt."""
    prompt_cache_retention: Any = None
    """Ignored: the prefix cache keeps entries as long as there is room."""
    service_tier: Any = None
    """Ignored: there is only one tier."""
    moderation: Any = None
    """Ignored: nothing is moderated."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options is only allowed when stream is true.")
        if self.top_logprobs and not self.reports_logprobs:
            raise refuse(
                "top_logprobs",
                "top_logprobs is only allowed when include holds message.output_text.logprobs.",
            )
        return self

    @property
    def refers(self) -> bool:
        """Whether the input refers to items of stored responses."""
        return any(isinstance(item, ItemReference) for item in self.input)

    @property
    def reports_logprobs(self) -> bool:
        """Whether log-probabilities are reported."""
        return "message.output_text.logprobs" in self.include

    @property
    def encrypts_reasoning(self) -> bool:
        """Whether reasoning is sent as `encrypted_content` as well."""
        return "reasoning.encrypted_content" in self.include

    @property
    def summarizes(self) -> bool:
        """Whether reasoning is sent as a summary."""
        return self.reasoning is not None and self.reasoning.summary is not None

    @property
    def _choice(self) -> ToolChoice | None:
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            return named_tool(choice.name)
        if isinstance(choice, AllowedTools):
            return allowed_tools(choice.mode, [tool.name for tool in choice.tools])
        return choice

    def as_chat(self, said: Sequence[SaidItem]) -> ResponsesChat:
        """Return the chat that holds these items, which the input and what comes before it are.
        Raises RequestError if its parts do not agree."""
        messages = list(_chat_messages(said))
        if self.instructions is not None:
            system = [text_part(self.instructions)]
            messages.insert(0, Message(role="system", content=system))
        if len(messages) > MAX_MESSAGES:
            raise too_many_items(len(messages))
        return ResponsesChat.of(
            self,
            messages=messages,
            tools=[tool.as_tool() for tool in self.tools],
            tool_choice=self._choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            structured_outputs=self._form,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=self.reports_logprobs,
            top_logprobs=(self.top_logprobs or 0) if self.reports_logprobs else None,
            stream=self.stream,
            truncation=self.truncation,
        )

    @property
    def _form(self) -> _TextForm | None:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.schema_ is None:
            return _TextForm.model_validate({"json_object": True})
        return _TextForm.model_validate({"json": form.schema_})

    # ---- as a response shows it ---------------------------------------------------------------

    @property
    def described_text(self) -> ResponseText:
        """The options for the text, as a response shows them."""
        form = None if self.text is None else self.text.format
        return ResponseText((form or TextFormat(type="text")).described())

    @property
    def described_reasoning(self) -> ResponseReasoning:
        """The options for the reasoning, as a response shows them."""
        options = self.reasoning or ReasoningOptions()
        return ResponseReasoning(options.effort, options.summary)

    @property
    def described_choice(self) -> Literal["none", "auto", "required"] | ResponseToolChoice:
        """The choice of tools, as a response shows it."""
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            return ResponseToolChoice(choice.name)
        return choice.mode if isinstance(choice, AllowedTools) else choice or "auto"


class ResponsesChat(TranslatedChat):
    """The chat that a body asks for."""

    prompt_param: ClassVar[str] = "input"
    effort_param: ClassVar[str] = "reasoning.effort"
    truncation: Literal["auto", "disabled"] = "disabled"
    """See ResponsesRequest."""

    @property
    def drops_oldest_turns(self) -> bool:
        return self.truncation == "auto"


def too_many_items(number: int) -> RequestError:
    """Return the error for a conversation of so many items."""
    return RequestError(
        f"The conversation holds {number} items, and {MAX_MESSAGES} are the most; begin a new one.",
        param="input",
    )


def described(items: Iterable[SaidItem], ids: Iterable[str]) -> list[Item]:
    """Return items as a response shows them, with these ids behind the prefix of their kind. Raises
    RequestError for arguments that are nested too deeply."""
    return [item.described(id) for item, id in zip(items, ids, strict=True)]


def _is_answer(item: SaidItem) -> bool:
    """Whether an item is part of an assistant's answer."""
    if isinstance(item, InputMessage):
        return item.role == "assistant"
    return isinstance(item, InputFunctionCall | InputReasoning)


def _chat_messages(items: Sequence[SaidItem]) -> Iterator[Message]:
    """Yield the messages of a chat that consists of these items. Raises RequestError."""
    for is_answer, group in groupby(items, _is_answer):
        if is_answer:
            yield _answer(list(group))
            continue
        for item in group:
            if isinstance(item, InputFunctionCallOutput):
                yield item.as_message()
            elif isinstance(item, InputMessage):
                yield Message(role=item.role, content=item.parts)


def _answer(items: Sequence[SaidItem]) -> Message:
    texts = [part for item in items if isinstance(item, InputMessage) for part in item.parts]
    calls = [item.as_call() for item in items if isinstance(item, InputFunctionCall)]
    reasoning = [item.text for item in items if isinstance(item, InputReasoning) and item.text]
    if len(texts) > MAX_PARTS:
        raise RequestError(
            f"input holds {len(texts)} texts of an assistant behind one another; at most "
            f"{MAX_PARTS} are allowed.",
            param="input",
        )
    return answer(texts, calls, reasoning)

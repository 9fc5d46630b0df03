"""Turns the deltas of an answer into OpenAI's response to `/v1/responses`, streamed or not.

Knows: the shape of the response. Knows nothing of how deltas come about, or of where responses are
stored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from minisrv.request import FinishReason, TokenLogprobs
from minisrv.server import sse
from minisrv.server.block_builder import BlockResponseBuilder
from minisrv.server.errors import error_object, error_status
from minisrv.server.logprobs import chat_logprobs
from minisrv.server.preprocessing import Prepared
from minisrv.server.reasoning_count import ReasoningCount
from minisrv.server.response_schemas import ChatCompletionLogprobsContent, ErrorResponse
from minisrv.server.responses_objects import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    ContentPartAddedEvent,
    ContentPartDoneEvent,
    ErrorEvent,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    OutputItem,
    OutputItemAddedEvent,
    OutputItemDoneEvent,
    OutputText,
    OutputTextDeltaEvent,
    OutputTextDoneEvent,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDeltaEvent,
    ReasoningTextDoneEvent,
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseError,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseObject,
    ResponseStreamEvent,
    ResponseUsage,
    Status,
    SummaryPartAddedEvent,
    SummaryPartDoneEvent,
    SummaryText,
    SummaryTextDeltaEvent,
    SummaryTextDoneEvent,
)
from minisrv.server.responses_requests import OWN_REASONING, ResponsesChat
from minisrv.text.chat_deltas import (
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from minisrv.text.output_processor import CompletionDelta
from minisrv.text.tokenizer import Tokenizer

_ERROR_CODES: dict[int, Literal["rate_limit_exceeded", "invalid_prompt"]] = {
    400: "invalid_prompt",
    429: "rate_limit_exceeded",
}
"""The code of a response that has failed, by the status that the error would have had. Any other is
the server's fault."""


@dataclass(frozen=True)
class ReasoningForm:
    """How reasoning is sent.

    as_summary: as the summary of itself, not as content.
    encrypted: as `encrypted_content` too.
    """

    as_summary: bool
    encrypted: bool


class ResponsesBuilder(BlockResponseBuilder):
    """A `response`: the one answer to a conversation.

    frame: the response as it is before the answer begins; its id is set here.
    keep: is called with the whole response when it has ended, but not when it has failed.
    """

    id_prefix = "resp_"

    def __init__(
        self,
        chat: ResponsesChat,
        frame: ResponseObject,
        tokenizer: Tokenizer,
        reasoning: ReasoningForm,
        keep: Callable[[ResponseObject], None],
    ) -> None:
        super().__init__(chat, frame.model, tokenizer)
        self._frame = replace(frame, id=self.id)
        self._reasoning = reasoning
        self._keep = keep
        self._items: list[OutputItem] = []
        """The items that have begun, with all that has come of them."""
        self._pieces: list[str] = []
        """The text of the last item, in pieces."""
        self._logprobs: list[TokenLogprobs] = []
        """Log-probabilities of tokens whose text has not come yet."""
        self._cut = False
        """Whether the answer was cut off."""
        self._events_sent = 0
        self._num_bytes = chat.num_bytes

    def begin(self, prepared: Prepared) -> None:
        super().begin(prepared)
        self._reasoning_count = ReasoningCount(self._parser, self._tokenizer)

    def _count(self, delta: CompletionDelta) -> None:
        super()._count(delta)
        self._reasoning_count.add(delta.token_ids)

    def size_of(self, deltas: Sequence[CompletionDelta]) -> int:
        # The first and the last events tell of the whole response.
        is_whole = self._first is None or deltas[-1].finish_reason is not None
        return super().size_of(deltas) + (self.size if is_whole else 0)

    @property
    def size(self) -> int:
        # The tools and the schema of the request are part of the response.
        return super().size + self._num_bytes

    @property
    def size_of_end(self) -> int:
        return self.size

    # ---- whole responses ----------------------------------------------------------------------

    def response(self) -> ResponseObject:
        [deltas] = self._deltas
        for delta in deltas:
            self._read(delta)
        return self._ended()

    # ---- streams ------------------------------------------------------------------------------

    def events(self, delta: CompletionDelta) -> bytes:
        is_first = self._first is None
        self._count(delta)
        events: list[ResponseStreamEvent] = []
        if is_first:
            events += [ResponseCreatedEvent(0, self._frame)]
            events += [ResponseInProgressEvent(0, self._frame)]
        return self._encode([*events, *self._read(delta)])

    def last_events(self) -> bytes:
        response = self._ended()
        kind = ResponseIncompleteEvent if self._cut else ResponseCompletedEvent
        return self._encode([kind(0, response)])

    def error_events(self, error: Exception) -> bytes:
        found = error_object(error)
        assert isinstance(found, ErrorResponse)
        info = found.error
        failure = ResponseError(_ERROR_CODES.get(error_status(error), "server_error"), info.message)
        self._complete("incomplete")
        response = replace(self._frame, status="failed", output=self._items, error=failure)
        return self._encode(
            [
                ErrorEvent(0, info.code or info.type, info.message, info.param, info),
                ResponseFailedEvent(0, response),
            ]
        )

    def _encode(self, events: list[ResponseStreamEvent]) -> bytes:
        """Number events and return them as bytes."""
        encoded = b""
        for event in events:
            event.sequence_number = self._events_sent
            self._events_sent += 1
            encoded += sse.tagged_event(event)
        return encoded

    # ---- both ---------------------------------------------------------------------------------

    def _read(self, delta: CompletionDelta) -> list[ResponseStreamEvent]:
        """Add a delta to the items, and return the events that tell of it."""
        ends = delta.finish_reason is not None
        self._logprobs += delta.logprobs or ()
        parts = self._parts(delta.text, ends=ends)
        events: list[ResponseStreamEvent] = []
        for part in parts:
            if self._begins_block(part):
                events += self._complete("completed")
                events += self._begin_item(part)
            events += self._add(part)
        if ends:
            self._cut = delta.finish_reason is FinishReason.LENGTH
            self._keep_last_logprobs()
            events += self._complete("incomplete" if self._cut else "completed")
        return events

    def _begin_item(self, part: ChatDelta) -> list[ResponseStreamEvent]:
        """Begin the item that `part` is the first of, and return the events that tell of it."""
        index, id = len(self._items), uuid.uuid4().hex
        item: OutputItem
        events: list[ResponseStreamEvent] = []
        match part:
            case ToolCallStart(_, call_id, name):
                item = FunctionCallItem(f"fc_{id}", call_id, name, "", "in_progress")
            case ReasoningDelta():
                item = ReasoningItem(f"rs_{id}", "in_progress", [], [])
                if self._reasoning.as_summary:
                    events = [SummaryPartAddedEvent(0, item.id, index, 0, SummaryText(""))]
                else:
                    events = [ContentPartAddedEvent(0, item.id, index, 0, ReasoningText(""))]
            case _:
                item = MessageItem(f"msg_{id}", "assistant", "in_progress", [])
                events = [ContentPartAddedEvent(0, item.id, index, 0, OutputText(""))]
        self._pieces = []
        self._items.append(item)
        # The item goes on to grow, and the event tells of it as it is now.
        return [OutputItemAddedEvent(0, index, replace(item)), *events]

    def _add(self, part: ChatDelta) -> list[ResponseStreamEvent]:
        """Add a part to the last item, and return the events that tell of it."""
        index = len(self._items) - 1
        item = self._items[index]
        match part:
            case ContentDelta(text):
                assert isinstance(item, MessageItem)
                if not item.content:
                    item.content = [OutputText("")]
                found = self._take_logprobs()
                self._message_text(item).logprobs += found
                self._pieces.append(text)
                return [OutputTextDeltaEvent(0, item.id, index, 0, text, found)]
            case ReasoningDelta(text):
                self._logprobs.clear()
                self._pieces.append(text)
                if self._reasoning.as_summary:
                    return [SummaryTextDeltaEvent(0, item.id, index, 0, text)]
                return [ReasoningTextDeltaEvent(0, item.id, index, 0, text)]
            case ToolCallArguments(_, text):
                self._logprobs.clear()
                self._pieces.append(text)
                return [ArgumentsDeltaEvent(0, item.id, index, text)]
            case ToolCallStart():
                self._logprobs.clear()
        return []

    def _complete(self, status: Status) -> list[ResponseStreamEvent]:
        """Complete the last item, if there is one and it is not complete yet, and return the events
        that tell of it."""
        if not self._items or self._items[-1].status != "in_progress":
            return []
        index, item = len(self._items) - 1, self._items[-1]
        item.status = status
        text = "".join(self._pieces)
        events: list[ResponseStreamEvent]
        match item:
            case FunctionCallItem():
                item.arguments = text
                events = [ArgumentsDoneEvent(0, item.id, index, item.name, text)]
            case MessageItem():
                part = self._message_text(item)
                part.text = text
                events = [
                    OutputTextDoneEvent(0, item.id, index, 0, text, part.logprobs),
                    ContentPartDoneEvent(0, item.id, index, 0, part),
                ]
            case ReasoningItem():
                if self._reasoning.encrypted:
                    item.encrypted_content = OWN_REASONING + text
                if self._reasoning.as_summary:
                    item.summary = [SummaryText(text)]
                    events = [
                        SummaryTextDoneEvent(0, item.id, index, 0, text),
                        SummaryPartDoneEvent(0, item.id, index, 0, item.summary[0]),
                    ]
                else:
                    item.content = [ReasoningText(text)]
                    events = [
                        ReasoningTextDoneEvent(0, item.id, index, 0, text),
                        ContentPartDoneEvent(0, item.id, index, 0, item.content[0]),
                    ]
        return [*events, OutputItemDoneEvent(0, index, item)]

    def _keep_last_logprobs(self) -> None:
        """Add the log-probabilities of the tokens that end the answer to its text, if it ends with
        one."""
        if self._items and isinstance(self._items[-1], MessageItem):
            self._message_text(self._items[-1]).logprobs += self._take_logprobs()

    @staticmethod
    def _message_text(item: MessageItem) -> OutputText:
        """Return the one part of a message of this answer."""
        [part] = item.content
        assert isinstance(part, OutputText)
        return part

    def _take_logprobs(self) -> list[ChatCompletionLogprobsContent]:
        """Return the log-probabilities that wait for their text, as far as they are asked for."""
        taken, self._logprobs = self._logprobs, []
        number = self._num_logprobs
        return chat_logprobs(self._tokenizer, taken, number, by_id=False).content

    def _ended(self) -> ResponseObject:
        """Return the whole response, and have it kept."""
        response = replace(
            self._frame,
            status="incomplete" if self._cut else "completed",
            output=self._items,
            completed_at=None if self._cut else int(time.time()),
            incomplete_details=IncompleteDetails("max_output_tokens") if self._cut else None,
            usage=self._usage,
        )
        self._keep(response)
        return response

    @property
    def _usage(self) -> ResponseUsage:
        [prompt], [cached], [completion] = (
            self._prompts,
            self._cached_tokens,
            self._completion_tokens,
        )
        reasoning = OutputTokensDetails(reasoning_tokens=self._reasoning_count.number)
        return ResponseUsage(
            input_tokens=len(prompt),
            input_tokens_details=InputTokensDetails(cached_tokens=cached),
            output_tokens=completion,
            output_tokens_details=reasoning,
            total_tokens=len(prompt) + completion,
        )

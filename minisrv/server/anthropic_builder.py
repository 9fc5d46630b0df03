"""Turns the deltas of an answer into Anthropic's response to `/v1/messages`, streamed or not.

Knows: the shape of the response. Knows nothing of how deltas come about.
"""

from __future__ import annotations

import json

from msgspec import Raw

from minisrv.request import FinishReason
from minisrv.server import sse
from minisrv.server.anthropic_responses import (
    MESSAGES,
    AnthropicBlock,
    AnthropicMessage,
    AnthropicTextBlock,
    AnthropicThinkingBlock,
    AnthropicToolUseBlock,
    AnthropicUsage,
    ContentBlockDeltaEvent,
    ContentBlockStartEvent,
    ContentBlockStopEvent,
    InputJsonDelta,
    MessageDelta,
    MessageDeltaEvent,
    MessageStartEvent,
    MessageStopEvent,
    MessageStreamEvent,
    PingEvent,
    SignatureDelta,
    StopReason,
    TextDelta,
    ThinkingDelta,
)
from minisrv.server.block_builder import BlockResponseBuilder
from minisrv.server.errors import error_object
from minisrv.server.request_schemas import ChatCompletionRequest
from minisrv.server.tools import readable_arguments
from minisrv.text.chat_deltas import (
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from minisrv.text.output_processor import CompletionDelta
from minisrv.text.tokenizer import Tokenizer

_NOTHING = Raw(b"{}")


class MessageResponseBuilder(BlockResponseBuilder):
    """A `message`: the one answer to a conversation."""

    id_prefix = "msg_"

    def __init__(self, request: ChatCompletionRequest, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self._stop_sequences = request.stop
        self._max_tokens = request.token_limit
        self._blocks: list[AnthropicBlock] = []
        """The blocks that have begun. Of a stream they hold only what their beginning held."""
        self._last: CompletionDelta | None = None

    # ---- whole responses ----------------------------------------------------------------------

    def response(self) -> AnthropicMessage:
        [deltas] = self._deltas
        self._last = deltas[-1]
        arguments = ""
        for part in self._parts("".join([delta.text for delta in deltas]), ends=True):
            if self._begins_block(part):
                self._blocks.append(_new_block(part))
                arguments = ""
            block = self._blocks[-1]
            match part, block:
                case ContentDelta(text), AnthropicTextBlock():
                    block.text += text
                case ReasoningDelta(text), AnthropicThinkingBlock():
                    block.thinking += text
                case ToolCallArguments(_, text), AnthropicToolUseBlock():
                    arguments += text
                    block.input = _input(arguments)
        return self._message(self._blocks, self._stop_reason())

    # ---- streams ------------------------------------------------------------------------------

    def events(self, delta: CompletionDelta) -> bytes:
        is_first = self._first is None
        self._count(delta)
        events: list[MessageStreamEvent] = []
        if is_first:
            events += [MessageStartEvent(self._message([], None)), PingEvent()]
        ends = delta.finish_reason is not None
        for part in self._parts(delta.text, ends=ends):
            events += self._part_events(part)
        if ends:
            self._last = delta
            events += self._end_block()
        return b"".join(map(sse.tagged_event, events))

    def last_events(self) -> bytes:
        reason = MessageDelta(self._stop_reason(), self._stop_sequence)
        ends = (MessageDeltaEvent(reason, self._usage), MessageStopEvent())
        return b"".join(map(sse.tagged_event, ends))

    def error_events(self, error: Exception) -> bytes:
        return sse.tagged_event(error_object(error, MESSAGES))

    def _part_events(self, part: ChatDelta) -> list[MessageStreamEvent]:
        events: list[MessageStreamEvent] = []
        if self._begins_block(part):
            events += self._end_block()
            block = _new_block(part)
            events.append(ContentBlockStartEvent(len(self._blocks), block))
            self._blocks.append(block)
        delta: TextDelta | ThinkingDelta | InputJsonDelta
        match part:
            case ContentDelta(text):
                delta = TextDelta(text)
            case ReasoningDelta(text):
                delta = ThinkingDelta(text)
            case ToolCallArguments(_, text):
                delta = InputJsonDelta(text)
            case ToolCallStart():
                return events
        return [*events, ContentBlockDeltaEvent(len(self._blocks) - 1, delta)]

    def _end_block(self) -> list[MessageStreamEvent]:
        """Return the events that end the last block, if there is one."""
        if not self._blocks:
            return []
        index = len(self._blocks) - 1
        events: list[MessageStreamEvent] = []
        if isinstance(self._blocks[-1], AnthropicThinkingBlock):
            events.append(ContentBlockDeltaEvent(index, SignatureDelta()))
        return [*events, ContentBlockStopEvent(index)]

    # ---- both ---------------------------------------------------------------------------------

    def _message(
        self, content: list[AnthropicBlock], stop_reason: StopReason | None
    ) -> AnthropicMessage:
        return AnthropicMessage(
            id=self.id,
            role="assistant",
            model=self._model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._usage,
        )

    @property
    def _usage(self) -> AnthropicUsage:
        [prompt], [cached], [completion] = (
            self._prompts,
            self._cached_tokens,
            self._completion_tokens,
        )
        return AnthropicUsage(
            input_tokens=len(prompt) - cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=cached,
            output_tokens=completion,
        )

    @property
    def _stop_sequence(self) -> str | None:
        """The one of the request's stop sequences that ended the answer."""
        found = None if self._last is None else self._last.stop_reason
        return found if isinstance(found, str) and found in self._stop_sequences else None

    def _stop_reason(self) -> StopReason:
        assert self._last is not None
        if self._last.finish_reason is FinishReason.LENGTH:
            # The limit is cut to the context's room where it does not fit.
            is_cut = self._max_tokens is not None and self._completion_tokens[0] < self._max_tokens
            return "model_context_window_exceeded" if is_cut else "max_tokens"
        if self._stop_sequence is not None:
            return "stop_sequence"
        return "tool_use" if self._called else "end_turn"


def _new_block(part: ChatDelta) -> AnthropicBlock:
    """Return the block that begins with `part`, as it is before its text."""
    match part:
        case ToolCallStart(_, id, name):
            return AnthropicToolUseBlock(id=id, name=name, input=_NOTHING)
        case ReasoningDelta():
            return AnthropicThinkingBlock(thinking="")
        case _:
            return AnthropicTextBlock(text="")


def _input(arguments: str) -> Raw:
    """Return the arguments of a call as a JSON object: as the model wrote them if they are one that
    every client can read. Lone surrogates, which strict parsers refuse, are replaced."""
    found = None
    try:
        found = json.loads(arguments, parse_constant=_refuse)
        if isinstance(found, dict):
            json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
            return Raw(arguments.encode())
    except (ValueError, RecursionError):
        pass
    if not isinstance(found, dict):
        found = readable_arguments(arguments)
    try:
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        return Raw(text.encode(errors="replace"))
    except (ValueError, RecursionError):  # a number that JSON cannot hold, or of too many digits
        return _NOTHING


def _refuse(constant: str) -> None:
    """Raise ValueError for NaN and the infinities, which Python reads although JSON has none."""
    raise ValueError(f"{constant} is not JSON")

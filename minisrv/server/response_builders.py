"""Turns deltas into response bodies: what all builders have in common, and OpenAI's completions and
chat, streamed or not.

A builder is made for one response and fed every delta once, either through `events` (streamed) or
through `add` and then `response` (not streamed).

Knows: which fields of a body a request asks for. Knows nothing of how deltas come about.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from msgspec import UNSET, UnsetType

from minisrv.request import TokenLogprobs
from minisrv.server import sse
from minisrv.server.errors import error_object
from minisrv.server.logprobs import CompletionLogprobsWriter, chat_logprobs, prompt_logprobs
from minisrv.server.preprocessing import Prepared
from minisrv.server.reasoning_count import ReasoningCount
from minisrv.server.request_schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from minisrv.server.response_schemas import (
    Body,
    ChatCompletionChoice,
    ChatCompletionLogprobs,
    ChatCompletionResponse,
    ChatCompletionStreamChoice,
    ChatCompletionStreamResponse,
    ChatCompletionToolCall,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    CompletionStreamChoice,
    CompletionStreamResponse,
    CompletionTokenUsageInfo,
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
    PromptLogprobs,
    PromptTokenUsageInfo,
    UsageInfo,
)
from minisrv.text.chat_deltas import (
    ChatDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    assemble,
)
from minisrv.text.chat_format import ChatParser
from minisrv.text.output_processor import CompletionDelta
from minisrv.text.tokenizer import Tokenizer


class ResponseBuilder(ABC):
    """What every response has: an id, the counts of its tokens, and the deltas of its choices."""

    id_prefix: ClassVar[str]

    def __init__(self, request: GenerationRequest, model: str, tokenizer: Tokenizer) -> None:
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._model = model
        self._tokenizer = tokenizer
        self._num_logprobs = request.num_logprobs or 0
        self._prompt_logprobs = request.prompt_logprobs
        self._choices_per_prompt = request.n
        self._prompts: Sequence[list[int]] = ()
        self._deltas: list[list[CompletionDelta]] = []
        self._first: float | None = None
        """When the first delta came, by `time.perf_counter`; None before that."""
        self._completion_tokens: list[int] = []
        self._cached_tokens: list[int] = []
        """Prompt tokens of each choice found in the prefix cache; all choices of a prompt found the
        same."""

    def begin(self, prepared: Prepared) -> None:
        """Set the prompts, each of which belongs to the next `n` choices. Must be called before any
        delta."""
        self._prompts = prepared.prompts
        number = len(self._prompts) * self._choices_per_prompt
        self._deltas = [[] for _ in range(number)]
        self._completion_tokens = [0] * number
        self._cached_tokens = [0] * number

    def log_fields(self, arrival: float) -> dict[str, Any]:
        """Return the numbers that the access log may hold about this response.

        arrival: when the request arrived, by `time.perf_counter`.
        """
        first = {} if self._first is None else {"first_ms": round(1e3 * (self._first - arrival), 1)}
        return {
            **first,
            "prompt_tokens": sum(map(len, self._prompts)),
            "completion_tokens": sum(self._completion_tokens),
        }

    def add(self, delta: CompletionDelta) -> None:
        """Keep a delta for `response`."""
        self._count(delta)
        self._deltas[delta.index].append(delta)

    def size_of(self, deltas: Sequence[CompletionDelta]) -> int:
        """Return about how many numbers and texts the events of these deltas hold besides what the
        deltas add to the answer."""
        return self._prompt_size(deltas)

    @property
    def size(self) -> int:
        """Approximate number of numbers and texts in `response`."""
        told = sum(self._completion_tokens) * (1 + self._num_logprobs)
        return told + self._prompt_size(deltas[0] for deltas in self._deltas if deltas)

    @property
    def size_of_end(self) -> int:
        """Approximate number of numbers and texts in the events that end a stream."""
        return 0

    def _prompt_size(self, deltas: Iterable[CompletionDelta]) -> int:
        number = sum(len(delta.prompt_logprobs) for delta in deltas)
        return number * (1 + max(self._num_logprobs, self._prompt_logprobs or 0))

    @abstractmethod
    def events(self, delta: CompletionDelta) -> bytes:
        """Return the events of a delta as bytes; empty if there is nothing to report."""

    @abstractmethod
    def last_events(self) -> bytes:
        """Return the events that end a stream. Must be called after the last delta."""

    @abstractmethod
    def error_events(self, error: Exception) -> bytes:
        """Return the events that end a stream early, because of `error`."""

    @abstractmethod
    def response(self) -> Body:
        """Return the body of a response that is not streamed. Must be called after the last
        delta."""

    def _count(self, delta: CompletionDelta) -> None:
        if self._first is None:
            self._first = time.perf_counter()
        self._completion_tokens[delta.index] += len(delta.token_ids)
        self._cached_tokens[delta.index] += delta.num_cached_tokens


class OpenAIResponseBuilder(ResponseBuilder):
    """Common part of the responses of completions and chat completions: chunks, usage,
    extensions."""

    def __init__(self, request: GenerationRequest, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self._created = int(time.time())
        self._return_token_ids = request.return_token_ids
        self._spells_token_ids = request.return_tokens_as_token_ids
        self._report_steps = request.include_graph_steps
        self._include_usage = request.include_usage
        self._continuous_usage = request.continuous_usage
        self._text_is_all = not (self._return_token_ids or self._continuous_usage)
        """Whether a delta that is neither the first nor the last of its choice has nothing to
        report but its text and logprobs, with the text passed on unchanged."""
        self._chunks = sse.ChunkEncoder(self._new_chunk([], None if self._include_usage else UNSET))
        self._plain: dict[int, tuple[bytes, bytes]] = {}
        """The bytes before and behind the text in an event that reports nothing else, for each
        choice that has begun."""

    def _prompt_of(self, index: int) -> list[int]:
        """Return the prompt of a choice."""
        return self._prompts[index // self._choices_per_prompt]

    def events(self, delta: CompletionDelta) -> bytes:
        self._count(delta)
        plain = self._plain.get(delta.index)
        if plain is None:
            self._plain[delta.index] = self._around_text(delta.index)
        elif self._text_is_all and delta.finish_reason is None and not delta.logprobs:
            before, after = plain
            return before + sse.encode_text(delta.text) + after if delta.text else b""
        first = plain is None
        tells = bool(delta.text or delta.logprobs or (self._return_token_ids and delta.token_ids))
        return self._events(delta, first, tells)

    def last_events(self) -> bytes:
        if not self._include_usage:
            return sse.DONE
        return sse.event(self._new_chunk([], self._usage())) + sse.DONE

    def error_events(self, error: Exception) -> bytes:
        return sse.event(error_object(error)) + sse.DONE

    def _if_asked(self, token_ids: list[int]) -> list[int] | None:
        """Return the token ids if they were asked for; else null, as in vLLM."""
        return token_ids if self._return_token_ids else None

    def _token_ids(self, index: int) -> list[int] | None:
        """Return the field `token_ids` of a whole choice."""
        return self._if_asked([i for delta in self._deltas[index] for i in delta.token_ids])

    def _graph_steps(self, last: CompletionDelta) -> dict[str, int] | UnsetType:
        """Return the field `graph_steps` of the choice that ends with the delta `last`."""
        if not self._report_steps:
            return UNSET
        return last.graph_steps or {}

    def _prompt_report(self, scored: Sequence[TokenLogprobs]) -> PromptLogprobs | None:
        """Return the field `prompt_logprobs`: null if it was not asked for, as in vLLM."""
        if self._prompt_logprobs is None:
            return None
        return prompt_logprobs(self._tokenizer, scored, self._prompt_logprobs)

    @abstractmethod
    def _new_chunk(
        self, choices: list[Any], usage: UsageInfo | UnsetType | None
    ) -> CompletionStreamResponse | ChatCompletionStreamResponse:
        """Return a chunk with these choices, which are of the chunk's own type."""

    @abstractmethod
    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """See `ChunkEncoder.around_text`."""

    @abstractmethod
    def _events(self, delta: CompletionDelta, first: bool, tells: bool) -> bytes:
        """Return the events of a delta. `first`: it is the first of its choice; `tells`: it has
        text, logprobs or token ids to report."""

    def _chunk(self, choice: CompletionStreamChoice | ChatCompletionStreamChoice) -> bytes:
        """Return the event of a choice."""
        if not self._continuous_usage:
            return self._chunks.encode(choice)
        return sse.event(self._new_chunk([choice], self._usage_of(choice.index)))

    def _usage(self) -> UsageInfo:
        """Return the usage of all choices; a prompt counts once."""
        return _usage(
            sum(map(len, self._prompts)),
            sum(self._completion_tokens),
            sum(self._cached_tokens[:: self._choices_per_prompt]),
            self._reasoning_tokens(range(len(self._deltas))),
        )

    def _usage_of(self, index: int) -> UsageInfo:
        """Return the usage of one choice so far, as vLLM reports it in each chunk."""
        prompt, completion = len(self._prompt_of(index)), self._completion_tokens[index]
        reasoning = self._reasoning_tokens([index])
        return _usage(prompt, completion, self._cached_tokens[index], reasoning)

    def _reasoning_tokens(self, indices: Iterable[int]) -> int | None:
        """Return how many tokens of some choices are reasoning; None where it is not told apart."""
        return None


def _usage(prompt: int, completion: int, cached: int, reasoning: int | None) -> UsageInfo:
    usage = UsageInfo(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokenUsageInfo(cached_tokens=cached),
    )
    if reasoning is not None:
        usage.completion_tokens_details = CompletionTokenUsageInfo(reasoning_tokens=reasoning)
    return usage


class CompletionResponseBuilder(OpenAIResponseBuilder):
    """A `text_completion`: the choices of all prompts."""

    id_prefix = "cmpl-"

    def __init__(self, request: CompletionRequest, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self._reports_logprobs = request.logprobs is not None

    def begin(self, prepared: Prepared) -> None:
        super().begin(prepared)
        self._echoes = prepared.echoes
        self._writers = [
            CompletionLogprobsWriter(
                self._tokenizer, self._num_logprobs, by_id=self._spells_token_ids
            )
            for _ in self._deltas
        ]

    def response(self) -> CompletionResponse:
        return CompletionResponse(
            id=self.id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=[self._choice(index) for index in range(len(self._deltas))],
            usage=self._usage(),
        )

    def _choice(self, index: int) -> CompletionChoice:
        deltas = self._deltas[index]
        text, logprobs = self._shown(deltas, self._echoes is not None)
        last = deltas[-1]
        assert last.finish_reason is not None
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            token_ids=self._token_ids(index),
            prompt_token_ids=self._if_asked(self._prompt_of(index)),
            prompt_logprobs=self._prompt_report(deltas[0].prompt_logprobs),
            graph_steps=self._graph_steps(last),
            graph_stats=last.graph_stats or UNSET,
        )

    def _new_chunk(
        self, choices: list[CompletionStreamChoice], usage: UsageInfo | UnsetType | None
    ) -> CompletionStreamResponse:
        return CompletionStreamResponse(
            id=self.id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        choice = CompletionStreamChoice(
            index=index, text="", logprobs=None, finish_reason=None, token_ids=None
        )
        return self._chunks.around_text(choice, "text")

    def _events(self, delta: CompletionDelta, first: bool, tells: bool) -> bytes:
        echoes = first and self._echoes is not None
        text, logprobs = self._shown([delta], echoes)
        told = text or logprobs or (tells and self._return_token_ids)
        if not told and not echoes and delta.finish_reason is None:
            return b""
        choice = CompletionStreamChoice(
            index=delta.index,
            text=text,
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            token_ids=self._if_asked(delta.token_ids),
        )
        if first:
            choice.prompt_token_ids = self._if_asked(self._prompt_of(delta.index))
        if delta.finish_reason is not None:
            choice.graph_steps = self._graph_steps(delta)
            choice.graph_stats = delta.graph_stats or UNSET
        return self._chunk(choice)

    def _shown(
        self, deltas: Sequence[CompletionDelta], echoes: bool
    ) -> tuple[str, CompletionLogprobs | None]:
        """Return the text and `logprobs` that deltas add to a choice; `echoes` says whether the
        prompt comes first."""
        index = deltas[0].index
        text = "".join([delta.text for delta in deltas])
        echo = None
        if echoes:
            assert self._echoes is not None
            echo = self._echoes[index // self._choices_per_prompt]
        whole = text if echo is None else echo.text + text
        if not self._reports_logprobs:
            return whole, None
        writer = self._writers[index]
        lists = CompletionLogprobs([], [], [], [])
        if echo is not None:
            writer.add_prompt(lists, echo, self._prompt_of(index), deltas[0].prompt_logprobs)
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        starts = [start for delta in deltas for start in delta.text_offsets]
        writer.add(lists, logprobs, starts, text, last=deltas[-1].finish_reason is not None)
        return whole, lists if lists.tokens else None


class ChatResponseBuilder(OpenAIResponseBuilder):
    """A `chat.completion`: the choices of one conversation."""

    id_prefix = "chatcmpl-"

    def __init__(self, request: ChatCompletionRequest, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self._include_reasoning = request.include_reasoning
        self._calls_functions = bool(request.functions)
        """Whether a call is reported in the form that came before tool_calls."""

    def begin(self, prepared: Prepared) -> None:
        super().begin(prepared)
        assert prepared.answer is not None
        self._echo = prepared.echoes[0].text if prepared.echoes else ""
        self._parsers = [prepared.answer.parser() for _ in self._deltas]
        self._reasoning_counts = [
            ReasoningCount(parser, self._tokenizer) for parser in self._parsers
        ]
        self._called = [False] * len(self._deltas)
        """Whether each choice has called a tool."""
        self._text_is_all &= not any(self._parsers)

    def _count(self, delta: CompletionDelta) -> None:
        super()._count(delta)
        self._reasoning_counts[delta.index].add(delta.token_ids)

    def _reasoning_tokens(self, indices: Iterable[int]) -> int:
        return sum(self._reasoning_counts[index].number for index in indices)

    def response(self) -> ChatCompletionResponse:
        choices = [self._choice(index) for index in range(len(self._deltas))]
        return ChatCompletionResponse(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._usage(),
            prompt_token_ids=self._if_asked(self._prompts[0]),
            prompt_logprobs=self._prompt_report(self._deltas[0][0].prompt_logprobs),
        )

    def _choice(self, index: int) -> ChatCompletionChoice:
        deltas = self._deltas[index]
        message = self._message(index, "".join([delta.text for delta in deltas]))
        reported = any(delta.logprobs is not None for delta in deltas)
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        finish_reason = self._finish_reason(
            deltas[-1], bool(message.tool_calls or message.function_call)
        )
        assert finish_reason is not None
        return ChatCompletionChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(logprobs) if reported else None,
            finish_reason=finish_reason,
            token_ids=self._token_ids(index),
            graph_steps=self._graph_steps(deltas[-1]),
            graph_stats=deltas[-1].graph_stats or UNSET,
        )

    def _message(self, index: int, text: str) -> ChatMessage:
        """Return the message of a whole choice, whose text the parser splits if there is one."""
        content: str | None = self._echo + text
        reasoning = None
        calls: list[ChatCompletionToolCall] = []
        parser = self._parsers[index]
        if parser is not None:
            answer = assemble([*parser.feed(text), *parser.finish()])
            content = self._echo + answer.content or (None if answer.tool_calls else "")
            reasoning = (answer.reasoning or None) if self._include_reasoning else None
            calls = [
                ChatCompletionToolCall(
                    id=call.id,
                    type="function",
                    function=FunctionCall(name=call.name, arguments=call.arguments),
                )
                for call in answer.tool_calls
            ]
        return ChatMessage(
            role="assistant",
            content=content,
            refusal=None,
            reasoning=reasoning,
            reasoning_content=reasoning,
            tool_calls=calls if calls and not self._calls_functions else UNSET,
            function_call=calls[0].function if calls and self._calls_functions else UNSET,
        )

    def _new_chunk(
        self, choices: list[ChatCompletionStreamChoice], usage: UsageInfo | UnsetType | None
    ) -> ChatCompletionStreamResponse:
        return ChatCompletionStreamResponse(
            id=self.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        choice = ChatCompletionStreamChoice(index, DeltaMessage(content=""))
        return self._chunks.around_text(choice, "content")

    def _events(self, delta: CompletionDelta, first: bool, tells: bool) -> bytes:
        events = self._begin_answer(delta) if first else b""
        parser = self._parsers[delta.index]
        parts = [DeltaMessage(content=delta.text)] if tells else []
        if parser is not None:
            found = _read(parser, delta)
            self._called[delta.index] |= any(isinstance(part, ToolCallStart) for part in found)
            # Even if the parser holds the text back, its tokens may have to be reported.
            parts = [self._delta(part) for part in found if self._reports(part)]
            parts = parts or [DeltaMessage()] * (
                tells and bool(delta.logprobs or self._return_token_ids)
            )
        for number, part in enumerate(parts):
            choice = ChatCompletionStreamChoice(delta.index, part)
            if number == 0:
                choice.logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
                choice.token_ids = self._if_asked(delta.token_ids)
            events += self._chunk(choice)
        if delta.finish_reason is not None:
            choice = ChatCompletionStreamChoice(delta.index, DeltaMessage())
            choice.finish_reason = self._finish_reason(delta, self._called[delta.index])
            choice.graph_steps = self._graph_steps(delta)
            choice.graph_stats = delta.graph_stats or UNSET
            events += self._chunk(choice)
        return events

    def _begin_answer(self, delta: CompletionDelta) -> bytes:
        """Return the chunk that holds the role, which comes before the first token of the
        answer."""
        message = DeltaMessage(role="assistant", content="")
        usage: UsageInfo | UnsetType | None = None if self._include_usage else UNSET
        if self._continuous_usage:
            usage = _usage(len(self._prompts[0]), 0, delta.num_cached_tokens, 0)
        chunk = self._new_chunk([ChatCompletionStreamChoice(delta.index, message)], usage)
        chunk.prompt_token_ids = self._if_asked(self._prompts[0])
        if not self._echo:
            return sse.event(chunk)
        echo = ChatCompletionStreamChoice(delta.index, DeltaMessage(content=self._echo))
        return sse.event(chunk) + sse.event(self._new_chunk([echo], usage))

    def _logprobs(self, logprobs: list[TokenLogprobs]) -> ChatCompletionLogprobs:
        return chat_logprobs(
            self._tokenizer, logprobs, self._num_logprobs, by_id=self._spells_token_ids
        )

    def _finish_reason(self, last: CompletionDelta, called: bool) -> str | None:
        """Return the finish reason: `tool_calls`, or `function_call` in its older form, if an
        answer ended by itself and made calls, as OpenAI has it."""
        if not called or last.finish_reason != "stop":
            return last.finish_reason
        return "function_call" if self._calls_functions else "tool_calls"

    def _reports(self, part: ChatDelta) -> bool:
        return self._include_reasoning or not isinstance(part, ReasoningDelta)

    def _delta(self, part: ChatDelta) -> DeltaMessage:
        """Return the `delta` field of a chunk. The reasoning stands under the name of DeepSeek's
        API and vLLM's newer one, as clients look for either."""
        match part:
            case ContentDelta(text):
                return DeltaMessage(content=text)
            case ReasoningDelta(text):
                return DeltaMessage(reasoning=text, reasoning_content=text)
            case ToolCallStart(index, id, name):
                function = DeltaFunctionCall(name=name, arguments="")
                call = DeltaToolCall(index=index, id=id, type="function", function=function)
            case ToolCallArguments(index, text):
                call = DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=text))
        if self._calls_functions:
            return DeltaMessage(function_call=call.function)
        return DeltaMessage(tool_calls=[call])


def _read(parser: ChatParser, delta: CompletionDelta) -> list[ChatDelta]:
    """Return what a delta adds to an answer."""
    found = parser.feed(delta.text)
    return found if delta.finish_reason is None else [*found, *parser.finish()]

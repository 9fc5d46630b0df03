"""Turns deltas into OpenAI's response bodies: completions and chat, streamed or not.

A reply is made for one response and fed every delta once, either through `events` (streamed) or
through `add` and then `document` (not streamed).

Knows: the JSON shapes of responses. Knows nothing of how deltas come about.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from minisrv.request import TokenLogprobs
from minisrv.server import sse
from minisrv.server.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from minisrv.server.preparation import Prepared
from minisrv.server.protocol import CompletionRequest, GenerationRequest
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


class Reply(ABC):
    """Common part of the responses of completions and chat completions: id, usage, extensions."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, request: GenerationRequest, model: str, tokenizer: Tokenizer) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._identity = {"created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._num_logprobs = request.num_logprobs or 0
        self._prompt_logprobs = request.prompt_logprobs
        self._return_token_ids = request.return_token_ids
        self._report_steps = request.include_graph_steps
        self._choices_per_prompt = request.n
        self._include_usage = request.include_usage
        self._continuous_usage = request.continuous_usage
        self._text_is_all = not (self._return_token_ids or self._continuous_usage)
        """Whether a delta that is neither the first nor the last of its choice has nothing to
        report but its text and logprobs, with the text passed on unchanged."""
        self._tail: dict[str, Any] = {"usage": None} if self._include_usage else {}
        self._chunk_head = self._head(self.chunk_name)
        self._chunks = sse.ChunkEncoder(self._chunk_head, self._tail)
        self._prompts: Sequence[list[int]] = ()
        self._deltas: list[list[CompletionDelta]] = []
        self._plain: dict[int, tuple[bytes, bytes]] = {}
        """The bytes before and behind the text in an event that reports nothing else, for each
        choice that has begun."""
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

    def _prompt_of(self, index: int) -> list[int]:
        """Return the prompt of a choice."""
        return self._prompts[index // self._choices_per_prompt]

    def events(self, delta: CompletionDelta) -> bytes:
        """Return the events of a delta as bytes; empty if there is nothing to report."""
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

    def told(self, arrival: float) -> dict[str, Any]:
        """Return the numbers that the access log may hold about this response.

        arrival: when the request arrived, by `time.perf_counter`.
        """
        first = {} if self._first is None else {"first_ms": round(1e3 * (self._first - arrival), 1)}
        return {
            **first,
            "prompt_tokens": sum(map(len, self._prompts)),
            "completion_tokens": sum(self._completion_tokens),
        }

    def last_events(self) -> bytes:
        """Return the events that end a stream."""
        if not self._include_usage:
            return sse.DONE
        return sse.event({**self._chunk_head, "choices": [], "usage": self._usage()}) + sse.DONE

    def add(self, delta: CompletionDelta) -> None:
        """Keep a delta for `document`."""
        self._count(delta)
        self._deltas[delta.index].append(delta)

    def size_of(self, deltas: Iterable[CompletionDelta]) -> int:
        """Return about how many numbers and texts are reported of the prompts with these deltas."""
        number = sum(len(delta.prompt_logprobs) for delta in deltas)
        return number * (1 + max(self._num_logprobs, self._prompt_logprobs or 0))

    @property
    def size(self) -> int:
        """Approximate number of numbers and texts in `document`."""
        told = sum(self._completion_tokens) * (1 + self._num_logprobs)
        return told + self.size_of(deltas[0] for deltas in self._deltas)

    def document(self) -> dict[str, Any]:
        """Return the body of a response that is not streamed. Must be called after the last
        delta."""
        return {
            **self._head(self.object_name),
            "choices": [self._whole(index) for index in range(len(self._deltas))],
            "usage": self._usage(),
        }

    def _whole(self, index: int) -> dict[str, Any]:
        deltas = self._deltas[index]
        choice = self._choice(index, deltas)
        choice.setdefault("finish_reason", deltas[-1].finish_reason)
        ids = [i for delta in deltas for i in delta.token_ids]
        choice["token_ids"] = self._if_asked(ids)
        if self._report_steps:
            choice["graph_steps"] = deltas[-1].graph_steps
        return choice

    def _if_asked(self, token_ids: Sequence[int]) -> Sequence[int] | None:
        """Return the token ids if they were asked for; else null, as in vLLM."""
        return token_ids if self._return_token_ids else None

    def _prompt_report(self, scored: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None] | None:
        """Return the field `prompt_logprobs`: null if it was not asked for, as in vLLM."""
        if self._prompt_logprobs is None:
            return None
        return prompt_logprobs(self._tokenizer, scored, self._prompt_logprobs)

    @abstractmethod
    def _choice(self, index: int, deltas: Sequence[CompletionDelta]) -> dict[str, Any]:
        """Return a whole choice, without the fields that every choice has."""

    @abstractmethod
    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """See `ChunkEncoder.around_text`."""

    @abstractmethod
    def _events(self, delta: CompletionDelta, first: bool, tells: bool) -> bytes:
        """Return the events of a delta. `first`: it is the first of its choice; `tells`: it has
        text, logprobs or token ids to report."""

    def _chunk(self, choice: dict[str, Any], *, extra: dict[str, Any] | None = None) -> bytes:
        """Return the event of a choice, with `extra` fields beside the list of choices."""
        if not extra and not self._continuous_usage:
            return self._chunks.encode(choice)
        tail = self._tail
        if self._continuous_usage:
            tail = {"usage": self._usage_of(choice["index"])}
        return sse.event({**self._chunk_head, "choices": [choice], **tail, **(extra or {})})

    def _head(self, object_name: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_name, **self._identity}

    def _count(self, delta: CompletionDelta) -> None:
        if self._first is None:
            self._first = time.perf_counter()
        self._completion_tokens[delta.index] += len(delta.token_ids)
        self._cached_tokens[delta.index] += delta.num_cached_tokens

    def _usage(self) -> dict[str, Any]:
        """Return the usage of all choices; a prompt counts once."""
        return _usage(
            sum(map(len, self._prompts)),
            sum(self._completion_tokens),
            sum(self._cached_tokens[:: self._choices_per_prompt]),
        )

    def _usage_of(self, index: int) -> dict[str, Any]:
        """Return the usage of one choice so far, as vLLM reports it in each chunk."""
        prompt = len(self._prompt_of(index))
        return _usage(prompt, self._completion_tokens[index], self._cached_tokens[index])


def _usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class CompletionReply(Reply):
    """A `text_completion`: the choices of all prompts."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, request: CompletionRequest, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(request, model, tokenizer)
        self._reports_logprobs = request.logprobs is not None

    def begin(self, prepared: Prepared) -> None:
        super().begin(prepared)
        self._echoes = prepared.echoes
        self._writers = [
            CompletionLogprobs(self._tokenizer, self._num_logprobs) for _ in self._deltas
        ]

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        choice = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        return self._chunks.around_text({**choice, "token_ids": None}, "text")

    def _events(self, delta: CompletionDelta, first: bool, tells: bool) -> bytes:
        echoes = first and self._echoes is not None
        text, logprobs = self._shown([delta], echoes)
        told = text or logprobs or (tells and self._return_token_ids)
        if not told and not echoes and delta.finish_reason is None:
            return b""
        choice = {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "token_ids": self._if_asked(delta.token_ids),
        }
        if first:
            choice["prompt_token_ids"] = self._if_asked(self._prompt_of(delta.index))
        if self._report_steps and delta.finish_reason is not None:
            choice["graph_steps"] = delta.graph_steps
        return self._chunk(choice)

    def _choice(self, index: int, deltas: Sequence[CompletionDelta]) -> dict[str, Any]:
        text, logprobs = self._shown(deltas, self._echoes is not None)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "prompt_logprobs": self._prompt_report(deltas[0].prompt_logprobs),
            "prompt_token_ids": self._if_asked(self._prompt_of(index)),
        }

    def _shown(
        self, deltas: Sequence[CompletionDelta], echoes: bool
    ) -> tuple[str, dict[str, list[Any]] | None]:
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
        parts = []
        if echo is not None:
            scored = deltas[0].prompt_logprobs
            parts.append(writer.prompt(echo, self._prompt_of(index), scored))
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        starts = [start for delta in deltas for start in delta.text_starts]
        parts.append(writer.chunk(logprobs, starts, text, deltas[-1].finish_reason is not None))
        lists = {name: [item for part in parts for item in part[name]] for name in parts[0]}
        return whole, lists if lists["tokens"] else None


class ChatReply(Reply):
    """A `chat.completion`: the choices of one conversation."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def begin(self, prepared: Prepared) -> None:
        super().begin(prepared)
        assert prepared.answer is not None
        self._parsers = [prepared.answer.parser() for _ in self._deltas]
        self._called = [False] * len(self._deltas)
        """Whether each choice has called a tool."""
        self._text_is_all &= not any(self._parsers)

    def document(self) -> dict[str, Any]:
        return {
            **super().document(),
            "prompt_token_ids": self._if_asked(self._prompts[0]),
            "prompt_logprobs": self._prompt_report(self._deltas[0][0].prompt_logprobs),
        }

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._chunks.around_text(_chat_choice(index, {"content": ""}), "content")

    def _events(self, delta: CompletionDelta, first: bool, tells: bool) -> bytes:
        events = self._begin_answer(delta) if first else b""
        parser = self._parsers[delta.index]
        parts = [{"content": delta.text}] if tells else []
        if parser is not None:
            found = _read(parser, delta)
            self._called[delta.index] |= any(isinstance(part, ToolCallStart) for part in found)
            # Even if the parser holds the text back, its tokens may have to be reported.
            parts = [_delta(part) for part in found] or [{}] * (
                tells and bool(delta.logprobs or self._return_token_ids)
            )
        for number, part in enumerate(parts):
            choice = _chat_choice(delta.index, part)
            if number == 0:
                choice["logprobs"] = delta.logprobs and self._logprobs(delta.logprobs)
                choice["token_ids"] = self._if_asked(delta.token_ids)
            events += self._chunk(choice)
        if delta.finish_reason is not None:
            choice = _chat_choice(delta.index, {})
            choice["finish_reason"] = _finish_reason(delta, self._called[delta.index])
            if self._report_steps:
                choice["graph_steps"] = delta.graph_steps
            events += self._chunk(choice)
        return events

    def _begin_answer(self, delta: CompletionDelta) -> bytes:
        """Return the chunk that holds the role, which comes before the first token of the
        answer."""
        choice = _chat_choice(delta.index, {"role": "assistant", "content": ""})
        extra: dict[str, Any] = {"prompt_token_ids": self._if_asked(self._prompts[0])}
        if self._continuous_usage:
            prompt, cached = len(self._prompts[0]), delta.num_cached_tokens
            extra["usage"] = _usage(prompt, 0, cached)
        return self._chunk(choice, extra=extra)

    def _choice(self, index: int, deltas: Sequence[CompletionDelta]) -> dict[str, Any]:
        text = "".join([delta.text for delta in deltas])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        message |= _reasoning(None)
        choice = {"index": index, "message": message, "logprobs": None}
        if any(delta.logprobs is not None for delta in deltas):
            logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
            choice["logprobs"] = self._logprobs(logprobs)
        parser = self._parsers[index]
        if parser is not None:
            answer = assemble([*parser.feed(text), *parser.finish()])
            message["content"] = answer.content or (None if answer.tool_calls else "")
            if answer.reasoning:
                message |= _reasoning(answer.reasoning)
            if answer.tool_calls:
                message["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in answer.tool_calls
                ]
            last = self._deltas[index][-1]
            choice["finish_reason"] = _finish_reason(last, bool(answer.tool_calls))
        return choice

    def _logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, logprobs, self._num_logprobs)


def _read(parser: ChatParser, delta: CompletionDelta) -> list[ChatDelta]:
    """Return what a delta adds to an answer."""
    found = parser.feed(delta.text)
    return found if delta.finish_reason is None else [*found, *parser.finish()]


def _finish_reason(last: CompletionDelta, called: bool) -> str | None:
    """Return the finish reason: `tool_calls` if an answer ended by itself and called tools, as
    OpenAI has it."""
    return "tool_calls" if called and last.finish_reason == "stop" else last.finish_reason


def _delta(part: ChatDelta) -> dict[str, Any]:
    """Return the `delta` field of a chunk, in the form that OpenAI's client assembles."""
    match part:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return _reasoning(text)
        case ToolCallStart(index, id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _chat_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    """Return the choice of a chunk with nothing but a delta in it."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    return {**choice, "token_ids": None}


def _reasoning(text: str | None) -> dict[str, str | None]:
    """Return the fields of the reasoning: under the name of DeepSeek's API and vLLM's newer one, as
    clients look for either."""
    return {"reasoning_content": text, "reasoning": text}

"""One request: sends it, reads its stream, takes its times, and judges whether it succeeded.

Knows: the chunks of OpenAI's completions and chat completions, and the page on which a server says
that its times are simulated. Knows nothing of how bytes are transferred (http), how many requests
run at the same time, nor what is computed from a record.

The decisions on which all results rest are made here: which chunks carry tokens and how many, how
many tokens an answer has (by usage if the server sends it, and never by the chunks then), and
whether the request succeeded.

A token need not have text: a special token has none, and if the bytes of a character are spread
over several tokens, only the last of them has text. A chunk carries tokens if it has text or token
ids. A chunk with neither, without a role and without a finish reason, is a token too if the server
sends a chunk for every token, as vLLM does; usage shows this, as there are then as many chunks as
tokens.
"""

import asyncio
import re
from contextlib import suppress
from typing import Any

import msgspec

from loadgen.errors import ServerError
from loadgen.http import Client, ConnectError, Head, HTTPError
from loadgen.prompts import Request
from loadgen.records import Answer, Failure, FailureKind, RequestRecord, RunConfig, clock
from loadgen.sse import SSEError, SSEParser

_PROBE_TIMEOUT_S = 10.0
_MAX_MESSAGE_CHARS = 300
_MAX_PLAIN_BYTES = 4 << 20  # maximum size of a body that is no event stream (an error, models)
_SIMULATED = re.compile(rb"^\S*simulated_launch_us(?:\{.*\})? (\S+)$", re.MULTILINE)


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    @property
    def content(self) -> str:
        if self.text or self.delta is None:
            return self.text or ""
        delta = self.delta
        return delta.content or delta.reasoning_content or delta.reasoning or ""

    @property
    def may_be_a_token(self) -> bool:
        """Whether a choice without text and token ids may still stand for a token."""
        announces = self.delta is not None and self.delta.role is not None
        return not announces and self.finish_reason is None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: object = None

    @property
    def ends_a_choice(self) -> bool:
        return any(choice.finish_reason is not None for choice in self.choices or ())


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


_CHOICE_FIELDS = {"index", "text", "delta", "logprobs", "finish_reason", "stop_reason", "token_ids"}
_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class CompletionStream:
    """The state of one streamed answer, which is given the bytes and the times of their arrival. It
    does no input or output itself."""

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.done_s: float | None = None
        self.extra: dict[str, Any] = {}
        """The fields of the choice that ended the answer which are no part of OpenAI's API."""
        self._times_s: list[float] = []
        self._empty_times_s: list[float] = []
        """Arrival times of chunks without text and token ids, which only usage shows to be tokens
        or not."""
        self._contents: list[str] = []
        self._id_counts: list[int] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._failure: Failure | None = None
        self._parser = SSEParser()

    def feed(self, data: bytes, now_s: float) -> bool:
        """Parse bytes that arrived at the time `now_s`. Returns False once the stream has
        failed."""
        try:
            for event in self._parser.feed(data):
                if event == b"[DONE]":
                    self.done_s = now_s
                else:
                    chunk = _decode_chunk(event)
                    self._take(chunk, now_s)
                    if chunk.ends_a_choice:
                        self.extra |= _extra_fields(event)
        except (SSEError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._failure = Failure(FailureKind.BROKEN_STREAM, f"unreadable event: {error}")
        return self._failure is None

    def _take(self, chunk: _Chunk, now_s: float) -> None:
        if chunk.error is not None:
            self._failure = Failure(FailureKind.ERROR_EVENT, _error_text(chunk.error))
        for choice in chunk.choices or ():
            content, token_ids = choice.content, choice.token_ids or ()
            if content or token_ids:
                self._times_s.append(now_s)
                self._contents.append(content)
                self._id_counts.append(len(token_ids))
                self._token_ids += token_ids
            elif choice.may_be_a_token:
                self._empty_times_s.append(now_s)
            if choice.finish_reason is not None:
                self._finish_reason = choice.finish_reason
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.completion_tokens = chunk.usage.completion_tokens
            if chunk.usage.prompt_tokens_details is not None:
                self.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens

    @property
    def chunk_times_s(self) -> list[float]:
        """Arrival time of each chunk that carried tokens, as far as it is known by now."""
        if self._empty_times_s and self.completion_tokens is not None:
            # The last token may have come without text in the chunk with the finish reason.
            unseen = self.completion_tokens - len(self._times_s) - len(self._empty_times_s)
            if unseen in (0, 1):
                return sorted(self._times_s + self._empty_times_s)
        return self._times_s

    @property
    def chunk_tokens(self) -> list[float]:
        """Number of tokens that each of these chunks brought.

        It is the number of token ids in the chunk. Without ids each chunk is assumed to have
        brought one token, and the tokens that usage counts beyond that are shared out in proportion
        to the length of the text; for equal chunks that is exact.
        """
        chunks = len(self.chunk_times_s)
        if chunks > len(self._times_s):  # each token had a chunk of its own, with or without text
            return [1.0] * chunks
        if all(self._id_counts):
            return list(map(float, self._id_counts))
        tokens = chunks if self.completion_tokens is None else self.completion_tokens
        least = min(1.0, tokens / chunks)
        letters = sum(map(len, self._contents))
        each = (tokens - least * chunks) / letters if letters else 0.0
        return [least + each * len(content) for content in self._contents]

    @property
    def ended_by_itself(self) -> bool:
        """Whether the model ended the answer, and not the limit on its tokens."""
        return self._finish_reason == "stop"

    @property
    def answer(self) -> Answer:
        """The answer received so far."""
        complete = len(self._token_ids) == self.completion_tokens
        return Answer("".join(self._contents), tuple(self._token_ids) if complete else ())

    def verdict(self, output_tokens: int, exact: bool) -> Failure | None:
        """Judge the stream after its end. Returns None for success.

        output_tokens: the number of tokens that was asked for.
        exact: whether the answer must have exactly `output_tokens` tokens; or else it may not have
            more.

        An answer with a finish reason is whole even without [DONE], which some servers do not send.
        One that has ended by itself may be shorter: its server does not know ignore_eos.
        The count is checked only if the server has sent usage. There must be at least one token, by
        a chunk or by usage. An answer whose tokens had no chunks cannot be timed, but is no
        failure.
        """
        if self._failure is not None:
            return self._failure
        if self.done_s is None and self._finish_reason is None:
            return Failure(FailureKind.BROKEN_STREAM, "the stream ended before [DONE]")
        if self._finish_reason is None:
            return Failure(FailureKind.NO_FINISH_REASON, "[DONE] came without a finish_reason")
        count = self.completion_tokens
        exact = exact and not self.ended_by_itself
        if count is not None and (count > output_tokens or (exact and count != output_tokens)):
            message = f"asked for {output_tokens} tokens, usage says {count}"
            return Failure(FailureKind.WRONG_TOKEN_COUNT, message)
        if not self.chunk_times_s and not count:
            return Failure(FailureKind.NO_TOKENS, "no chunk carried tokens, and usage counts none")
        return None


async def send(
    client: Client,
    url: str,
    request: Request,
    config: RunConfig,
    scheduled_s: float | None = None,
) -> RequestRecord:
    """Send one streaming request and return its record; a failure of the request is recorded and
    never raised.

    url: the URL of the endpoint.
    scheduled_s: the time at which the request was due, in an open loop.
    """
    stream = CompletionStream()
    plain = bytearray()
    failure: Failure | None

    def receive(status: int, data: bytes, now_s: float) -> bool:
        # NOTE: the body is read to its end, past [DONE], so that the connection can be used again.
        return stream.feed(data, now_s) if status == 200 else _keep(plain, data)

    start_s = clock()
    try:
        async with asyncio.timeout(config.timeout_s):
            head = await client.exchange("POST", url, request.body, receive)
        if head.status == 200:
            failure = stream.verdict(request.output_tokens, config.ignore_eos)
        else:
            failure = _http_failure(head, plain)
    except TimeoutError:
        failure = Failure(FailureKind.TIMEOUT, f"not finished within {config.timeout_s:g} s")
    except ConnectError as error:
        failure = Failure(FailureKind.CONNECT, _clip(str(error)))
    except HTTPError as error:
        failure = Failure(FailureKind.BROKEN_STREAM, _clip(str(error)))
    end_s = clock() if stream.done_s is None or failure is not None else stream.done_s
    return RequestRecord(
        index=request.index,
        turn=request.turn,
        without_done=failure is None and stream.done_s is None,
        disobeys_ignore_eos=config.ignore_eos and stream.ended_by_itself,
        extra=stream.extra,
        scheduled_s=scheduled_s,
        start_s=start_s,
        end_s=end_s,
        chunk_times_s=tuple(stream.chunk_times_s),
        chunk_tokens=tuple(stream.chunk_tokens),
        prompt_tokens=stream.prompt_tokens,
        cached_tokens=stream.cached_tokens,
        completion_tokens=stream.completion_tokens,
        failure=failure,
        answer=stream.answer if config.keep_answers or config.turns != 1 else None,
    )


async def find_model(
    base_url: str, api_key: str | None, wanted: str | None, timeout_s: float
) -> str:
    """Return the name of the model for the requests: `wanted` if the server lists it, or, if that
    is None, the first that it lists.

    Raises ServerError if the server cannot be reached or does not serve `wanted`. If the server has
    no GET /models (404 or 405), or lists no model because it loads them when they are asked for, as
    transformers serve does, `wanted` is returned without a check.
    """
    url = f"{base_url}/models"
    plain = bytearray()
    try:
        with Client(api_key) as client:
            async with asyncio.timeout(min(timeout_s, _PROBE_TIMEOUT_S)):
                head = await client.exchange(
                    "GET", url, b"", lambda status, data, now_s: _keep(plain, data)
                )
        if head.status in (404, 405) and wanted is not None:
            return wanted
        if head.status != 200:
            failure = _http_failure(head, plain)
            hint = " (see --api-key)" if head.status in (401, 403) else ""
            raise ServerError(f"GET {url} gave {head.status}: {failure.message}{hint}")
        models = msgspec.json.decode(plain, type=_ModelList).data
    except TimeoutError:
        raise ServerError(f"no answer from {url}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServerError(f"GET {url} is no OpenAI list of models: {error}") from None
    except HTTPError as error:
        raise ServerError(f"cannot reach {url}: {_clip(str(error))}") from None
    names = [model.id for model in models]
    if not names and wanted is None:
        raise ServerError(f"{url} lists no model: name one by --model")
    if wanted is not None and names and wanted not in names:
        raise ServerError(f"no such model {wanted!r} at {base_url}; it serves: {', '.join(names)}")
    return wanted or names[0]


async def simulated_launch_us(base_url: str, api_key: str | None) -> float:
    """Return the microseconds by which the server lengthens each of its launches, to simulate
    another machine. minisrv reports them in /metrics; 0 for a server that reports nothing of the
    kind, whose times are real.
    """
    url = f"{base_url.removesuffix('/v1')}/metrics"
    plain = bytearray()
    with suppress(HTTPError, TimeoutError), Client(api_key) as client:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            await client.exchange("GET", url, b"", lambda status, data, now_s: _keep(plain, data))
    found = _SIMULATED.search(plain)
    return float(found[1]) if found else 0.0


def _extra_fields(event: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for choice in msgspec.json.decode(event)["choices"]:
        fields |= choice
    return {name: value for name, value in fields.items() if name not in _CHOICE_FIELDS}


def _keep(plain: bytearray, data: bytes) -> bool:
    plain += data
    return len(plain) < _MAX_PLAIN_BYTES


def _http_failure(head: Head, plain: bytes | bytearray) -> Failure:
    try:
        text = _error_text(msgspec.json.decode(plain))
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = _clip(plain.decode(errors="replace"))
    return Failure(FailureKind.HTTP_STATUS, text or head.reason, head.status)


def _error_text(error: object) -> str:
    """Return the message inside an error object, whether it has OpenAI's format or another."""
    while isinstance(error, dict):
        inner = error.get("error") or error.get("message") or error.get("detail")
        if inner is None:
            break
        error = inner
    return _clip(str(error))


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[:_MAX_MESSAGE_CHARS] + "..."

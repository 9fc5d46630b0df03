"""The response bodies, as models for the OpenAPI document.

No response is made from these models: `replies` writes the bodies, for speed. Tests validate real
responses against them, so that no field is missing on either side.

Knows: the JSON shapes of responses. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from minisrv.server.auth import OPEN_PATHS

Responses = dict[int | str, dict[str, Any]]


class Body(BaseModel):
    """A JSON object of a response: these fields and no others."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorInfo(Body):
    """An error: what was wrong, what is allowed, and what to do."""

    message: str
    type: str
    param: str | None
    """The field of the request that caused the error."""
    code: str | None


class Error(Body):
    """The body of every response with a status from 400 on, and of an event that ends a stream
    early."""

    error: ErrorInfo


class CachedTokens(Body):
    """Details of the prompt tokens."""

    cached_tokens: int
    """Number of prompt tokens that were found in the prefix cache, and not computed."""


class Usage(Body):
    """The token counts of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(Body):
    """The log-probability of one token at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, log-probabilities by token id; null for the first token."""


class Choice(Body):
    """The fields that choices of completions and chats share. Most are set only if they were asked
    for."""

    index: int
    finish_reason: str
    token_ids: list[int] | None
    """Token ids of the completion. Null without return_token_ids."""
    graph_steps: dict[str, int] = {}
    """Number of steps by graph mode and reason. Only with include_graph_steps."""


class TextLogprobs(Body):
    """Log-probabilities of the tokens of a completion, as parallel lists."""

    tokens: list[str]
    """The tokens as text. `bytes:\\xe2` is a token that is not valid text by itself, and
    `token_id:123` one that the tokenizer does not know."""
    token_logprobs: list[float | None]
    """Log-probability of each token. Null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """Log-probabilities of the most likely tokens and of the token itself at each position, by
    text. If several have the same text, all but one are named like `token_id:123`."""
    text_offset: list[int]
    """Index of the character in the choice's text at which each token begins. Tokens that form one
    character together all begin there; tokens that a stop string cut off begin at the end."""


class TextChoice(Choice):
    """One choice of a completion."""

    text: str
    logprobs: TextLogprobs | None
    prompt_token_ids: list[int] | None
    """Token ids of the prompt. Null without return_token_ids."""
    prompt_logprobs: PromptLogprobs | None
    """Log-probabilities of the prompt's tokens. Null without prompt_logprobs."""


class Completion(Body):
    """The response to POST /v1/completions. A stream has chunks of this shape, in which usage may
    be absent."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TopLogprob(Body):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The log-probability of a token of an answer, and those of its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Body):
    """Log-probabilities of the tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Body):
    """The function that the model calls, and its arguments."""

    name: str
    arguments: str
    """The arguments as JSON text."""


class Call(Body):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(Body):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None
    reasoning_content: str | None
    """The same text as `reasoning`, under another name. Both are null if there is no reasoning."""
    tool_calls: list[Call] = []


class ChatChoice(Choice):
    """One choice of a chat: an answer."""

    message: Answer
    logprobs: ChatLogprobs | None


class ChatCompletion(Body):
    """The response to POST /v1/chat/completions. A stream has `chat.completion.chunk` objects
    instead, whose choices hold a delta of the message."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None
    """Token ids of the prompt. Null without return_token_ids."""
    prompt_logprobs: PromptLogprobs | None
    """Log-probabilities of the prompt's tokens. Null without prompt_logprobs."""


class Tokens(Body):
    """The response to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    """The tokens as the vocabulary spells them. Null without return_token_strs."""


class DetokenizedPrompt(Body):
    """The response to POST /detokenize."""

    prompt: str


class ModelCard(Body):
    """The model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The checkpoint that is served under this name."""
    parent: None
    max_model_len: int | None
    """Maximum number of tokens of a request. Null while the engine loads."""


class ModelCards(Body):
    """The model under all of its names."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(Body):
    """The response to GET /health."""

    state: Literal["loading", "ready", "draining", "dead"]


class Progress(Body):
    """Progress of the engine's start-up."""

    phase: str
    done: int
    total: int


class Readiness(Health):
    """The response to GET /ready."""

    loading: Progress | None = None
    """Progress of the start-up; only while the engine loads."""


class Version(Body):
    """The response to GET /version."""

    version: str


_ERRORS: Responses = {
    "4XX": {
        "model": Error,
        "description": "400 the request is at fault, 401 it holds no key that is accepted, 404 no "
        "such model or URL, 405, 408 too slow, 413 too large, 415 no plain JSON, 421 another host, "
        "429 too many requests (see the header retry-after), 431",
    },
    "5XX": {
        "model": Error,
        "description": "500, 503 the engine is loading, draining or dead, or too many large bodies "
        "arrive, 504 the deadline is over",
    },
}

_STREAM = {
    "text/event-stream": {
        # The schema describes each event.
        "schema": {
            "type": "object",
            "properties": {
                "data": {"type": "string", "description": "A chunk as JSON; at the end [DONE]."}
            },
            "required": ["data"],
        },
    }
}


def answered(body: type[Body], *, streams: bool = False) -> Responses:
    """Return the responses of a route for OpenAPI: `body`, perhaps also as a stream, or an
    error."""
    whole: dict[str, Any] = {"model": body, "description": "Done"}
    return {200: whole | ({"content": _STREAM} if streams else {}), **_ERRORS}


def told(body: type[Body]) -> Responses:
    """Return the responses of a health check for OpenAPI: `body` with either status."""
    return {200: {"model": body, "description": "Yes"}, 503: {"model": body, "description": "No"}}


def with_keys(document: dict[str, Any]) -> dict[str, Any]:
    """Add API keys to the OpenAPI document of a server that asks for them, and return it."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path in OPEN_PATHS:
        for operation in document["paths"][path].values():
            operation["security"] = []
    return document

"""The response bodies: each is sent as one of these structs, which also give the OpenAPI document.

A field without a default is in every response; one with the default UNSET is left out unless it is
set. The names are vLLM's.

Knows: the JSON shapes of responses. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from minisrv.engine.client import EngineState
from minisrv.engine.messages import CompilationState
from minisrv.request import GraphStats


class Body(Struct, forbid_unknown_fields=True):
    """A JSON object of a response: these fields and no others."""


# ---- parts that several responses have -------------------------------------------------------


class ErrorInfo(Body):
    """An error: what was wrong, what is allowed, and what to do."""

    message: str
    type: str
    param: Annotated[
        str | None, Meta(description="The field of the request that caused the error.")
    ]
    code: str | None


class ErrorResponse(Body):
    """The body of every response with a status from 400 on, and of an event that ends a stream
    early."""

    error: ErrorInfo


class PromptTokenUsageInfo(Body):
    """Details of the prompt tokens."""

    cached_tokens: Annotated[
        int,
        Meta(
            description="Number of prompt tokens that were found in the prefix cache, and not "
            "computed."
        ),
    ]


class CompletionTokenUsageInfo(Body):
    """Details of the completion tokens."""

    reasoning_tokens: Annotated[
        int, Meta(description="Number of tokens that are reasoning, its markers included.")
    ]


class UsageInfo(Body):
    """The token counts of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenUsageInfo
    completion_tokens_details: Annotated[
        CompletionTokenUsageInfo | UnsetType, Meta(description="Only in a chat.")
    ] = UNSET


class PromptLogprob(Body):
    """The log-probability of one token at a position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, log-probabilities by token id; null for the first token."""

_TokenIds = Annotated[
    list[int] | None,
    Meta(description="Token ids of the completion. Null without return_token_ids."),
]
_PromptTokenIds = Annotated[
    list[int] | None,
    Meta(description="Token ids of the prompt. Null without return_token_ids."),
]
_PromptLogprobs = Annotated[
    PromptLogprobs | None,
    Meta(description="Log-probabilities of the prompt's tokens. Null without prompt_logprobs."),
]
_GraphSteps = Annotated[
    dict[str, int] | UnsetType,
    Meta(
        description="Number of steps by graph mode and reason; /compiled follows where compiled "
        "code ran. Only with include_graph_steps."
    ),
]

_GraphStats = Annotated[
    GraphStats | UnsetType,
    Meta(description="Further numbers about these steps. Only with include_graph_steps."),
]


# ---- completions -----------------------------------------------------------------------------


class CompletionLogprobs(Body):
    """Log-probabilities of the tokens of a completion, as parallel lists."""

    tokens: Annotated[
        list[str],
        Meta(
            description="The tokens as text. `bytes:\\xe2` is a token that is not valid text by "
            "itself, and `token_id:123` one that the tokenizer does not know."
        ),
    ]
    token_logprobs: Annotated[
        list[float | None],
        Meta(description="Log-probability of each token. Null for the first token of a prompt."),
    ]
    top_logprobs: Annotated[
        list[dict[str, float] | None],
        Meta(
            description="Log-probabilities of the most likely tokens and of the token itself at "
            "each position, by text. If several have the same text, all but one are named like "
            "`token_id:123`."
        ),
    ]
    text_offset: Annotated[
        list[int],
        Meta(
            description="Index of the character in the choice's text at which each token begins. "
            "Tokens that form one character together all begin there; tokens that a stop string "
            "cut off begin at the end."
        ),
    ]


class CompletionChoice(Body):
    """One choice of a completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str
    token_ids: _TokenIds
    prompt_token_ids: _PromptTokenIds
    prompt_logprobs: _PromptLogprobs
    graph_steps: _GraphSteps = UNSET
    graph_stats: _GraphStats = UNSET


class CompletionResponse(Body):
    """The response to POST /v1/completions. A stream has chunks of this shape, in which usage may
    be absent."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo


class CompletionStreamChoice(Body):
    """What a chunk adds to one choice of a completion.

    prompt_token_ids: set in the first chunk of the choice.
    graph_steps, graph_stats: set in the last chunk of the choice, if they were asked for.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    graph_steps: dict[str, int] | UnsetType = UNSET
    graph_stats: GraphStats | UnsetType = UNSET


class CompletionStreamResponse(Body):
    """A chunk of a streamed completion.

    usage: null in the chunks before the usage; unset in a stream without usage.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionStreamChoice]
    usage: UsageInfo | UnsetType | None = UNSET


# ---- chat completions ------------------------------------------------------------------------


class ChatCompletionLogprob(Body):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogprobsContent(ChatCompletionLogprob):
    """The log-probability of a token of an answer, and those of its alternatives."""

    top_logprobs: list[ChatCompletionLogprob]


class ChatCompletionLogprobs(Body):
    """Log-probabilities of the tokens of an answer."""

    content: list[ChatCompletionLogprobsContent]
    refusal: None


class FunctionCall(Body):
    """The function that the model calls, and its arguments."""

    name: str
    arguments: Annotated[str, Meta(description="The arguments as JSON text.")]


class ChatCompletionToolCall(Body):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Body):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None
    reasoning_content: Annotated[
        str | None,
        Meta(
            description="The same text as `reasoning`, under another name. Both are null if there "
            "is no reasoning."
        ),
    ]
    tool_calls: list[ChatCompletionToolCall] | UnsetType = UNSET
    function_call: Annotated[
        FunctionCall | UnsetType, Meta(description="The call, if the request has `functions`.")
    ] = UNSET


class ChatCompletionChoice(Body):
    """One choice of a chat: an answer."""

    index: int
    message: ChatMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: str
    token_ids: _TokenIds
    graph_steps: _GraphSteps = UNSET
    graph_stats: _GraphStats = UNSET


class ChatCompletionResponse(Body):
    """The response to POST /v1/chat/completions. A stream has `chat.completion.chunk` objects
    instead, whose choices hold a delta of the message."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: UsageInfo
    prompt_token_ids: _PromptTokenIds
    prompt_logprobs: _PromptLogprobs


class DeltaFunctionCall(Body):
    """What a chunk adds to the call of a function."""

    arguments: str
    name: str | UnsetType = UNSET


class DeltaToolCall(Body):
    """What a chunk adds to a tool call; its first delta has the id, the type and the name."""

    index: int
    function: DeltaFunctionCall
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class DeltaMessage(Body):
    """What a chunk adds to the assistant's message, in the form that OpenAI's client assembles."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET
    function_call: DeltaFunctionCall | UnsetType = UNSET


class ChatCompletionStreamChoice(Body):
    """What a chunk adds to one choice of a chat.

    graph_steps, graph_stats: set in the last chunk of the choice, if they were asked for.
    """

    index: int
    delta: DeltaMessage
    logprobs: ChatCompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    graph_steps: dict[str, int] | UnsetType = UNSET
    graph_stats: GraphStats | UnsetType = UNSET


class ChatCompletionStreamResponse(Body):
    """A chunk of a streamed chat.

    usage: null in the chunks before the usage; unset in a stream without usage.
    prompt_token_ids: set in the first chunk of each choice.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatCompletionStreamChoice]
    usage: UsageInfo | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET


# ---- other responses -------------------------------------------------------------------------


class TokenizeResponse(Body):
    """The response to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Annotated[
        list[str] | None,
        Meta(
            description="The tokens as the vocabulary spells them. Null without return_token_strs."
        ),
    ]


class TokenizerInfo(Body):
    """The response to GET /tokenizer_info."""

    vocab_size: int
    special_token_ids: list[int]
    eos_token_ids: Annotated[list[int], Meta(description="The tokens that end an answer.")]
    chat_template: Annotated[
        str | None, Meta(description="The chat template in Jinja; null if there is none.")
    ]
    chat_template_variables: Annotated[
        list[str], Meta(description="The variables that chat_template_kwargs may set.")
    ]


class Embedding(Body):
    """The embedding of one input."""

    object: Literal["embedding"]
    index: int
    embedding: Annotated[
        str | list[float],
        Meta(description="A vector of length 1: numbers, or base64 of float32 numbers."),
    ]


class EmbeddingUsageInfo(Body):
    """The token counts of all inputs together."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Body):
    """The response to POST /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsageInfo


class DetokenizeResponse(Body):
    """The response to POST /detokenize."""

    prompt: str


class ModelCard(Body):
    """The model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: Annotated[str, Meta(description="The checkpoint that is served under this name.")]
    parent: None
    max_model_len: Annotated[
        int | None,
        Meta(description="Maximum number of tokens of a request. Null while the engine loads."),
    ]


class ModelList(Body):
    """The model under all of its names."""

    object: Literal["list"]
    data: list[ModelCard]


class HealthResponse(Body):
    """The response to GET /health."""

    state: EngineState


class LoadResponse(Body):
    """The response to GET /load."""

    server_load: Annotated[
        int, Meta(description="Number of requests that run or wait in the engine.")
    ]


class LoadingProgress(Body):
    """Progress of the engine's start-up."""

    phase: str
    done: int
    total: int


class ServingGeneration(Body):
    """The generation of code and graphs that serves."""

    state: CompilationState
    generation: Annotated[int, Meta(description="0 for the model's own code, 1 for compiled code.")]
    reason: Annotated[
        str, Meta(description="Why compiled code does not serve; empty if it does or may yet.")
    ]


class ServingGraphs(Body):
    """The graphs that serve. Batches of other sizes run at the next larger one."""

    graphs: Annotated[int, Meta(description="Their number.")]
    total: Annotated[int, Meta(description="The number of all graphs of the capture sizes.")]
    missing: Annotated[int, Meta(description="The number that will be captured while serving.")]
    decode: Annotated[tuple[int, ...], Meta(description="Decode batches, in requests.")]
    mixed: Annotated[tuple[int, ...], Meta(description="Batches with prefill, in tokens.")]
    epilogues: Annotated[tuple[int, ...], Meta(description="Epilogues, in requests.")]
    refused: Annotated[
        dict[str, str], Meta(description="Graphs that failed their certification, and why.")
    ]
    quarantined: Annotated[
        dict[str, str],
        Meta(
            description="Graphs that were taken out of service because a step by them differed "
            "from its eager run, and how it did."
        ),
    ]
    stopped: Annotated[
        str, Meta(description="Why no more graphs are captured; empty if they are, or all serve.")
    ]


class ReadyResponse(Body):
    """The response to GET /ready."""

    state: EngineState
    loading: Annotated[
        LoadingProgress | UnsetType | None,
        Meta(description="Progress of the start-up; only while the engine loads."),
    ] = UNSET
    compilation: Annotated[
        ServingGeneration | UnsetType,
        Meta(description="The generation that serves; only while the engine takes requests."),
    ] = UNSET
    graphs: Annotated[
        ServingGraphs | UnsetType,
        Meta(description="The graphs that serve; only while the engine takes requests."),
    ] = UNSET


class VersionResponse(Body):
    """The response to GET /version."""

    version: str


class SleepResponse(Body):
    """The response to POST /sleep, POST /wake_up and GET /is_sleeping."""

    is_sleeping: bool
    level: Annotated[int, Meta(description="Level of the sleep; 0 if the engine is awake.")]
    released: Annotated[
        list[str], Meta(description="Parts of the memory that are released: weights, kv_cache.")
    ]

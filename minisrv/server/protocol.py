"""The request bodies: every field is typed and bounded, and everything else is refused by name.

A field is in one of four classes:

- supported: declared here, and it does what OpenAI (or vLLM, for its extensions) says it does;
- metadata and hints (`user`, `store`, `service_tier`, ...): ignored, as they do not change the
  answer;
- known but not supported: accepted at the values that ask for nothing, and otherwise refused by
  name;
- unknown: refused by name, except in messages, which clients send back as they got them.

An explicit null equals an absent field. Types are as strict as OpenAI's: nothing is converted,
except that a float may be written as an integer.

Knows: JSON bodies and sampling parameters. Knows nothing of tokens, engines or HTTP.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    model_validator,
)

from minisrv.checkpoint import GenerationConfig
from minisrv.errors import shown
from minisrv.request import (
    MAX_BIAS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_K,
    MIN_REPETITION,
    SEED_MAX,
    SEED_MIN,
    SamplingParams,
    StructuredOutput,
    choice_seed,
)
from minisrv.server.messages import Messages
from minisrv.server.strict import MAX_TEXT, RequestBody, ShortText, Strict, Text, at_most, refuse
from minisrv.server.structured import ResponseFormat, StructuredOutputs
from minisrv.server.tools import MAX_TOOLS, NamedTool, Tool, ToolChoice
from minisrv.server.unsupported import (
    CHAT_ONLY,
    COMPLETION_ONLY,
    EVERYWHERE,
    TOKENIZE,
)

MAX_PROMPTS = 64
MAX_CHOICES = 128
"""Maximum number of choices of one response: prompts times `n`."""
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 512
MAX_PROMPT_TOKENS = 1 << 22
MAX_TOKEN_ID = 2**31 - 1
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of a completion request that does not set it; OpenAI's default."""

ModelName: TypeAlias = Annotated[ShortText, AfterValidator(lambda name: name or None)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenCount: TypeAlias = Annotated[int, Field(ge=1, le=2**31 - 1)]
Prompts: TypeAlias = list[str] | list[list[int]]
PromptIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
AnyPrompt: TypeAlias = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | PromptIds
    | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings: TypeAlias = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Bias: TypeAlias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Biases: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")], Bias],
    Field(max_length=MAX_LOGIT_BIAS),
]


class StreamOptions(Strict):
    """What a stream reports besides its text."""

    include_usage: bool = False
    """End the stream with a chunk that holds the usage and no choice."""
    continuous_usage_stats: bool = False
    """Beside include_usage, report in every chunk the usage of its choice so far, as vLLM does."""
    include_obfuscation: bool = False
    """Ignored."""


def _logit_bias(value: Any) -> dict[int, float]:
    """Convert the token ids of `logit_bias`, which are strings in JSON, to integers, and check each
    entry."""
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must name at most {MAX_LOGIT_BIAS} tokens, not {len(value)}")
    for name, amount in value.items():
        if not _is_token_id(name):
            raise refuse(
                name,
                f"Invalid 'logit_bias': the key {shown(name)} must be a token id, which is "
                "an integer from 0, written as a string.",
            )
        if type(amount) not in (int, float) or not -MAX_BIAS <= amount <= MAX_BIAS:
            raise refuse(
                name,
                f"Invalid 'logit_bias': the bias of token {name} must be a number from "
                f"-{MAX_BIAS} to {MAX_BIAS} (got {shown(amount)}).",
            )
    return {int(name): float(amount) for name, amount in value.items()}


def _is_token_id(name: str) -> bool:
    """Whether the text is a token id in its one valid spelling: decimal, without leading zeros."""
    short = name.isascii() and name.isdigit() and len(name) <= len(str(MAX_TOKEN_ID))
    return short and name == str(int(name)) and int(name) <= MAX_TOKEN_ID


def _one_or_more(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of strings")
    return [value] if isinstance(value, str) else value


class GenerationRequest(RequestBody):
    """The fields that completions and chat completions share."""

    unsupported = EVERYWHERE

    model: ModelName | None = None
    """The model's name; absent or empty, the served model."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Choices for each prompt. With a seed, the first has it and each other one more."""
    max_tokens: TokenCount | None = None
    """Tokens to generate at most."""
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Tokens before which no end-of-sequence or stop token is sampled and no stop string counts. A
    structured output that is complete ends all the same."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the smallest set of most likely tokens that is this probable."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep tokens at least this probable, relative to the most likely one."""
    logit_bias: Annotated[
        dict[int, float],
        PlainValidator(_logit_bias, json_schema_input_type=Biases),
    ] = Field(default={})
    """What is added to the logits of tokens, by token id, before penalties and temperature."""
    presence_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    """Taken from the logits of tokens that the completion holds."""
    frequency_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    """Taken from the logits of tokens for each time that the completion holds them."""
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION, le=MAX_REPETITION)] | None = None
    """Divides positive logits of tokens that prompt or completion hold, and multiplies others."""
    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    """Draw the same numbers again, alone or in any batch, in any mode. Absent, drawn anew."""
    stop: Annotated[
        StopStrings,
        BeforeValidator(_one_or_more, json_schema_input_type=StopString | StopStrings),
    ] = Field(default=[])
    """End the text before the first of these strings."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] = Field(
        default=[]
    )
    """End after one of these tokens."""
    include_stop_str_in_output: bool = False
    """Let the text hold the stop string, or the text of the stop token, that it ends at."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the log-probability of each prompt token but the first and of this many alternatives.
    Not in a stream."""
    cache_salt: Annotated[ShortText, Field(min_length=1)] | None = None
    """Share cached prefixes only with requests that send the same salt, and have the same API key.
    Others cannot tell from the time of an answer what has been asked before."""
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    """Requests with a lower number are admitted earlier, and preempted later when the KV cache is
    full; none is preempted to make room for another (vLLM's extension). Nobody waits for ever: of
    eight that are admitted before others one is the oldest, whatever its number."""
    response_format: ResponseFormat | None = None
    """What the text must be: JSON, or JSON that follows a schema, whose objects hold the properties
    that it declares and, unless it says so, no others."""
    structured_outputs: StructuredOutputs | None = None
    """What the text must be, in one of more ways (vLLM's extension)."""
    stream: bool = False
    """Send the answer as it comes, as server-sent events."""
    stream_options: StreamOptions | None = None
    """include_usage ends the stream with the usage; beside it continuous_usage_stats tells the
    usage of a chunk's choice so far in each chunk."""
    return_token_ids: bool = False
    """Report the token ids of prompt and completion."""
    include_graph_steps: bool = False
    """Report how many of the request's steps ran in which mode, and why."""
    user: ShortText | None = None
    """Ignored."""
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], ShortText],
            Field(max_length=16),
            at_most(16),
        ]
        | None
    ) = None
    """Ignored."""
    store: bool | None = None
    """Ignored."""
    safety_identifier: ShortText | None = None
    """Ignored."""
    prompt_cache_key: ShortText | None = None
    """Ignored: a hint for routing, and there is one engine."""
    prompt_cache_options: Any = None
    """Ignored: the prefix cache takes every prompt."""
    prompt_cache_retention: Any = None
    """Ignored: the prefix cache keeps what there is room for."""
    service_tier: Any = None
    """Ignored: there is one tier."""
    prediction: Any = None
    """Ignored: a hint that makes an answer come faster, and no other one."""
    moderation: Any = None
    """Ignored: nothing is moderated."""
    verbosity: Any = None
    """Ignored: a hint to models that were trained for it."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options is only allowed when stream is true.")
        return self

    @model_validator(mode="after")
    def _prompts_are_not_reported_in_a_stream(self) -> GenerationRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise refuse("prompt_logprobs", "prompt_logprobs is not allowed when stream is true.")
        return self

    @model_validator(mode="after")
    def _one_structured_output(self) -> GenerationRequest:
        asked = self.response_format is not None and self.response_format.type != "text"
        if self.structured_outputs is not None and asked:
            raise refuse(
                "structured_outputs",
                "structured_outputs and response_format both say what the text must be; "
                "send one of them.",
            )
        return self

    @property
    def structured_output(self) -> StructuredOutput | None:
        """The structured output that the text must follow; None if it may be anything. Raises
        RequestError for one that is too large."""
        given = self.structured_outputs or self.response_format
        return None if given is None else given.as_spec()

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of the stream holds the usage of its choice so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens to generate, as the client set it; None if it did not."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives to report for each token; None reports no log-probabilities at
        all."""
        return None

    @property
    def num_scored_logprobs(self) -> int | None:
        """Number of alternatives to report for each prompt token, in whatever field of the
        response; None reports none."""
        return self.prompt_logprobs

    def sampling_params(
        self, defaults: GenerationConfig, max_tokens: int, *, choice: int = 0
    ) -> SamplingParams:
        """Return the engine's sampling parameters: each is the request's, else the checkpoint's,
        else OpenAI's default.

        choice: which of the `n` choices of its prompt this is; see `choice_seed`.

        Stop strings are not part of them: they are found in the text, not by the engine.
        """

        def first(*candidates: float | None) -> float:
            return next(value for value in candidates if value is not None)

        return SamplingParams(
            max_tokens=max_tokens,
            # The checkpoint's default must not make a request invalid that does not set min_tokens.
            min_tokens=(
                min(defaults.min_tokens or 0, max_tokens)
                if self.min_tokens is None
                else self.min_tokens
            ),
            temperature=first(self.temperature, defaults.temperature, 1.0),
            top_p=first(self.top_p, defaults.top_p, 1.0),
            top_k=int(first(self.top_k, defaults.top_k, 0)),
            min_p=first(self.min_p, defaults.min_p, 0.0),
            seed=choice_seed(self.seed, choice),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logit_bias=self.logit_bias,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_scored_logprobs,
        )


def _prompts(value: Any) -> Prompts:
    """Convert each of the four forms of `prompt` to a list of texts or a list of lists of token
    ids."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value:
        types = set(map(type, value))
        if types == {int}:
            value, types = [value], {list}
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, not {len(value)}")
        if types == {str}:
            return [_text(text) for text in value]
        if types == {list}:
            return [_token_ids(ids) for ids in value]
    raise ValueError(
        "must be a string, a list of strings, a list of token ids "
        "or a list of lists of token ids, and not empty"
    )


def _text(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"must have at most {MAX_TEXT} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without lone surrogates") from error
    return text


def _token_ids(ids: list[Any]) -> list[int]:
    if not ids:
        raise ValueError("must not hold an empty list of token ids: send at least one")
    if len(ids) > MAX_PROMPT_TOKENS:
        raise ValueError(f"must have at most {MAX_PROMPT_TOKENS} tokens")
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        raise ValueError("must consist of token ids, which are integers from 0")
    return ids


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    unsupported = EVERYWHERE | COMPLETION_ONLY

    prompt: Annotated[
        Prompts,
        PlainValidator(_prompts, json_schema_input_type=AnyPrompt),
    ]
    """A text, token ids, or a list of either: `n` choices each."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the log-probability of each token and of this many alternatives."""
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Tokens to generate at most; 0 with echo or prompt_logprobs only."""
    echo: bool = False
    """Begin the text, and the log-probabilities if they are asked for, with the prompt's."""

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise refuse("max_tokens", "max_tokens=0 is only allowed with echo or prompt_logprobs.")
        return self

    @model_validator(mode="after")
    def _choices_are_bounded(self) -> CompletionRequest:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise refuse(
                "n",
                f"{len(self.prompt)} prompts with n={self.n} ask for {len(self.prompt) * self.n} "
                f"choices, and one request may ask for {MAX_CHOICES}; send several requests.",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_scored_logprobs(self) -> int | None:
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)


class TokenizeRequest(RequestBody):
    """The body of POST /tokenize: a prompt, or the messages of a chat."""

    unsupported = TOKENIZE

    model: ModelName | None = None
    """The model's name; absent or empty, the served model."""
    prompt: Annotated[Text, AfterValidator(_text)] | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Let the tokenizer add what it adds around a text. Absent, it does to a prompt, and not to
    messages, whose template spells every token."""
    add_generation_prompt: bool = True
    """End the messages with what begins an answer."""
    return_token_strs: bool = False
    """Report the tokens as the vocabulary spells them, too."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("prompt", "Send either prompt or messages.")
        if self.messages is None and "add_generation_prompt" in self.model_fields_set:
            raise refuse(
                "add_generation_prompt", "add_generation_prompt is only allowed with messages."
            )
        return self


class DetokenizeRequest(RequestBody):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    """The model's name; absent or empty, the served model."""
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    unsupported = EVERYWHERE | CHAT_ONLY

    messages: Messages
    """The chat so far: text, calls of tools and their results, and reasoning."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name of max_tokens. Absent, the answer may fill the context."""
    logprobs: bool = False
    """Report the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report this many alternatives to each token; needs logprobs."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """none: as if there were no tools; auto, which is meant if there are any: as the model likes;
    required, or the name of one: it must, and the arguments follow the schema as a
    response_format's text does."""
    parallel_tool_calls: bool = True
    """Allow several calls in one answer; else those behind the first are dropped."""
    chat_template_kwargs: Annotated[
        dict[Annotated[str, Field(max_length=64)], bool | int | float | ShortText],
        Field(max_length=16),
        at_most(16),
    ] = Field(default={})
    """Variables of the chat template, e.g. enable_thinking."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "top_logprobs is only allowed when logprobs is true.")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refuse(
                "max_tokens",
                "max_tokens and max_completion_tokens differ; send one of them.",
            )
        return self

    @model_validator(mode="after")
    def _tools_agree(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise refuse("tools", "tools holds two functions of one name.")
        if not names and self.tool_choice not in (None, "none"):
            raise refuse("tool_choice", "tool_choice is only allowed with tools.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise refuse("tool_choice", f"tool_choice names {name}, which is not one of tools.")
        form = self.response_format
        if self.offered_tools and (self.structured_outputs or (form and form.type != "text")):
            raise refuse(
                "tools",
                "tools is not supported beside response_format or structured_outputs, which say "
                'what all of the text must be; leave one of them out, or send tool_choice "none".',
            )
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of, and may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def required_tools(self) -> list[Tool]:
        """The tools of which one must be called; empty if none need be."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

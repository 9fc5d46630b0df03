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

from typing import Annotated, Any, ClassVar, TypeAlias

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
    """Options for what a stream reports in addition to its text."""

    include_usage: bool = False
    """End the stream with a chunk that contains the usage and no choice."""
    continuous_usage_stats: bool = False
    """Together with include_usage, report in every chunk the usage of its choice so far, as vLLM
    does."""
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
    prompt_param: ClassVar[str] = "prompt"
    """The field that holds the prompt, for errors to name."""

    model: ModelName | None = None
    """Name of the model. If absent or empty, the served model is used."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    """Number of choices to generate for each prompt. If a seed is set, the first choice uses it,
    and each further choice the seed of the one before plus one."""
    max_tokens: TokenCount | None = None
    """Maximum number of tokens to generate."""
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Minimum number of tokens to generate: before that, no end-of-sequence or stop token is
    sampled, and stop strings have no effect. A structured output that is complete ends even so."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature. 0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample only from the smallest set of most likely tokens whose probabilities sum to at least
    this value."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    """Sample only from this many most likely tokens. 0 or -1 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample only from tokens whose probability is at least this fraction of the most likely
    token's."""
    logit_bias: Annotated[
        dict[int, float],
        PlainValidator(_logit_bias, json_schema_input_type=Biases),
    ] = Field(default={})
    """Maps token ids to numbers that are added to the logits of these tokens, before penalties and
    temperature."""
    presence_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    """Number to subtract from the logit of each token that the completion already contains."""
    frequency_penalty: Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    """Number to subtract from the logit of each token for each time that the completion already
    contains it."""
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION, le=MAX_REPETITION)] | None = None
    """For tokens that the prompt or the completion contains, positive logits are divided by this
    value, and negative ones multiplied by it."""
    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    """Seed of the random numbers: the same seed gives the same numbers, in any batch and in any
    graph mode. If absent, a seed is drawn."""
    stop: Annotated[
        StopStrings,
        BeforeValidator(_one_or_more, json_schema_input_type=StopString | StopStrings),
    ] = Field(default=[])
    """Strings that end the text. It ends before the first of them that occurs."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] = Field(
        default=[]
    )
    """Tokens that end the completion as soon as one of them is sampled."""
    include_stop_str_in_output: bool = False
    """Include in the text the stop string, or the text of the stop token, that ended it."""
    ignore_eos: bool = False
    """Continue after the model's end-of-sequence tokens."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the log-probability of each prompt token except the first, and of this many most
    likely alternatives. Not allowed in a stream."""
    cache_salt: Annotated[ShortText, Field(min_length=1)] | None = None
    """Share cached prefixes only with requests that send the same salt and have the same API key.
    Others cannot find out from the time of a response which prompts were sent before."""
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    """Requests with a lower number are admitted earlier, and preempted later when the KV cache is
    full (vLLM's extension). No request is preempted to make room for one that waits. No request
    waits for ever: whenever requests with lower numbers have gone first eight times, the oldest
    waiting request gets a turn, whatever its number."""
    response_format: ResponseFormat | None = None
    """Format that the text must have: any text, a JSON object, or JSON that follows a schema.
    Unless the schema allows others, objects have only the properties that it declares."""
    structured_outputs: StructuredOutputs | None = None
    """Format that the text must have, as a JSON schema, regular expression, choice of texts,
    grammar or JSON object (vLLM's extension)."""
    stream: bool = False
    """Send the answer as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Options of a stream: include_usage ends it with a chunk that contains the usage; together
    with that, continuous_usage_stats reports in every chunk the usage of its choice so far."""
    return_token_ids: bool = False
    """Report the token ids of the prompt and of the completion."""
    include_graph_steps: bool = False
    """Report the number of steps in which the request was computed, by graph mode and the reason
    for it."""
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
    """Ignored: it is a hint for routing, and there is only one engine."""
    prompt_cache_options: Any = None
    """Ignored: the prefix cache stores every prompt."""
    prompt_cache_retention: Any = None
    """Ignored: the prefix cache keeps entries as long as there is room."""
    service_tier: Any = None
    """Ignored: there is only one tier."""
    prediction: Any = None
    """Ignored: it is a hint that speeds up an answer without changing it."""
    moderation: Any = None
    """Ignored: nothing is moderated."""
    verbosity: Any = None
    """Ignored: it is a hint for models that were trained to follow it."""

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
    def cuts_token_limit(self) -> bool:
        """Whether a maximum number of tokens that does not fit into the context is cut to what
        fits; if not, the request is refused."""
        return False

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
    """The prompt: a text, a list of token ids, or a list of several of either. Each prompt gets `n`
    choices."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report the log-probability of each token and of this many most likely alternatives."""
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Maximum number of tokens to generate. 0 is allowed only with echo or prompt_logprobs."""
    echo: bool = False
    """Begin the text with the prompt. If logprobs is set, the log-probabilities begin with those of
    the prompt."""

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
    """Name of the model. If absent or empty, the served model is used."""
    prompt: Annotated[Text, AfterValidator(_text)] | None = None
    """The text to tokenize."""
    messages: Messages | None = None
    """The messages of a chat, which are rendered by the chat template and then tokenized."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens, such as BOS. By default it does for a prompt,
    but not for messages, because the chat template already contains them."""
    add_generation_prompt: bool = True
    """Append the tokens that begin an answer to the messages."""
    return_token_strs: bool = False
    """Report each token also as a string, as the vocabulary spells it."""

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
    """Name of the model. If absent or empty, the served model is used."""
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
    """The token ids to convert to text."""


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    unsupported = EVERYWHERE | CHAT_ONLY
    prompt_param: ClassVar[str] = "messages"

    messages: Messages
    """The chat so far: texts, tool calls and their results, and reasoning."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name of max_tokens. If both are absent, the checkpoint's max_new_tokens is
    used, else the answer may fill the context."""
    logprobs: bool = False
    """Report the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report this many most likely alternatives to each token. Needs logprobs."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """Whether the model calls tools. none: it is told of no tools. auto (the default if there are
    tools): the model decides. required, or the name of a function: it must call one, or this one,
    and the arguments follow the schema as the text of a response_format does. Beside a format, auto
    means calls whose arguments follow their schemas, or text that follows the format, and a
    required call leaves no text to be formatted."""
    parallel_tool_calls: bool = True
    """Allow several tool calls in one answer. If false, all but the first are dropped."""
    chat_template_kwargs: Annotated[
        dict[Annotated[str, Field(max_length=64)], bool | int | float | ShortText],
        Field(max_length=16),
        at_most(16),
    ] = Field(default={})
    """Variables for the chat template, e.g. enable_thinking."""

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
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the prompt describes to the model, and that it may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def required_tools(self) -> list[Tool]:
        """The tools of which at least one must be called; empty if no call is required."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def constrained_tools(self) -> list[Tool]:
        """The tools whose calls must follow their parameters: required ones, and all that are
        offered where the text must have a form as well."""
        return self.required_tools or (self.offered_tools if self.structured_output else [])

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

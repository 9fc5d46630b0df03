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

from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

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
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
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
from minisrv.server.structured import (
    Choices,
    GrammarText,
    ResponseFormat,
    SchemaOrText,
    StructuredOutputs,
)
from minisrv.server.tools import (
    MAX_TOOLS,
    AllowedToolsChoice,
    Function,
    FunctionName,
    NamedTool,
    Tool,
    ToolChoice,
)
from minisrv.server.unsupported import (
    CHAT_ONLY,
    COMPLETION_ONLY,
    EMBEDDINGS,
    EVERYWHERE,
    TOKENIZE,
)

MAX_PROMPTS = 64
MAX_INPUTS = 2048
"""Maximum number of inputs of one request for embeddings; OpenAI's limit."""
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
AnyInput: TypeAlias = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    | PromptIds
    | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_INPUTS)]
)
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings: TypeAlias = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Bias: TypeAlias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Biases: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")], Bias],
    Field(max_length=MAX_LOGIT_BIAS),
]


def _not_all(value: Any) -> Any:
    """Refuse vLLM's -1 with the bound that it exceeds; vLLM does the same where its own limit is
    below the size of the vocabulary."""
    if value == -1:
        raise ValueError(
            f"must be from 0 to {MAX_LOGPROBS}; -1 asks for all tokens of the vocabulary"
        )
    return value


Alternatives: TypeAlias = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_not_all)]
"""How many of the most likely tokens to report."""


class StreamOptions(Strict):
    """Options for what a stream reports in addition to its text."""

    include_usage: bool = False
    """End the stream with a chunk that contains the usage and no choice."""
    continuous_usage_stats: bool = False
    """Together with include_usage, report in every chunk the usage of its choice so far, as vLLM
    does."""
    include_obfuscation: bool = False
    """Ignored."""


_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older fields for structured outputs, with the field of `structured_outputs` that each
is."""


_FORMS = ("structured_outputs", *_GUIDED)


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
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=MAX_ALLOWED_TOKENS)] = Field(
        default=[]
    )
    """Sample only these tokens. An empty list allows all. Not allowed with a structured output."""
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH, pattern=r"\S")]],
        Field(max_length=MAX_BAD_WORDS),
    ] = Field(default=[])
    """Texts that the completion must not contain: no token is sampled that would complete one of
    them, as the tokenizer splits it, with or without a space in front. Other tokens may spell the
    same text. Not allowed with a structured output."""
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
    prompt_logprobs: Alternatives | None = None
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
    guided_json: SchemaOrText | None = None
    """vLLM's older name of json in structured_outputs."""
    guided_regex: GrammarText | None = None
    """vLLM's older name of regex in structured_outputs."""
    guided_choice: Choices | None = None
    """vLLM's older name of choice in structured_outputs."""
    guided_grammar: GrammarText | None = None
    """vLLM's older name of grammar in structured_outputs."""
    truncate_prompt_tokens: (
        Literal[-1] | Annotated[int, Field(ge=1, le=MAX_PROMPT_TOKENS)] | None
    ) = None
    """Use only this many of the last tokens of each prompt; -1 uses as many as leave room for
    max_tokens, or for one token."""
    return_tokens_as_token_ids: bool = False
    """Spell the tokens of log-probabilities as `token_id:123`."""
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
        names = [name for name in _FORMS if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            names.append("response_format")
        if len(names) > 1:
            raise refuse(
                names[0],
                f"{names[0]} and {names[1]} both say what the text must be; send one of them.",
            )
        return self

    @property
    def structured_output(self) -> StructuredOutput | None:
        """The structured output that the text must follow; None if it may be anything. Raises
        RequestError for one that is too large."""
        for name, field in _GUIDED.items():
            if (value := getattr(self, name)) is not None:
                return StructuredOutputs.model_validate({field: value}).as_spec(name)
        given = self.structured_outputs or self.response_format
        return None if given is None else given.as_spec()

    def with_usage(self) -> Self:
        """Return the request with `include_usage` if it is streamed, and otherwise as it is."""
        if not self.stream or self.include_usage:
            return self
        options = self.stream_options or StreamOptions()
        asked = {"stream_options": options.model_copy(update={"include_usage": True})}
        return self.model_copy(update=asked).with_num_bytes(self.num_bytes)

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

    @property
    def is_cut(self) -> bool:
        """Whether a prompt that is too long is cut; if not, it is refused."""
        return self.truncate_prompt_tokens is not None

    def kept_prompt_tokens(self, max_model_len: int) -> int:
        """Return the number of tokens to which a prompt is cut; more than any prompt may have if it
        is not cut.

        max_model_len: the context length.
        """
        asked = self.truncate_prompt_tokens
        if asked == -1:
            limit = 1 if self.token_limit is None else self.token_limit
            return max(1, max_model_len - limit)
        return MAX_PROMPT_TOKENS if asked is None else asked

    def sampling_params(
        self,
        defaults: GenerationConfig,
        max_tokens: int,
        *,
        choice: int = 0,
        bad_words_token_ids: tuple[tuple[int, ...], ...] = (),
    ) -> SamplingParams:
        """Return the engine's sampling parameters: each is the request's, else the checkpoint's,
        else OpenAI's default.

        choice: which of the `n` choices of its prompt this is; see `choice_seed`.
        bad_words_token_ids: the tokens of `bad_words`.

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
            allowed_token_ids=tuple(self.allowed_token_ids),
            bad_words_token_ids=bad_words_token_ids,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_scored_logprobs,
        )


def _prompts(value: Any, most: int = MAX_PROMPTS) -> Prompts:
    """Convert each of the four forms of `prompt` to a list of texts or a list of lists of token
    ids, at most so many."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value:
        types = set(map(type, value))
        if types == {int}:
            value, types = [value], {list}
        if len(value) > most:
            raise ValueError(f"must hold at most {most} prompts, not {len(value)}")
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
    logprobs: Alternatives | None = None
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


def _inputs(value: Any) -> Prompts:
    return _prompts(value, MAX_INPUTS)


class EmbeddingRequest(RequestBody):
    """The body of POST /v1/embeddings."""

    unsupported = EMBEDDINGS

    model: ModelName | None = None
    """Name of the model. If absent or empty, the served model is used."""
    input: Annotated[Prompts, PlainValidator(_inputs, json_schema_input_type=AnyInput)]
    """The input: a text, a list of token ids, or a list of several of either."""
    encoding_format: Literal["float", "base64"] = "float"
    """Send each vector as a list of numbers, or as base64 of float32 numbers, the lowest byte
    first."""
    dimensions: TokenCount | None = None
    """Number of dimensions, which must be that of the model."""
    truncate_prompt_tokens: (
        Literal[-1] | Annotated[int, Field(ge=1, le=MAX_PROMPT_TOKENS)] | None
    ) = None
    """Use only this many of the last tokens of each input; -1 uses as many as fit the context."""
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    """As in a generation."""
    user: ShortText | None = None
    """Ignored."""


class ChatRendering(RequestBody):
    """The fields that say how the messages of a chat become a prompt."""

    add_generation_prompt: bool = True
    """Append the tokens that begin an answer to the messages. Without them, and without
    continue_final_message, the model itself begins the next message."""
    continue_final_message: bool = False
    """End the prompt within the last message, which must be an assistant's, so that the answer
    continues its text. Not allowed with `"add_generation_prompt": true`."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(default=[])
    """Functions that the model may call."""
    chat_template_kwargs: Annotated[
        dict[Annotated[str, Field(max_length=64)], bool | int | float | ShortText],
        Field(max_length=16),
        at_most(16),
    ] = Field(default={})
    """Variables for the chat template, e.g. enable_thinking. A variable that the template does not
    read is refused, except one that turns reasoning off for a model that does not reason."""

    @model_validator(mode="after")
    def _a_prompt_ends_in_one_way(self) -> Self:
        asked = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and asked:
            raise refuse(
                "continue_final_message",
                "continue_final_message and add_generation_prompt cannot both be true.",
            )
        return self

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends with the tokens that begin an answer."""
        return self.add_generation_prompt and not self.continue_final_message


class TokenizeRequest(ChatRendering):
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
    return_token_strs: bool = False
    """Report each token also as a string, as the vocabulary spells it."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("prompt", "Send either prompt or messages.")
        for name in ChatRendering.model_fields:
            if self.messages is None and name in self.model_fields_set:
                raise refuse(name, f"{name} is only allowed with messages.")
        return self


class DetokenizeRequest(RequestBody):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    """Name of the model. If absent or empty, the served model is used."""
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
    """The token ids to convert to text."""


class ChatCompletionRequest(ChatRendering, GenerationRequest):
    """The body of POST /v1/chat/completions."""

    unsupported = EVERYWHERE | CHAT_ONLY
    prompt_param: ClassVar[str] = "messages"
    effort_param: ClassVar[str] = "reasoning_effort"
    """The field that says how much the model reasons, for errors to name."""

    messages: Messages
    """The chat so far: texts, tool calls and their results, and reasoning."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name of max_tokens. If both are absent, the checkpoint's max_new_tokens is
    used, else the answer may fill the context."""
    logprobs: bool = False
    """Report the log-probability of each token."""
    top_logprobs: Alternatives | None = None
    """Report this many most likely alternatives to each token. Needs logprobs, unless it is 0."""
    tool_choice: ToolChoice | None = None
    """Whether the model calls tools. none: it is told of no tools. auto (the default if there are
    tools): the model decides. required, or the name of a function: it must call one, or this one,
    and the arguments follow the schema as the text of a response_format does. allowed_tools: auto
    or required among some of the tools; the model is told of these only. Beside a format, auto
    means calls whose arguments follow their schemas, or text that follows the format, and a
    required call leaves no text to be formatted."""
    parallel_tool_calls: bool = True
    """Allow several tool calls in one answer. If false, all but the first are dropped."""
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default=[]
    )
    """OpenAI's older form of tools. The answer has at most one call, as its function_call."""
    function_call: Literal["none", "auto"] | FunctionName | None = None
    """OpenAI's older form of tool_choice, for functions: none, auto, or the name of a function that
    must be called."""
    echo: bool = False
    """Begin the answer with the text of the last message, if it is an assistant's."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Becomes the chat template's variable reasoning_effort. If the template has a variable that
    turns reasoning on and off, none turns it off; if it has only that, all others turn it on and
    have no other effect. If it has neither, the field is refused, except medium, OpenAI's default,
    for a model that reasons, and none for one that does not."""
    include_reasoning: bool = True
    """Report the reasoning. If false, it is left out of the answer, but counts as before."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
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
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            chosen = getattr(self, choice)
            if not getattr(self, tools) and chosen not in (None, "none", "auto"):
                raise refuse(choice, f"{choice} is only allowed with {tools}.")
        if self.tools and self.functions:
            raise refuse("functions", "functions and tools are the same; send one of them.")
        field, choice = self.tool_params
        names = [tool.function.name for tool in self.declared_tools]
        if len(set(names)) < len(names):
            raise refuse(field, f"{field} holds two functions of one name.")
        for name in self._chosen_names or ():
            if name not in names:
                raise refuse(choice, f"{choice} names {name}, which is not one of {field}.")
        return self

    @property
    def tool_params(self) -> tuple[str, str]:
        """The fields that hold the tools and the choice of one, for errors to name."""
        return ("functions", "function_call") if self.functions else ("tools", "tool_choice")

    @property
    def declared_tools(self) -> list[Tool]:
        """The tools of the request, in whichever of the two forms they were sent."""
        if not self.functions:
            return self.tools
        return [Tool(type="function", function=function) for function in self.functions]

    @property
    def _choice(self) -> ToolChoice | None:
        """The `tool_choice`, in whichever of the two forms it was sent."""
        if isinstance(self.function_call, FunctionName):
            return NamedTool(type="function", function=self.function_call)
        return self.tool_choice if self.function_call is None else self.function_call

    @property
    def _chosen_names(self) -> set[str] | None:
        """The names of the tools that the choice allows; None if it names none."""
        match self._choice:
            case NamedTool(function=function):
                return {function.name}
            case AllowedToolsChoice(allowed_tools=allowed):
                return {tool.function.name for tool in allowed.tools}
        return None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the prompt describes to the model, and that it may call."""
        if self._choice == "none":
            return []
        if not isinstance(self._choice, AllowedToolsChoice):
            return self.declared_tools
        return self._named_tools

    @property
    def required_tools(self) -> list[Tool]:
        """The tools of which at least one must be called; empty if no call is required."""
        match self._choice:
            case "required" | NamedTool():
                return self._named_tools
            case AllowedToolsChoice(allowed_tools=allowed) if allowed.mode == "required":
                return self._named_tools
        return []

    @property
    def _named_tools(self) -> list[Tool]:
        """The tools that the choice names; all if it names none."""
        names = self._chosen_names
        return [
            tool for tool in self.declared_tools if names is None or tool.function.name in names
        ]

    @property
    def allows_several_calls(self) -> bool:
        """Whether the answer may have more than one call."""
        return self.parallel_tool_calls and not self.functions

    @property
    def requires_one_call(self) -> bool:
        """Whether the answer must be a single call."""
        return isinstance(self._choice, NamedTool) or not self.allows_several_calls

    @property
    def constrained_tools(self) -> list[Tool]:
        """The tools whose calls must follow their parameters: required ones, and all that are
        offered where the text must have a form as well."""
        return self.required_tools or (self.offered_tools if self.structured_output else [])

    @property
    def is_cut(self) -> bool:
        return super().is_cut or self.drops_oldest_turns

    @property
    def drops_oldest_turns(self) -> bool:
        """Whether the oldest turns of a chat that is too long are dropped; if not, it is
        refused."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

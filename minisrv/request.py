"""The request that the engine receives and the outputs that it sends back, token by token.

Knows: the sampling parameters and their bounds, the finish reasons, and the typed records that
cross the socket between API worker and engine. Knows nothing of text, HTTP or tensors: prompts are
token ids here, and the API worker looks for stop strings.
"""

from __future__ import annotations

import enum
import json
import math
from typing import TYPE_CHECKING, Any

import msgspec

from minisrv.errors import MinisrvError, RequestError, name_hint, shown

MAX_STOP_TOKEN_IDS = 64
MAX_TOP_K = 2**31 - 1
MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 20
MAX_ALLOWED_TOKENS = 4096
"""Maximum number of token ids in `allowed_token_ids`."""
MAX_BAD_WORDS = 128
"""Maximum number of texts in `bad_words`, each of which may be two lists of tokens."""
MAX_BAD_WORD_LENGTH = 64
"""Maximum number of characters, and of tokens, of each of them."""
MAX_LOGIT_BIAS = 300
"""Maximum number of token ids in `logit_bias`; OpenAI's limit."""
MAX_BIAS = 100
MAX_PENALTY = 2
"""Maximum absolute value of the frequency penalty and of the presence penalty."""
MIN_REPETITION, MAX_REPETITION = 0.01, 100
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1
MAX_N = 16_384
"""Maximum number of completions of one prompt; vLLM's limit."""
MAX_GRAMMAR_LENGTH = 1 << 16
"""Maximum number of characters of a schema, of a regular expression, of a grammar, or of all
choices together."""
MAX_CHOICES = 1024


class Pooling(enum.StrEnum):
    """How the hidden states of a prompt's tokens become its embedding."""

    LAST = "last"
    """The hidden state of the last token is taken."""
    MEAN = "mean"
    """The hidden states of all tokens are averaged."""


class FinishReason(enum.StrEnum):
    """The reason why a request ended. The API reports STOP and LENGTH under OpenAI's names."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled, or a stop string was found."""
    LENGTH = "length"
    """`max_tokens` or the context length was reached."""
    ABORT = "abort"
    """The client disconnected, or asked for the request to be aborted."""


def _check(ok: bool, param: str, value: object, allowed: str) -> None:
    if not ok:
        raise RequestError(
            f"{param}={shown(value)} is not allowed: it must be {allowed}.", param=param
        )


def _check_integer(param: str, value: object, minimum: int, maximum: int, allowed: str) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum
    _check(ok, param, value, allowed)


def _check_number(param: str, value: object, allowed: str) -> float:
    """Return `value` if it is a finite number; raise RequestError if not."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _check(ok, param, value, allowed)
    assert isinstance(value, int | float)
    return value


def _check_boolean(param: str, value: object) -> None:
    _check(isinstance(value, bool), param, value, "true or false")


def _several(param: str, value: object, allowed: str) -> tuple[Any, ...]:
    """Return a list or a tuple as a tuple, and None as an empty one; raise RequestError for any
    other value."""
    _check(value is None or isinstance(value, list | tuple), param, value, allowed)
    return tuple(value) if isinstance(value, list | tuple) else ()


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Return the seed of completion number `choice` of a prompt.

    With a seed, the first completion gets that seed and each further one a seed that is greater by
    one, as in vLLM, so that completions differ and can be reproduced. The number after the last
    signed 64-bit integer is the first one. Without a seed the result is None.
    """
    return None if seed is None else (seed + choice - SEED_MIN) % 2**64 + SEED_MIN


class _NamesParameters(type(msgspec.Struct)):  # type: ignore[misc]
    """Metaclass that raises RequestError for an unknown parameter and names the nearest known
    one."""

    if not TYPE_CHECKING:  # a type checker is to see the fields instead

        def __call__(cls, *values: Any, **parameters: Any) -> Any:
            for name in parameters:
                if name not in cls.__struct_fields__:
                    raise RequestError(
                        f"{cls.__name__} has no {name}; {name_hint(name, cls.__struct_fields__)}",
                        param=name,
                    )
            return super().__call__(*values, **parameters)


_FORM = "structured_outputs"


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, metaclass=_NamesParameters
):
    """The form that the text of a completion must have: exactly one field is set. The names are
    vLLM's.

    json: JSON that follows this schema, given as an object or as text.
    regex: text that this regular expression (Rust's syntax) matches from end to end.
    choice: one of these texts.
    grammar: text that this grammar (Lark, in llguidance's dialect) describes.
    json_object: true for any JSON object.

    Raises RequestError if not exactly one field is set, or if a field has the wrong type.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name)]
        if len(given) != 1:
            raise RequestError(
                f"{_FORM} must hold exactly one of {', '.join(self.__struct_fields__)}, not "
                f"{' and '.join(given) or 'none'}.",
                param=_FORM,
            )
        texts = [self.regex, self.grammar, *_several(_FORM, self.choice, "a list of texts")]
        ok = all(isinstance(text, str | None) for text in texts)
        _check(ok, _FORM, texts, "made of texts")

    def as_spec(self) -> StructuredOutput:
        """Return the form as the engine takes it.

        Raises RequestError for a JSON schema that cannot be written as JSON and for a form whose
        size is out of bounds.
        """
        kinds = StructuredOutputKind
        try:
            schema = self.json if isinstance(self.json, str | None) else json.dumps(self.json)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{_FORM}: json is no JSON schema: {error}.", param=_FORM) from error
        texts = {
            kinds.JSON_SCHEMA: schema,
            kinds.REGEX: self.regex,
            kinds.GRAMMAR: self.grammar,
            kinds.CHOICE: "" if self.choice else None,
            kinds.JSON_OBJECT: "" if self.json_object else None,
        }
        [(kind, text)] = [(kind, text) for kind, text in texts.items() if text is not None]
        choices = tuple(self.choice or ())
        return StructuredOutput(kind=kind, text=text, choices=choices, param=_FORM)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, metaclass=_NamesParameters):
    """Parameters of how tokens are chosen and when to stop. Names and meanings are vLLM's and
    OpenAI's.

    n: the number of completions of a prompt. `LLM` makes a request of each; a request has one.
    max_tokens: the maximum number of completion tokens; None means up to the context length. 0 ends
        the request when its prompt has been computed.
    min_tokens: the number of completion tokens before which only max_tokens ends the request: no
        end-of-sequence or stop token is sampled, and no stop string is looked for. A structured
        output that is complete earlier ends the request all the same, as in vLLM.
    temperature: the sampling temperature; 0 is greedy.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
    min_p: keep tokens whose probability is at least min_p times the highest.
    seed: determines the sampling noise; with None a seed is drawn when the request is admitted.
    stop: the text ends before the first of these strings; a single string may be given without a
        list.
    stop_token_ids: the request ends when one of these is sampled (it stays in the output ids).
    include_stop_str_in_output: keep the stop string, or the text of the stop token, at which the
        text ends.
    ignore_eos: continue after the model's end-of-sequence tokens (for measurements).
    logit_bias: the number that is added to the logit of a token, by token id.
    allowed_token_ids: only these tokens are sampled; None, like an empty list, allows all.
    bad_words: no token is sampled that would complete one of these texts, as the tokenizer splits
        it, with or without a space in front. This is for `LLM`; a request to the engine has the
        tokens instead.
    bad_words_token_ids: sequences of tokens that the completion must not contain.
    presence_penalty, frequency_penalty: the numbers that are subtracted from the logit of each
        token that the completion already has: the first one once, the second one for each
        occurrence.
    repetition_penalty: the number by which the logit of a token in the prompt or the completion is
        divided if it is positive, and multiplied if it is not.
    logprobs: report the log-probability of the sampled token and this many alternatives (None: no
        report).
    prompt_logprobs: report the same for every prompt token except the first. The whole prompt is
        computed in this case, even if some of it is in the prefix cache.
    pooling: report the hidden states of the prompt, summed over the tokens that the pooling takes.
        With the mean, the whole prompt is computed.
    structured_outputs: the form that the text must have, for `LLM`. A request to the engine carries
        the form beside its parameters.

    Raises RequestError, which names the field, for a value out of bounds and for an unknown name.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        _check_integer("n", self.n, 1, MAX_N, f"an integer from 1 to {MAX_N}")
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 0, MAX_TOKENS, "an integer from 0")
        most = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        allowed = "an integer from 0 to max_tokens"
        _check_integer("min_tokens", self.min_tokens, 0, most, f"{allowed}, which is {most}")
        number = _check_number("temperature", self.temperature, "a number in [0, 2]")
        _check(0 <= number <= 2, "temperature", number, "in [0, 2]")
        number = _check_number("top_p", self.top_p, "a number in (0, 1]")
        _check(0 < number <= 1, "top_p", number, "in (0, 1]")
        number = _check_number("min_p", self.min_p, "a number in [0, 1]")
        _check(0 <= number <= 1, "min_p", number, "in [0, 1]")
        _check_integer("top_k", self.top_k, -1, MAX_TOP_K, "-1 or 0 (all), or an integer from 1")
        for param in ("presence_penalty", "frequency_penalty"):
            allowed = f"in [-{MAX_PENALTY}, {MAX_PENALTY}]"
            number = _check_number(param, getattr(self, param), f"a number {allowed}")
            _check(-MAX_PENALTY <= number <= MAX_PENALTY, param, number, allowed)
        allowed = f"in [{MIN_REPETITION}, {MAX_REPETITION}]"
        number = _check_number("repetition_penalty", self.repetition_penalty, f"a number {allowed}")
        _check(MIN_REPETITION <= number <= MAX_REPETITION, "repetition_penalty", number, allowed)
        given: Any = self.logit_bias
        bias = {} if given is None else given
        msgspec.structs.force_setattr(self, "logit_bias", bias)
        allowed = f"a map of at most {MAX_LOGIT_BIAS} ids"
        _check(isinstance(bias, dict), "logit_bias", bias, allowed)
        _check(len(bias) <= MAX_LOGIT_BIAS, "logit_bias", f"[{len(bias)} ids]", allowed)
        allowed = f"a number in [-{MAX_BIAS}, {MAX_BIAS}]"
        for token_id, amount in bias.items():
            _check_integer("logit_bias", token_id, 0, MAX_TOKENS, "a map of integers from 0")
            param = f"logit_bias.{token_id}"
            number = _check_number(param, amount, allowed)
            _check(-MAX_BIAS <= number <= MAX_BIAS, param, number, allowed)
        if self.seed is not None:
            _check_integer("seed", self.seed, SEED_MIN, SEED_MAX, "a signed 64-bit integer")
        for param, count in (
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ):
            if count is not None:
                allowed = f"an integer in [0, {MAX_LOGPROBS}]"
                _check_integer(param, count, 0, MAX_LOGPROBS, allowed)
        # A string is one stop string, not a sequence of characters.
        alone = isinstance(self.stop, str)
        stop = (self.stop,) if alone else _several("stop", self.stop, "a string or a list of them")
        msgspec.structs.force_setattr(self, "stop", stop)
        _check(all(isinstance(s, str) and s for s in stop), "stop", stop, "non-empty strings")
        allowed = f"at most {MAX_STOP_TOKEN_IDS} integers from 0"
        ids = _several("stop_token_ids", self.stop_token_ids, allowed)
        msgspec.structs.force_setattr(self, "stop_token_ids", ids)
        _check(len(ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"[{len(ids)} ids]", allowed)
        for token_id in ids:
            _check_integer("stop_token_ids", token_id, 0, MAX_TOKENS, allowed)
        self._check_tokens()
        for param in ("include_stop_str_in_output", "ignore_eos"):
            _check_boolean(param, getattr(self, param))
        allowed = f"one of {', '.join(Pooling)}, and without prompt_logprobs"
        ok = isinstance(self.pooling, Pooling | None)
        ok = ok and (self.pooling is None or self.prompt_logprobs is None)
        _check(ok, "pooling", self.pooling, allowed)
        form: Any = self.structured_outputs
        ok = isinstance(form, StructuredOutputsParams | None)
        _check(ok, _FORM, form, "a StructuredOutputsParams")

    def _check_tokens(self) -> None:
        """Check the fields that say which tokens are sampled at all."""
        allowed = f"at most {MAX_ALLOWED_TOKENS} integers from 0"
        ids = _several("allowed_token_ids", self.allowed_token_ids, allowed)
        msgspec.structs.force_setattr(self, "allowed_token_ids", ids)
        _check(len(ids) <= MAX_ALLOWED_TOKENS, "allowed_token_ids", f"[{len(ids)} ids]", allowed)
        for token_id in ids:
            _check_integer("allowed_token_ids", token_id, 0, MAX_TOKENS, allowed)
        allowed = f"at most {MAX_BAD_WORDS} texts of 1 to {MAX_BAD_WORD_LENGTH} characters"
        words = _several("bad_words", self.bad_words, allowed)
        msgspec.structs.force_setattr(self, "bad_words", words)
        _check(len(words) <= MAX_BAD_WORDS, "bad_words", f"[{len(words)} texts]", allowed)
        for word in words:
            fits = isinstance(word, str) and 1 <= len(word) <= MAX_BAD_WORD_LENGTH and word.strip()
            _check(bool(fits), "bad_words", word, allowed)

    def for_choice(
        self, choice: int, bad_words_token_ids: tuple[tuple[int, ...], ...]
    ) -> SamplingParams:
        """Return the parameters of the request that the engine gets for completion number `choice`,
        with the tokens of the bad words in their place.

        Only the request of the first completion reports log-probabilities of the prompt.
        """
        return msgspec.structs.replace(
            self,
            n=1,
            seed=choice_seed(self.seed, choice),
            prompt_logprobs=None if choice else self.prompt_logprobs,
            structured_outputs=None,
            bad_words=(),
            bad_words_token_ids=self.bad_words_token_ids + bad_words_token_ids,
        )

    @property
    def changes_logits(self) -> bool:
        """Whether sampling depends on more than the logits and the noise, whatever stops it."""
        return bool(
            self.has_penalties
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words_token_ids
        )

    @property
    def has_penalties(self) -> bool:
        """Whether sampling depends on the tokens that the request already has."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


class StructuredOutputKind(enum.StrEnum):
    """The kind of description of a structured output; the names are vLLM's."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The form that the text of a completion must have.

    text: the JSON schema, the regular expression (Rust's syntax, matched from end to end) or the
        grammar (Lark, in llguidance's dialect); empty for the other kinds.
    choices: the texts to choose from, for CHOICE.
    calls: a grammar, as in `text`, that the completion may follow instead: that of tool calls.
    reasoning_end: the text, e.g. `</think>`, after which the structured output begins; before it
        any text is allowed. If it is empty, the structured output begins with the first token.
    reasoning_start: the text, e.g. `<think>`, with which optional reasoning begins. If it is empty,
        the completion always begins with reasoning.
    param: the field of the HTTP request that asked for the form; errors name it.
    lowered: whether an API worker has already translated the form for llguidance, so that `text` is
        the translation, which includes the reasoning, the choices and the calls.
    compile_seconds: the processor time that compiling the form took in the API worker, in seconds.

    Raises RequestError, naming `param`, if a size is out of bounds.
    """

    kind: StructuredOutputKind
    text: str = ""
    choices: tuple[str, ...] = ()
    calls: str = ""
    reasoning_end: str = ""
    reasoning_start: str = ""
    param: str = "response_format"
    lowered: bool = False
    compile_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.lowered:
            return
        if self.kind is StructuredOutputKind.CHOICE:
            fits = 1 <= len(self.choices) <= MAX_CHOICES and all(self.choices)
            what = f"a choice of {len(self.choices)} texts"
            allowed = f"1 to {MAX_CHOICES} texts, none of them empty"
        else:
            fits = bool(self.text) or self.kind is StructuredOutputKind.JSON_OBJECT
            what, allowed = f"an empty {self.kind}", "a text"
        if not fits:
            raise RequestError(
                f"{self.param}: {what} is not allowed: it must hold {allowed}.", param=self.param
            )
        length = len(self.text) + sum(map(len, self.choices))
        if length > MAX_GRAMMAR_LENGTH:
            raise RequestError(
                f"{self.param}: a {self.kind} of {length} characters is too long: at most "
                f"{MAX_GRAMMAR_LENGTH} are allowed.",
                param=self.param,
            )

    def as_lowered(self, text: str, compile_seconds: float = 0.0) -> StructuredOutput:
        """Return the form with its translation for llguidance."""
        return msgspec.structs.replace(
            self, text=text, choices=(), calls="", lowered=True, compile_seconds=compile_seconds
        )


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as an API worker hands it to the engine. It has one completion.

    api_key_index, cache_salt: requests share entries of the prefix cache only if both values are
        equal. The first is the number of the client's API key, where keys do not share, and None
        where they do; the second is chosen by the client.
    priority: requests with a lower number are admitted earlier and preempted later. The scheduler
        makes sure that no other request waits for ever.
    structured_output: the form that the text must have.
    include_graph_stats: whether its last output carries `graph_stats`.

    Raises RequestError for a structured output together with `ignore_eos`, which would never end,
    or with other limits on tokens, which might leave none.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    api_key_index: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    structured_output: StructuredOutput | None = None
    include_graph_stats: bool = False

    def __post_init__(self) -> None:
        params = self.params
        assert params.n == 1
        assert params.structured_outputs is None, "it is said beside them"
        assert not params.bad_words, "their tokens are said instead"
        limits = (
            ("allowed_token_ids", bool(params.allowed_token_ids)),
            ("bad_words", bool(params.bad_words_token_ids)),
        )
        for name, is_set in limits:
            if is_set and self.structured_output is not None:
                raise RequestError(
                    f"{name} is not allowed with {self.structured_output.param}: together they "
                    "may leave no token to sample; leave one of them out.",
                    param=name,
                )
        if self.structured_output is not None and params.ignore_eos:
            raise RequestError(
                f"ignore_eos is not allowed with {self.structured_output.param}: an "
                "end-of-sequence token is all that may follow where the text is complete; leave "
                "one of them out.",
                param="ignore_eos",
            )


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log, of the unmodified distribution) at one position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely (token id, logprob) pairs, best first."""
    rank: int
    """The rank of the token among all tokens of the vocabulary, from 1."""


class GraphStats(msgspec.Struct, frozen=True):
    """How a request went through the steps of the engine.

    id: its name in the trace of steps; None if there is no trace.
    padded_tokens: the padding of all its steps, which it shared with the other requests in them.
    rungs: the number of its steps by graph, as "MODE/tokens" with padding; those without a graph
        are left out.
    queue_ms: the milliseconds from its arrival in the engine to the launch of its first step.
    prefill_ms: those from there until its first token was known.
    decode_ms: those from there to its end.
    preemptions: how often it lost its blocks and was admitted again.
    cached_tokens: the number of its prompt tokens that were found in the prefix cache.
    generations: the generations of code that ran its steps; 0 is the model's own.
    """

    id: str | None
    padded_tokens: int
    rungs: dict[str, int]
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    preemptions: int
    cached_tokens: int
    generations: list[int]


class EngineOutput(msgspec.Struct, omit_defaults=True, gc=False):
    """The output that one step (or an abort, or a refusal) adds to one request.

    The scheduler makes it with the sampled token and the finish reason, and the engine adds what
    only it knows: log-probabilities, `graph_steps` and `graph_stats`. Exactly one output of a
    request carries `finish_reason` or `error`, and it is the last one.

    token_ids: the sampled tokens. Empty for an abort, for a request that asked for no token, and
        where the output only reports log-probabilities of the prompt.
    num_cached_tokens: the number of prompt tokens that were found in the prefix cache, sent with
        the first token.
    logprobs: the log-probabilities at each sampled token; None if they were not requested.
    prompt_logprobs: the log-probabilities of prompt tokens, beginning with the second; all of them
        have been sent when the first sampled token is sent.
    hidden_sum: the sum of the hidden states that this step has computed for an embedding, as
        float32; the sum over all outputs of the request is that over its pooled tokens.
    queued_at, scheduled_at: when the request came to the engine, and when its first step was
        launched, by `time.perf_counter`, which all processes of a machine share; sent with its
        first output.
    graph_steps: the number of steps of the request by "MODE/reason", or "MODE/reason/compiled" for
        steps by compiled code, sent with the last output.
    graph_stats: further numbers about its steps, sent with the last output if they were asked for.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] = []
    hidden_sum: bytes = b""
    queued_at: float = 0.0
    scheduled_at: float = 0.0
    graph_steps: dict[str, int] | None = None
    graph_stats: GraphStats | None = None
    error: RequestFailure | None = None


class RequestFailure(msgspec.Struct, frozen=True, kw_only=True):
    """An exception of `minisrv.errors` as it crosses the socket.

    kind: the name of its class.
    """

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: MinisrvError) -> RequestFailure:
        """Return the record that is sent for `error`."""
        return cls(kind=type(error).__name__, message=error.message, param=error.param)

    def as_exception(self) -> MinisrvError:
        """Return the exception that the record was made from."""
        error = _KINDS[self.kind](self.message)
        error.param = self.param
        return error


def _branches(kind: type[MinisrvError]) -> list[type[MinisrvError]]:
    return [kind, *(leaf for branch in kind.__subclasses__() for leaf in _branches(branch))]


_KINDS = {kind.__name__: kind for kind in _branches(MinisrvError)}

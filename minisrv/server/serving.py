"""Turns validated bodies into the engine's requests: the model's name, tokens, limits.

Knows: the tokenizer, the engine client and the limits of the model. Knows nothing of HTTP or of
the bodies of generations.
"""

from __future__ import annotations

import math
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

from minisrv.checkpoint import GenerationConfig
from minisrv.engine.client import EngineClient
from minisrv.engine.messages import EngineInfo
from minisrv.errors import ConfigError, ModelNotFoundError, RequestError
from minisrv.metrics import Metrics
from minisrv.request import EngineRequest, SamplingParams
from minisrv.server.auth import KeyLimit
from minisrv.server.choices import Choice, PromptCount
from minisrv.server.messages import Message
from minisrv.server.offload import offload
from minisrv.server.preprocessing import (
    AnswerFormat,
    Echo,
    Prepared,
    answer_form,
    check_tools,
    decode_prompt,
    encode_prompt,
    render_chat,
    template_variables,
    tool_parser,
    turn_starts,
)
from minisrv.server.request_schemas import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_PROMPT_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    TokenizeRequest,
)
from minisrv.server.response_schemas import DetokenizeResponse, TokenizeResponse
from minisrv.text.bad_words import bad_words_token_ids
from minisrv.text.chat_format import ChatFormat
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.grammar_validator import GrammarValidator
from minisrv.text.output_processor import OutputProcessor
from minisrv.text.tokenizer import Tokenizer
from minisrv.validation import check_num_characters, check_token_ids, validate_request


@dataclass(frozen=True)
class Serving:
    """The state that every generation needs, made once for the application.

    Raises ConfigError if the checkpoint's sampling defaults are out of bounds.
    """

    client: EngineClient
    tokenizer: Tokenizer
    served_model_names: tuple[str, ...]
    generation: GenerationConfig
    metrics: Metrics
    root: str
    """The checkpoint that the served names stand for, as the operator named it."""
    key_limit: KeyLimit | None = None
    max_open: int = sys.maxsize
    """Maximum number of open choices, where the engine would take more."""
    grammar_seconds_per_key: float = 0.0
    """Seconds of processor time a minute that may be spent on trying new grammars of one API key; 0
    sets no limit."""
    share_prefix_cache: bool = False
    """Whether requests with different API keys share cached prefixes."""
    request_timeout: float | None = None
    """Seconds from a request's arrival to its end; None sets no limit."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds at which this object was made, which is the `created` field of
    models."""

    def __post_init__(self) -> None:
        try:
            GenerationRequest().sampling_params(self.generation, max_tokens=1)
        except RequestError as error:
            raise ConfigError(f"generation_config.json: {error.message}") from error

    def model_name(self, asked: str | None) -> str:
        """Return the model's name for the response. Raises ModelNotFoundError."""
        if asked is None:
            return self.served_model_names[0]
        if asked not in self.served_model_names:
            raise ModelNotFoundError(
                f"The model '{asked}' does not exist; served here: "
                f"{', '.join(self.served_model_names)}.",
                param="model",
            )
        return asked

    def engine_info(self) -> EngineInfo:
        """Return the limits of the engine, which must be ready. Raises EngineNotReadyError,
        EngineDeadError."""
        self.client.check_serving()
        info = self.client.info
        assert info is not None, "an engine that serves has told its limits"
        return info

    @contextmanager
    def places(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        request_id: str,
        key: int | None,
    ) -> Iterator[None]:
        """Hold a place for every choice while the request is open, from before its prompt is
        tokenised, both in the engine and among those of its API key. Raises what `KeyLimit.places`,
        `Admission.places` and `engine_info` raise."""
        prompts = 1 if isinstance(request, ChatCompletionRequest) else len(request.prompt)
        ids = [self.choice_id(request_id, index) for index in range(prompts * request.n)]
        with self.held(ids, "n" if request.n > 1 else "prompt", key):
            yield

    @contextmanager
    def held(self, ids: list[str], param: str, key: int | None) -> Iterator[None]:
        """Hold a place for each of these requests of the engine; see `places`.

        param: the field that asks for so many.
        """
        info = self.engine_info()
        limit = min(info.max_num_seqs + info.max_waiting, self.max_open)
        with (
            self._places_of_key(key, len(ids), param),
            self.client.admission.places(ids, limit, param),
        ):
            yield

    def _places_of_key(
        self, key: int | None, number: int = 1, param: str | None = None
    ) -> AbstractContextManager[None]:
        if key is None or self.key_limit is None:
            return nullcontext()
        retry_after = self.client.admission.retry_after
        return self.key_limit.places(key, number, param=param, retry_after=retry_after)

    async def prepare(
        self, request: CompletionRequest | ChatCompletionRequest, owner: int | str
    ) -> Prepared:
        """Make the token ids of the prompts, and validate the grammar that the answer must follow,
        if there is one.

        owner: whom the request belongs to; see `auth.owner`.

        Raises RequestError if the model or a grammar cannot do what is asked, and what
        `validate_request`, `engine_info` and `GrammarValidator.validate` raise.
        """
        if isinstance(request, ChatCompletionRequest):
            try:
                prepared = await self._prepare_chat(request)
            except RequestError as error:
                if error.param == ChatCompletionRequest.prompt_param:
                    error.param = request.prompt_param
                raise
        else:
            prepared = await self._prepare_completion(request)
        if prepared.form is None:
            return prepared
        return replace(prepared, form=await self._validator.validate(prepared.form, owner))

    async def _prepare_chat(self, request: ChatCompletionRequest) -> Prepared:
        info = self.engine_info()

        def prepare() -> Prepared:
            ids, answer = self._encode_chat(request, must_fit=True)
            ids = ids[-request.kept_prompt_tokens(info.max_model_len) :]
            form = answer_form(request, answer, self.tokenizer)
            _validate(request, ids, info)
            last = request.messages[-1]
            echoed = request.echo and last.role == "assistant"
            return Prepared(
                [ids],
                form,
                answer,
                bad_words_token_ids(request.bad_words, self.tokenizer),
                [Echo(last.text, [])] if echoed else None,
            )

        # The parameters of tools are always combined in a thread: even a small schema may combine
        # objects in a great many ways.
        return await offload(prepare, math.inf if request.constrained_tools else request.num_bytes)

    def _check_num_characters(self, text: str, param: str) -> None:
        """Raise ContextLengthError for a text that need not be tokenised, which takes a second for
        some megabytes."""
        check_num_characters(
            param,
            len(text),
            longest_token=self.tokenizer.longest_token,
            max_model_len=self.engine_info().max_model_len,
        )

    def _encode_chat(
        self, request: ChatCompletionRequest, *, must_fit: bool
    ) -> tuple[list[int], AnswerFormat]:
        """Return the token ids of a chat's prompt, and how the answer is parsed.

        must_fit: whether a chat that is much too long is refused before it is tokenised, unless it
            is to be cut.
        """
        format, continues = self.chat_format, request.continue_final_message
        parser = tool_parser(request, format)
        variables = template_variables(request, self.tokenizer, format)

        def encode(messages: Sequence[Message]) -> tuple[list[int], AnswerFormat]:
            text = render_chat(
                self.tokenizer,
                messages,
                request.begins_answer,
                request.offered_tools,
                variables,
                continue_final_message=continues,
            )
            if must_fit and not request.is_cut:
                self._check_num_characters(text, ChatCompletionRequest.prompt_param)
            ending = format.ending(messages[-1].text) if continues else text
            answer = AnswerFormat(format, ending, parser, request.allows_several_calls)
            return self.tokenizer.encode(text, add_special_tokens=False), answer

        encoded = encode(request.messages)
        if not request.drops_oldest_turns:
            return encoded
        length = self.engine_info().max_model_len
        # A limit that no prompt leaves room for is cut.
        limit = request.token_limit or 1
        room = length - (limit if limit < length else 1)
        head, starts = turn_starts(request.messages)

        def later(start: int) -> tuple[list[int], AnswerFormat]:
            return encode([*request.messages[:head], *request.messages[start:]])

        if len(encoded[0]) <= room or not starts:
            return encoded
        fitting = bisect_left(starts, True, key=lambda start: len(later(start)[0]) <= room)
        return later(starts[min(fitting, len(starts) - 1)])

    async def _prepare_completion(self, request: CompletionRequest) -> Prepared:
        info = self.engine_info()
        repeats, track_offsets = request.echo, request.logprobs is not None
        kept = request.kept_prompt_tokens(info.max_model_len)

        def make(prompt: str | list[int]) -> tuple[list[int], Echo | None]:
            """Return the token ids of a prompt, and its echo if it is echoed."""
            echo = None
            if isinstance(prompt, str) and not request.is_cut:
                self._check_num_characters(prompt, request.prompt_param)
            if isinstance(prompt, list):
                ids = prompt
            elif repeats:
                ids, echo = encode_prompt(self.tokenizer, prompt, track_offsets=track_offsets)
            else:
                ids = self.tokenizer.encode(prompt)
            if len(ids) > kept:
                ids, echo = ids[-kept:], None
            _validate(request, ids, info)  # before its ids are looked up
            if repeats and echo is None:
                echo = decode_prompt(self.tokenizer, ids, track_offsets=track_offsets)
            return ids, echo

        def prepare() -> Prepared:
            made = [make(prompt) for prompt in request.prompt]
            return Prepared(
                [ids for ids, _ in made],
                request.structured_output,
                bad_words_token_ids=bad_words_token_ids(request.bad_words, self.tokenizer),
                echoes=[echo for _, echo in made if echo is not None] if repeats else None,
            )

        return await offload(prepare, request.num_bytes)

    async def encode_inputs(self, request: EmbeddingRequest) -> list[list[int]]:
        """Return the token ids of the inputs. Raises RequestError, and what `engine_info` and
        `validate_request` raise."""
        info = self.engine_info()
        kept = request.truncate_prompt_tokens or MAX_PROMPT_TOKENS
        kept = info.max_model_len if kept == -1 else kept

        def encode(given: str | list[int]) -> list[int]:
            if isinstance(given, str) and request.truncate_prompt_tokens is None:
                self._check_num_characters(given, "input")
            ids = given if isinstance(given, list) else self.tokenizer.encode(given)
            ids = ids[-kept:]
            validate_request(
                ids,
                SamplingParams(),
                max_tokens=0,
                max_model_len=info.max_model_len,
                vocab_size=info.vocab_size,
                prompt_param="input",
            )
            return ids

        return await offload(lambda: [encode(each) for each in request.input], request.num_bytes)

    async def tokenize(self, request: TokenizeRequest, key: int | None) -> TokenizeResponse:
        """Return the body of the response. The request counts among those that its API key has
        open. Raises RequestError, and what `engine_info` raises."""
        info = self.engine_info()

        def tokenize() -> TokenizeResponse:
            text, special = request.prompt, True
            if request.messages is not None:
                check_tools(request.messages, request.tools, self.chat_format)
                text = render_chat(
                    self.tokenizer,
                    request.messages,
                    request.begins_answer,
                    request.tools,
                    request.chat_template_kwargs,
                    continue_final_message=request.continue_final_message,
                )
                special = False
            assert text is not None
            if request.add_special_tokens is not None:
                special = request.add_special_tokens
            ids = self.tokenizer.encode(text, special)
            return TokenizeResponse(
                count=len(ids),
                max_model_len=info.max_model_len,
                tokens=ids,
                token_strs=self.tokenizer.spell(ids) if request.return_token_strs else None,
            )

        with self._places_of_key(key):
            return await offload(tokenize, request.num_bytes)

    async def count_tokens(self, request: ChatCompletionRequest, key: int | None) -> int:
        """Return the number of tokens of a chat's prompt. The request counts like one of
        `tokenize`. Raises RequestError, and what `engine_info` raises."""
        self.engine_info()
        with self._places_of_key(key):
            ids, _ = await offload(
                lambda: self._encode_chat(request, must_fit=False), request.num_bytes
            )
        return len(ids)

    async def detokenize(self, request: DetokenizeRequest, key: int | None) -> DetokenizeResponse:
        """Return the body of the response, with special tokens spelled out. The request counts like
        one of `tokenize`. Raises RequestError, and what `engine_info` raises."""
        vocab_size = self.engine_info().vocab_size

        def detokenize() -> DetokenizeResponse:
            check_token_ids("tokens", request.tokens, vocab_size)
            text = self.tokenizer.decode(request.tokens, skip_special_tokens=False)
            return DetokenizeResponse(prompt=text)

        with self._places_of_key(key):
            return await offload(detokenize, request.num_bytes)

    @staticmethod
    def choice_id(request_id: str, index: int) -> str:
        """Return the id of a request of the engine, of which a response may have several."""
        return f"{request_id}-{index}"

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The spelling of reasoning and tool calls that the model's chat template shows."""
        return ChatFormat.of_template(self.tokenizer.chat_template_source)

    @cached_property
    def _validator(self) -> GrammarValidator:
        # Made with the first grammar, when the engine's limits are known.
        end = list(self.generation.eos_token_ids)
        return GrammarValidator(
            self.tokenizer,
            self.engine_info().vocab_size,
            end,
            seconds_per_key=self.grammar_seconds_per_key,
        )

    def close(self) -> None:
        """End the process that tries grammars, and the requests that wait for it."""
        if "_validator" in self.__dict__:
            self._validator.close()

    def choices(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prepared: Prepared,
        request_id: str,
        key: int | None,
        arrival: float,
    ) -> list[Choice]:
        """Return the choices of all prompts, one prompt after the other; none of them is started.

        key: the index of the client's API key.
        Raises RequestError if `min_tokens` is above the maximum number of tokens, and what
        `engine_info` raises.
        """
        info = self.engine_info()
        chat = isinstance(request, ChatCompletionRequest)
        begins = isinstance(request, ChatCompletionRequest) and not request.continue_final_message
        prompts, answer = prepared.prompts, prepared.answer
        keep = frozenset() if answer is None else answer.kept_tokens(self.tokenizer)
        # A grammar describes exactly the text that the tokens spell, including a space at its
        # start.
        form = prepared.form
        own_text = begins and (form is None or bool(form.reasoning_end))
        choices = []
        for index in range(len(prompts) * request.n):
            number, choice_of_prompt = divmod(index, request.n)
            if choice_of_prompt == 0:
                prompt_count = PromptCount(self.metrics, request.n)
            prompt = prompts[number]
            room = info.max_model_len - len(prompt)
            limit = _max_tokens(request, room, self.generation.max_tokens)
            engine_request = EngineRequest(
                request_id=self.choice_id(request_id, index),
                prompt_token_ids=prompt,
                params=request.sampling_params(
                    self.generation,
                    limit,
                    choice=choice_of_prompt,
                    bad_words_token_ids=prepared.bad_words_token_ids,
                ),
                api_key_index=None if self.share_prefix_cache else key,
                cache_salt=request.cache_salt,
                priority=request.priority,
                structured_output=prepared.form,
                include_graph_stats=request.include_graph_steps,
            )
            detokenizer = Detokenizer(
                self.tokenizer,
                request.stop or self.generation.stop,
                min_tokens=engine_request.params.min_tokens,
                include_stop=request.include_stop_str_in_output,
                prompt_token_ids=() if own_text else prompt,
                visible_special_ids=keep,
                track_offsets=not chat and request.num_logprobs is not None,
            )
            processor = OutputProcessor(
                detokenizer, index=index, include_graph_steps=request.include_graph_steps
            )
            choices.append(
                Choice(
                    self.client,
                    engine_request,
                    processor,
                    self.metrics,
                    prompt_count,
                    arrival=arrival,
                )
            )
        return choices


def _validate(
    request: CompletionRequest | ChatCompletionRequest,
    prompt_token_ids: list[int],
    info: EngineInfo,
) -> None:
    validate_request(
        prompt_token_ids,
        request,
        max_tokens=None if request.cuts_token_limit else request.token_limit,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        prompt_param=request.prompt_param,
    )


def _max_tokens(request: GenerationRequest, room: int, default: int | None) -> int:
    """Return the maximum number of tokens to generate: the limit that the client has set, or a
    default, which is cut to what fits.

    room: the number of tokens that the prompt leaves in the context.
    default: the checkpoint's limit for requests that set none; OpenAI's default where it is None.
    """
    asked = request.token_limit
    if asked is not None:
        return min(asked, room) if request.cuts_token_limit else asked
    chat = isinstance(request, ChatCompletionRequest)
    return min(room, default or (room if chat else DEFAULT_COMPLETION_TOKENS))

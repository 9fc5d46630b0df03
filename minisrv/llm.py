"""`LLM`: offline inference with the engine in this process, for scripts and notebooks.

It runs the same `EngineCore` that a server's engine process runs, and reads chats as the server
does. The names are vLLM's.

Knows: how a list of prompts becomes requests, and how their outputs become texts in the same order.
Knows nothing of sockets or HTTP.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, NotRequired, TypedDict, TypeVar, cast

import msgspec
import tokenizers
from tqdm import tqdm

from minisrv.checkpoint import GenerationConfig, open_checkpoint
from minisrv.compile.modes import CompilationMode
from minisrv.config import EngineConfig
from minisrv.engine.builder import build_engine
from minisrv.engine.core import EngineCore
from minisrv.engine.messages import SleepTag, sleep_level, sleep_word
from minisrv.errors import ConfigError, RequestError, name_hint
from minisrv.interrupts import deferred_interrupts
from minisrv.modes import CUDAGraphMode
from minisrv.outputs import CompletionOutput, RequestOutput
from minisrv.progress import StartupProgress
from minisrv.request import EngineOutput, EngineRequest, SamplingParams
from minisrv.text.bad_words import bad_words_token_ids
from minisrv.text.chat_format import ChatFormat
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.output_processor import OutputProcessor
from minisrv.text.tokenizer import Tokenizer
from minisrv.text.tokenizer_description import TokenizerDescription

_T = TypeVar("_T")

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedTokenizerBase

    _M = TypeVar("_M", bound=BaseModel)


class TextPrompt(TypedDict):
    """A prompt as text.

    prompt: the text.
    cache_salt: only prompts with the same salt share entries of the prefix cache.
    """

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids.

    prompt_token_ids: the token ids.
    prompt: the text for them, which is only copied to the `RequestOutput`.
    cache_salt: only prompts with the same salt share entries of the prefix cache.
    """

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
"""One prompt: a text, token ids, or a dict that holds either."""
Message = dict[str, Any]
"""One message of a chat as the server's API has it: `role`, `content` and so on."""
Params = SamplingParams | Sequence[SamplingParams] | None
"""Sampling parameters: one for all prompts, one for each, or None for the checkpoint's defaults."""
Bar = bool | Callable[..., "tqdm[Any]"]
"""Whether to show a progress bar in a terminal, or a function with tqdm's arguments that makes the
bar."""


class LLM:
    """A model for offline inference.

    When the constructor returns, the weights are loaded, and every batch has a graph that is
    captured and certified.

    model: directory of a checkpoint, Hugging Face hub id, or None for the default model.

    All other options are fields of `EngineConfig`, whose documentation describes each;
    `cudagraph_mode` and `chat_template` may be given as strings, `compilation_mode` as a string or
    a number, `cudagraph_capture_sizes` as a list.
    Raises ConfigError, ModelError or GraphError (see `minisrv.errors`) if the model cannot be
    served; ConfigError also for an option that does not exist.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        chat_template: Path | str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        model_impl: str = "auto",
        load_format: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        itl_target_ms: float | None = None,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        kv_cache_memory: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_waiting: int = 1024,
        seed: int = 0,
        async_scheduling: bool | None = None,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        cudagraph_mode: CUDAGraphMode | str | None = None,
        cudagraph_capture_sizes: Sequence[int] | None = None,
        cudagraph_capture: str = "covering",
        cudagraph_refit: str = "off",
        verify_graphs: float = 0.0,
        compilation_mode: CompilationMode | str | int | None = None,
        optimization_level: int | None = None,
        compile_wait: bool = False,
        enable_sleep_mode: bool = False,
        step_trace: int = 4096,
        simulate_launch_us: float = 0.0,
        **unknown: Never,
    ) -> None:
        for name in unknown:
            options = [option.name for option in fields(EngineConfig)]
            raise ConfigError(f"LLM has no option {name}; {name_hint(name, options)}")
        if isinstance(cudagraph_mode, str):
            cudagraph_mode = CUDAGraphMode.parse(cudagraph_mode)
        if compilation_mode is not None:
            compilation_mode = CompilationMode.parse(compilation_mode)
        sizes = None if cudagraph_capture_sizes is None else tuple(cudagraph_capture_sizes)
        config = EngineConfig(
            model=model,
            revision=revision,
            tokenizer=tokenizer,
            chat_template=None if chat_template is None else Path(chat_template),
            dtype=dtype,
            device=device,
            model_impl=model_impl,
            load_format=load_format,
            quantization=quantization,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            itl_target_ms=itl_target_ms,
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
            kv_cache_memory=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
            max_waiting=max_waiting,
            seed=seed,
            async_scheduling=async_scheduling,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager,
            cudagraph_mode=cudagraph_mode,
            cudagraph_capture_sizes=sizes,
            cudagraph_capture=cudagraph_capture,
            cudagraph_refit=cudagraph_refit,
            verify_graphs=verify_graphs,
            compilation_mode=compilation_mode,
            optimization_level=optimization_level,
            compile_wait=compile_wait,
            enable_sleep_mode=enable_sleep_mode,
            step_trace=step_trace,
            simulate_launch_us=simulate_launch_us,
        )
        checkpoint = open_checkpoint(config)
        self._tokenizer = Tokenizer.from_description(checkpoint.tokenizer)
        self._described = checkpoint.tokenizer
        self._defaults = _default_params(checkpoint.generation)
        progress = StartupProgress()
        self.engine = EngineCore(build_engine(config, progress, checkpoint=checkpoint))
        progress.close()
        self._count = 0

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the checkpoint as a tokenizer of transformers, for use beside the
        engine."""
        return self._transformers_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of prompts for which none are given: those of the
        checkpoint's generation_config.json, and for the rest the defaults of `SamplingParams`.

        `generate` and `chat` lower `max_tokens` and `min_tokens` for a prompt to the room that it
        leaves in the context.
        """
        return self._defaults

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: Bar = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; the outputs come in the order of the prompts.

        prompts: one prompt, or a sequence of prompts.
        sampling_params: one `SamplingParams` for all prompts, or one for each; None takes
            `get_default_sampling_params()`.
        use_tqdm: whether to show a progress bar if stderr is a terminal; or a function that makes
            the bar, as `tqdm.tqdm` does.
        priority: one number for all prompts, or one for each; requests with lower numbers are
            admitted earlier.
        Raises RequestError (or a subclass of it) if one of the prompts cannot be served; then none
        is.
        """
        given = _as_list(prompts)
        return self._run(
            [self._prompt(prompt, index) for index, prompt in enumerate(given)],
            sampling_params,
            use_tqdm,
            priority=priority,
            continues=True,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: Bar = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; the outputs come in the order of the conversations.

        messages: the messages of one conversation, or a sequence of conversations. Messages are the
            same as those of /v1/chat/completions.
        sampling_params, use_tqdm: see `generate`.
        add_generation_prompt: whether the prompt ends with the tokens that begin an answer.
        continue_final_message: whether the answer continues the text of the last message; this
            needs `add_generation_prompt=False`, as in vLLM.
        tools: the tools that the model may call, as in /v1/chat/completions; calls of them are part
            of the text of an output.
        chat_template_kwargs: variables of the chat template, e.g. `enable_thinking`.
        Raises RequestError as `generate` does, and also for messages or tools that are malformed or
        that the chat template does not support.
        """
        # These imports take a moment, which a call of `generate` alone need not wait for.
        from minisrv.server.messages import Message as ChatMessage
        from minisrv.server.preprocessing import check_tools, render_chat
        from minisrv.server.tools import Tool

        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt=False.",
                param="continue_final_message",
            )
        if messages and isinstance(messages[0], Mapping):
            messages = [cast("Sequence[Message]", messages)]
        offered = [_validated(Tool, tool, "tools", at) for at, tool in enumerate(tools or ())]
        prompts = []
        for conversation in cast("Sequence[Sequence[Message]]", messages):
            chat = [
                _validated(ChatMessage, message, "messages", at)
                for at, message in enumerate(conversation)
            ]
            check_tools(chat, offered, ChatFormat.of_template(self._tokenizer.chat_template_source))
            text = render_chat(
                self._tokenizer,
                chat,
                add_generation_prompt,
                offered,
                chat_template_kwargs,
                continue_final_message=continue_final_message,
            )
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            prompts.append(_Prompt(ids, text))
        return self._run(prompts, sampling_params, use_tqdm, continues=continue_final_message)

    def sleep(self, level: int = 1) -> None:
        """Release the memory of the weights and the KV cache until `wake_up`; see
        `minisrv.engine.sleep`. Prompts are refused meanwhile.

        level: 1 keeps the weights in the memory of the host, 2 reads them from the checkpoint
            again.
        Raises RequestError for another level, ConfigError without `enable_sleep_mode`, SleepError
        if the host has no memory for the weights.
        """
        level = sleep_level(level)
        while self.engine.sleeper.is_busy:
            self.engine.advance_background()
        self.engine.sleeper.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Restore the memory that `sleep` released.

        tags: the parts to restore, "weights" and "kv_cache"; None for both. Prompts can be served
            when both are restored.
        Raises RequestError for another tag, ConfigError without `enable_sleep_mode`, SleepError if
        the memory or the checkpoint is not to be had, and EngineError if the model would compute
        something else than before.
        """
        wanted = SleepTag if tags is None else tags
        self.engine.sleeper.wake_up([sleep_word(SleepTag, tag, "tags") for tag in wanted])

    @cached_property
    def _transformers_tokenizer(self) -> PreTrainedTokenizerBase:
        return _for_transformers(self._described)

    def _prompt(self, given: object, index: int) -> _Prompt:
        """Parse and tokenize `prompts[index]`, which is `given`. Raises RequestError."""
        where = f"prompts[{index}]"
        text: object = None
        ids: object = given
        salt: object = None
        if isinstance(given, str):
            text, ids = given, None
        elif isinstance(given, Mapping):
            known = TextPrompt.__annotations__.keys() | TokensPrompt.__annotations__.keys()
            for name in given.keys() - known:
                raise RequestError(f"{where} has {name}; {name_hint(name, known)}", param="prompts")
            text, ids, salt = map(given.get, ("prompt", "prompt_token_ids", "cache_salt"))
        if not isinstance(salt, str | None) or not isinstance(text, str | None):
            raise RequestError(f"{where}: prompt and cache_salt must be text.", param="prompts")
        if ids is None and text is not None:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"{where} must be valid Unicode, without lone surrogates.", param="prompts"
                ) from error
            return _Prompt(self._tokenizer.encode(text), text, salt)
        try:
            return _Prompt([operator.index(i) for i in cast("Iterable[Any]", ids)], text, salt)
        except TypeError as error:
            raise RequestError(
                f"{where} must be text, token ids, or a dict with prompt or prompt_token_ids.",
                param="prompts",
            ) from error

    def _run(
        self,
        prompts: list[_Prompt],
        sampling_params: Params,
        use_tqdm: Bar,
        *,
        priority: int | Sequence[int] | None = None,
        continues: bool,
    ) -> list[RequestOutput]:
        """Serve `prompts` and return their outputs in order. Nothing is served if one is refused.

        continues: whether completions continue the text of their prompts, as in `generate`, or
            begin a text of their own, as the answers of a chat do.
        """
        params = _for_each("sampling_params", sampling_params, self._defaults, len(prompts))
        if sampling_params is None:
            room = self.engine.info.max_model_len
            params = [_at_most(self._defaults, room - len(prompt.token_ids)) for prompt in prompts]
        priorities = _for_each("priority", priority, 0, len(prompts))
        results, jobs = [], []
        for prompt, param, order in zip(prompts, params, priorities, strict=True):
            self._count += 1
            result = RequestOutput(str(self._count), prompt.text, prompt.token_ids, [])
            results.append(result)
            wanted = param.structured_outputs
            form = None if wanted is None else wanted.as_spec()
            words = bad_words_token_ids(param.bad_words, self._tokenizer)
            for choice in range(param.n):
                request = EngineRequest(
                    request_id=f"{result.request_id}-{choice}",
                    prompt_token_ids=prompt.token_ids,
                    params=param.for_choice(choice, words),
                    cache_salt=prompt.cache_salt,
                    priority=order,
                    structured_output=form,
                    include_graph_stats=True,
                )
                self.engine.check(request)  # all requests are checked before one is served
                jobs.append(_Job(request, result, self._tokenizer, continues))
        bar = use_tqdm if callable(use_tqdm) else partial(tqdm, disable=None if use_tqdm else True)
        with bar(total=len(jobs), unit="completion", leave=False) as progress:
            self._serve(jobs, progress)
        return results

    def _serve(self, jobs: list[_Job], progress: tqdm[Any]) -> None:
        """Run steps until all jobs have ended. Raises the error that ended one of the requests,
        e.g. RequestError for a structured output whose grammar cannot be used; no request is left
        in the engine then. Ctrl-C ends it between two steps, so that the engine can go on."""
        jobs_by_id = {job.request.request_id: job for job in jobs}
        waiting = jobs[::-1]
        with deferred_interrupts() as check_interrupt:
            try:
                while waiting or self.engine.has_work:
                    check_interrupt()
                    while waiting and self.engine.has_room:
                        self.engine.add(waiting.pop().request)
                    for output in self.engine.step():
                        job = jobs_by_id[output.request_id]
                        job.read(output)
                        must_abort = job.processor.must_abort
                        if must_abort and (last := self.engine.abort(output.request_id)):
                            job.read(last)
                        progress.update(job.completion.finished())
                    self.engine.advance_background()
            finally:
                for request_id in jobs_by_id:
                    self.engine.abort(request_id)


@dataclass
class _Prompt:
    """A tokenized prompt.

    text: the text that was tokenized; None if it is not known.
    """

    token_ids: list[int]
    text: str | None = None
    cache_salt: str | None = None


class _Job:
    """One completion that is being generated: a request to the engine, and the collection of its
    outputs in a `RequestOutput`.

    continues: see `LLM._run`.
    """

    def __init__(
        self, request: EngineRequest, result: RequestOutput, tokenizer: Tokenizer, continues: bool
    ) -> None:
        params = request.params
        self.request = request
        self.completion = CompletionOutput(index=len(result.outputs))
        if params.logprobs is not None:
            self.completion.logprobs = []
            self.completion.cumulative_logprob = 0.0
        if params.prompt_logprobs is not None:
            result.prompt_logprobs = [None]
        result.outputs.append(self.completion)
        self._result = result
        detokenizer = Detokenizer(
            tokenizer,
            params.stop,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            prompt_token_ids=request.prompt_token_ids if continues else (),
        )
        self.processor = OutputProcessor(
            detokenizer, stop_token_ids=params.stop_token_ids, include_graph_steps=True
        )

    def read(self, output: EngineOutput) -> None:
        """Add an output of the engine to the completion. Raises the error that ended the request,
        if one did."""
        delta = self.processor.process(output)
        if delta is None:
            return
        completion = self.completion
        if completion.index == 0:
            self._result.num_cached_tokens += delta.num_cached_tokens
        if self._result.prompt_logprobs is not None:
            self._result.prompt_logprobs += delta.prompt_logprobs
        completion.text += delta.text
        completion.token_ids += delta.token_ids
        if completion.logprobs is not None and delta.logprobs is not None:
            completion.logprobs += delta.logprobs
            assert completion.cumulative_logprob is not None
            completion.cumulative_logprob += sum(entry.logprob for entry in delta.logprobs)
        completion.finish_reason = delta.finish_reason
        completion.stop_reason = delta.stop_reason
        completion.graph_steps = delta.graph_steps or {}
        completion.graph_stats = delta.graph_stats


def _as_list(prompts: object) -> list[object]:
    """Return `prompts` as a list, which holds one prompt if one was given."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"{prompts!r} is no prompt and no list of them.", param="prompts")
    given = list(prompts)
    return [given] if given and isinstance(given[0], Integral) else given


def _for_each(name: str, given: _T | Sequence[_T] | None, default: _T, count: int) -> list[_T]:
    """Return a list with one value for each of `count` prompts.

    name: the name of the argument, for messages.
    given: one value for all prompts, a sequence with one for each, or None.
    default: the value for every prompt if None is given.
    Raises RequestError.
    """
    kind = type(default)
    if given is None or isinstance(given, kind):
        return [default if given is None else given] * count
    if not isinstance(given, Sequence) or not all(isinstance(each, kind) for each in given):
        raise RequestError(f"{name} must be a {kind.__name__} or a list of them.", param=name)
    if len(given) != count:
        raise RequestError(
            f"{len(given)} {name} for {count} prompts: give one for each, or one for all.",
            param=name,
        )
    return list(given)


def _for_transformers(description: TokenizerDescription) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast  # this import takes seconds

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(description.backend),
        chat_template=description.chat_templates or None,
        **description.special_tokens,
    )


def _default_params(generation: GenerationConfig) -> SamplingParams:
    """Return the checkpoint's sampling defaults, whose bounds were checked when it was read."""
    values = {option.name: getattr(generation, option.name) for option in fields(generation)}
    names = SamplingParams.__struct_fields__
    given = {name: value for name, value in values.items() if name in names and value is not None}
    least = given.pop("min_tokens", 0)
    params = SamplingParams(**given)
    if params.max_tokens is not None:
        least = min(least, params.max_tokens)
    return msgspec.structs.replace(params, min_tokens=least)


def _at_most(defaults: SamplingParams, room: int) -> SamplingParams:
    """Return `defaults` with `max_tokens` and `min_tokens` lowered to `room` tokens, so that
    defaults do not get a prompt refused for which no parameters were given. A prompt that leaves no
    room at all keeps them, and is refused."""
    most = defaults.max_tokens
    if room < 1 or most is None or most <= room:
        return defaults
    return msgspec.structs.replace(
        defaults, max_tokens=room, min_tokens=min(defaults.min_tokens, room)
    )


def _validated(model: type[_M], value: object, what: str, index: int) -> _M:
    """Return a message or a tool as the server's model of it. Raises RequestError.

    what, index: the name of the list that holds `value`, and its index there, for messages.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        inside = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])
        where = f"{what}[{index}]{inside}"
        raise RequestError(f"{where}: {first['msg']}", param=where) from error

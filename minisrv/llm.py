"""`LLM`: the engine in this process, for scripts and notebooks.

Knows: how a list of prompts becomes requests and comes back as texts, in order. It runs the same
`EngineCore` that a server's engine process runs. The names are vLLM's.
Knows nothing of sockets or HTTP.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, cast

from tqdm import tqdm

from minisrv.checkpoint import open_checkpoint
from minisrv.config import EngineConfig
from minisrv.engine.core import EngineCore
from minisrv.errors import RequestError
from minisrv.modes import CUDAGraphMode
from minisrv.progress import StartupProgress
from minisrv.request import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from minisrv.text.detokenizer import Detokenizer
from minisrv.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""
Message = dict[str, Any]
"""One message of a chat: `role` and `content`."""


@dataclass
class CompletionOutput:
    """One completion. `text` ends before a stop string, or behind it if that is asked for;
    `token_ids` holds every sampled token.

    graph_steps: the steps it took part in, counted by "MODE/reason".
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    graph_steps: dict[str, int] = field(default_factory=dict)


@dataclass
class RequestOutput:
    """A prompt and what came of it.

    num_cached_tokens: tokens of the prompt that were found in the prefix cache.
    prompt_logprobs: of each prompt token, None for the first; None if they were not asked for.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class LLM:
    """A model, loaded, captured and certified when the constructor returns.

    model: directory, hub id, or None for the default model.
    settings: fields of `EngineConfig`; `cudagraph_mode` may be given as text.
    Raises the start-up branches of `minisrv.errors`.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        if isinstance(settings.get("cudagraph_mode"), str):
            settings["cudagraph_mode"] = CUDAGraphMode.parse(settings["cudagraph_mode"])
        config = EngineConfig(model=model, **settings)
        checkpoint = open_checkpoint(config)
        self._tokenizer = Tokenizer.from_description(checkpoint.tokenizer)
        progress = StartupProgress()
        self.engine = EngineCore(config, progress, checkpoint=checkpoint)
        progress.close()
        self._count = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete `prompts`, one or many; the answers come in their order.

        sampling_params: for all prompts, or one for each; None takes the defaults.
        Raises RequestError (or a branch of it) if one cannot be served: none is then.
        """
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral)):
            prompts = [cast("Prompt", prompts)]
        ids = [
            self._tokenizer.encode(prompt)
            if isinstance(prompt, str)
            else [operator.index(token_id) for token_id in prompt]
            for prompt in cast("Sequence[Prompt]", prompts)
        ]
        return self._run(ids, _params(sampling_params, len(ids)), continues=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several; see `generate`."""
        if messages and isinstance(messages[0], dict):
            messages = [cast("Sequence[Message]", messages)]
        conversations = cast("Sequence[Sequence[Message]]", messages)
        ids = [self._tokenizer.apply_chat_template(list(chat)) for chat in conversations]
        return self._run(ids, _params(sampling_params, len(ids)), continues=False)

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], *, continues: bool
    ) -> list[RequestOutput]:
        jobs = [
            self._job(prompt, param, continues)
            for prompt, param in zip(prompts, params, strict=True)
        ]
        for job in jobs:
            self.engine.check(job.request)
        jobs_by_id = {job.request.request_id: job for job in jobs}
        waiting = jobs[::-1]
        with tqdm(total=len(jobs), unit="prompt", disable=None, leave=False) as progress:
            try:
                while waiting or self.engine.has_work:
                    while waiting and self.engine.has_room:
                        self.engine.add(waiting.pop().request)
                    for output in self.engine.step():
                        job = jobs_by_id[output.request_id]
                        job.take(output)
                        if job.stopped and (last := self.engine.abort(output.request_id)):
                            job.take(last)
                        progress.update(job.completion.finish_reason is not None)
            finally:
                for request_id in jobs_by_id:
                    self.engine.abort(request_id)
        return [job.result for job in jobs]

    def _job(self, prompt: list[int], params: SamplingParams, continues: bool) -> _Job:
        self._count += 1
        request = EngineRequest(request_id=str(self._count), prompt_token_ids=prompt, params=params)
        text = Detokenizer(
            self._tokenizer,
            params.stop,
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            prompt_token_ids=prompt if continues else (),
        )
        return _Job(request, text)


class _Job:
    """A request on its way."""

    def __init__(self, request: EngineRequest, text: Detokenizer) -> None:
        self.request = request
        self.text = text
        self.completion = CompletionOutput()
        if request.params.logprobs is not None:
            self.completion.logprobs = []
        self.result = RequestOutput(request.request_id, request.prompt_token_ids, [self.completion])
        if request.params.prompt_logprobs is not None:
            self.result.prompt_logprobs = [None]

    @property
    def stopped(self) -> bool:
        return self.text.stopped

    def take(self, output: EngineOutput) -> None:
        """Add an output. Behind a stop string the engine's answer to the abort is the last."""
        completion, reason = self.completion, output.finish_reason
        self.result.num_cached_tokens += output.num_cached_tokens
        if self.result.prompt_logprobs is not None:
            self.result.prompt_logprobs += output.prompt_logprobs
        completion.token_ids += output.token_ids
        if completion.logprobs is not None and output.logprobs is not None:
            completion.logprobs += output.logprobs
        shown = output.token_ids
        if reason is FinishReason.STOP:
            shown = self.text.without_stop_token(shown)
        completion.text += self.text.push(shown, final=reason is not None)
        if reason is not None:
            completion.finish_reason = FinishReason.STOP if self.stopped else reason
            completion.graph_steps = output.graph_steps or {}


def _params(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    if len(given) != count:
        raise RequestError(
            f"{len(given)} sampling_params for {count} prompts: give one for each, or one for all.",
            param="sampling_params",
        )
    return list(given)

"""A stand-in for the engine client that replays a script instead of running a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

from minisrv.engine.admission import Admission
from minisrv.engine.client import EngineState
from minisrv.engine.messages import (
    Command,
    EngineInfo,
    EngineStats,
    Loading,
    SleepReport,
    StepCount,
)
from minisrv.engine.trace_format import AskSteps, Steps
from minisrv.errors import EngineDeadError, EngineNotReadyError
from minisrv.request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    GraphStats,
    TokenLogprobs,
)

Script = Callable[[EngineRequest], Iterable[EngineOutput | Exception | asyncio.Event]]

INFO = EngineInfo(
    max_model_len=200,
    vocab_size=400,
    num_kv_blocks=100,
    block_size=16,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_waiting=100,
    dtype="float32",
    device="cpu",
    cudagraph_mode="full-and-piecewise",
    startup_seconds={},
    simulated_launch_us=11.5,
    step_trace=8,
)
STATS = EngineStats(
    running=2,
    waiting=1,
    kv_blocks_used=25,
    kv_blocks_total=100,
    preemptions=3,
    prompt_tokens=40,
    generated_tokens=30,
    prefix_cache_queries=36,
    prefix_cache_hits=16,
    steps=[
        StepCount("FULL", "pure_decode", 12, 30, 6),
        StepCount("PIECEWISE", "has_prefill", 2, 40, 24),
    ],
)
GRAPH_STATS = GraphStats("a1b2c3", 7, {"FULL/8": 5}, 0.1, 2.5, 10.0, 0, 16, [0])
STEPS = {"FULL/pure_decode": 5, "PIECEWISE/has_prefill": 1}

_Queue = asyncio.Queue[tuple[str, EngineOutput | Exception | None]]
"""The items of a script with the id of their request; None follows the last item."""


class FakeEngine:
    """Replays `script(request)`: yields its outputs, raises its exceptions and waits for its
    events.

    requests: the requests that were submitted.
    aborted: the ids of requests whose stream was closed before their end.
    asked_to_abort: the ids of requests for which `abort` was called.
    commands: the commands that it was given.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.admission = Admission()
        self.state = EngineState.READY
        self.info: EngineInfo | None = INFO
        self.num_messages = 0
        self.loading: Loading | None = None
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.started = asyncio.Event()
        self.asked_to_abort: set[str] = set()
        self.commands: list[Command] = []

    async def command(self, command: Command) -> SleepReport:
        self.commands.append(command)
        return SleepReport()

    async def stats(self) -> EngineStats:
        return STATS

    async def steps(self, ask: AskSteps) -> Steps:
        self.check_serving()
        return Steps()

    def check_serving(self) -> None:
        if self.state is EngineState.DEAD:
            raise EngineDeadError(
                "the engine has ended unexpectedly; see its log, and restart the server."
            )
        if not self.state.is_served:
            raise EngineNotReadyError(f"the server is {self.state}; try again later.")

    async def generate(
        self, requests: Sequence[EngineRequest]
    ) -> AsyncIterator[list[EngineOutput]]:
        self.requests += requests
        self.started.set()
        queue: _Queue = asyncio.Queue(64)
        replays = [asyncio.create_task(self._replay(request, queue)) for request in requests]
        ended: set[str] = set()
        over = 0
        try:
            while over < len(requests):
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                for request_id, item in items:
                    if isinstance(item, Exception):
                        ended.add(request_id)
                        raise item
                    if item is None:
                        over += 1
                    elif item.finish_reason is not None:
                        ended.add(request_id)
                yield [item for _, item in items if isinstance(item, EngineOutput)]
        finally:
            for replay in replays:
                replay.cancel()
            await asyncio.gather(*replays, return_exceptions=True)
            self.aborted += [r.request_id for r in requests if r.request_id not in ended]

    async def _replay(self, request: EngineRequest, queue: _Queue) -> None:
        for item in self.script(request):
            await asyncio.sleep(0)
            if request.request_id in self.asked_to_abort:
                last = EngineOutput(
                    request_id=request.request_id,
                    finish_reason=FinishReason.ABORT,
                    graph_steps=STEPS,
                    graph_stats=GRAPH_STATS,
                )
                await queue.put((request.request_id, last))
                break
            if isinstance(item, asyncio.Event):
                await item.wait()
            else:
                self.num_messages += 1
                await queue.put((request.request_id, item))
        await queue.put((request.request_id, None))

    def abort(self, request_id: str) -> None:
        self.asked_to_abort.add(request_id)


def outputs(
    token_ids: Iterable[int],
    finish: FinishReason = FinishReason.LENGTH,
    logprobs: int | None = None,
    cached: int = 0,
) -> Callable[[EngineRequest], list[EngineOutput]]:
    """A script of one token a step, whose first output reports `cached` prompt tokens as found in
    the prefix cache."""
    ids = list(token_ids)

    def script(request: EngineRequest) -> list[EngineOutput]:
        return [
            EngineOutput(
                request_id=request.request_id,
                token_ids=[token_id],
                logprobs=None if logprobs is None else [token_logprobs(token_id, logprobs)],
                finish_reason=finish if i == len(ids) - 1 else None,
                graph_steps=STEPS if i == len(ids) - 1 else None,
                graph_stats=GRAPH_STATS if i == len(ids) - 1 else None,
                num_cached_tokens=0 if i else cached,
            )
            for i, token_id in enumerate(ids)
        ]

    return script


def scored(script: Script, num_top: int, chunk: int = 2) -> Script:
    """`script` after outputs with the log-probabilities of the prompt, one for each chunk of
    `chunk` tokens."""

    def replay(request: EngineRequest) -> Iterator[EngineOutput | Exception | asyncio.Event]:
        told = [token_logprobs(token_id, num_top) for token_id in request.prompt_token_ids[1:]]
        for start in range(0, len(told), chunk):
            report = told[start : start + chunk]
            yield EngineOutput(request_id=request.request_id, prompt_logprobs=report)
        yield from script(request)

    return replay


def token_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of a token with `num_top` entries: the token and the ids after it, each
    less likely than the one before by 1."""
    top = [(token_id + i, -0.5 - i) for i in range(num_top)]
    return TokenLogprobs(token_id, -0.5, top, rank=1)


def sse(text: str) -> list[dict[str, Any]]:
    """The JSON of every event of a stream, which must end with [DONE]."""
    *events, rest = text.split("\n\n")
    assert rest == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]

"""One choice of a response, and several of them side by side.

A choice is one request of the engine: its tokens become text here, stop strings are found here,
and what it needed is measured here. Whatever ends the reading of a choice before its time
(a stop string, a failure beside it, a client that went away) aborts it in the engine, because it
closes the engine client's generator.

Knows: the engine client and the detokenizer. Knows nothing of JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from minisrv.engine.client import EngineClient
from minisrv.errors import EngineError, EngineNotReadyError
from minisrv.metrics import Metrics
from minisrv.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from minisrv.text.detokenizer import Detokenizer


@dataclass(slots=True)
class Delta:
    """What one output of the engine adds to one choice.

    token_ids: every token, the one that ended the choice included; it counts in the usage.
    logprobs: of all of them but that one, those of a stop string included.
    num_cached_tokens: prompt tokens found in the prefix cache, with the first token only.
    finish_reason: OpenAI's word, with the last delta only.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    graph_steps: dict[str, int] | None = None


class Choice:
    """One choice: `index` is its place in the response, `arrival` the request's (perf_counter).

    report_steps: the last delta carries `graph_steps`. Then a choice that ends at a stop string
        waits for the engine's answer to the abort, which carries them.
    """

    def __init__(
        self,
        client: EngineClient,
        request: EngineRequest,
        detokenizer: Detokenizer,
        metrics: Metrics,
        *,
        index: int,
        arrival: float,
        report_steps: bool,
    ) -> None:
        self._client = client
        self._request = request
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._index = index
        self._arrival = arrival
        self._last_output: float | None = None
        self._report_steps = report_steps

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Generate: the last delta, and no other, carries a finish reason.

        Raises what the engine client raises, and EngineError if the engine gave the request up.
        """
        async with aclosing(self._client.generate(self._request)) as outputs:
            async for output in outputs:
                self._measure(output)
                delta = self._read(output)
                if self._detokenizer.stopped and output.finish_reason is None:
                    if self._report_steps:
                        self._client.abort(self._request.request_id)
                        delta.graph_steps = await _last_steps(outputs)
                    delta.finish_reason = FinishReason.STOP.value
                if delta.finish_reason is not None:
                    elapsed = time.perf_counter() - self._arrival
                    self._metrics.finished(delta.finish_reason, elapsed)
                    yield delta
                    return
                yield delta
        raise EngineError("the engine ended a request without a finish reason.")

    def _read(self, output: EngineOutput) -> Delta:
        reason = output.finish_reason
        if reason is FinishReason.ABORT:
            raise EngineNotReadyError("The server is shutting down and dropped this request.")
        # A token that ends the choice is no part of its text.
        shown = output.token_ids[:-1] if reason is FinishReason.STOP else output.token_ids
        text = self._detokenizer.push(shown, final=reason is not None)
        if self._detokenizer.stopped:
            reason = reason and FinishReason.STOP
        return Delta(
            self._index,
            text,
            output.token_ids,
            output.logprobs and output.logprobs[: len(shown)],
            output.num_cached_tokens,
            reason and reason.value,
            output.graph_steps if self._report_steps else None,
        )

    def _measure(self, output: EngineOutput) -> None:
        now = time.perf_counter()
        if self._last_output is None:
            self._metrics.first_token(now - self._arrival)
        elif output.token_ids:
            self._metrics.gap((now - self._last_output) / len(output.token_ids))
        self._last_output = now


async def _last_steps(outputs: AsyncGenerator[EngineOutput]) -> dict[str, int] | None:
    """Read on to the last output, which the engine sends in answer to the abort."""
    steps = None
    async for output in outputs:
        steps = output.graph_steps
    return steps


async def merge(choices: Sequence[Choice]) -> AsyncGenerator[Delta]:
    """The deltas of all choices as they come; a failure of one ends the others."""
    if len(choices) == 1:
        async with aclosing(choices[0].deltas()) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(choice.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            if (item := await queue.get()) is not None:
                yield item
                continue
            running -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""The worker's side of the engine, against a socket that plays the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq.asyncio

from minisrv.engine.client import EngineClient
from minisrv.engine.messages import EngineInfo, EngineStats, Ready, StepOutputs, encode
from minisrv.request import EngineOutput, EngineRequest, FinishReason, SamplingParams

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """Sends what the test says."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket

    async def hear(self) -> None:
        self.worker, _ = await self.socket.recv_multipart()

    async def say(self, message: Ready | StepOutputs) -> None:
        await self.socket.send_multipart([self.worker, encode(message)])


@asynccontextmanager
async def connected(tmp_path: Path) -> AsyncIterator[tuple[Engine, EngineClient]]:
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(f"ipc://{tmp_path}/engine")
        engine = Engine(socket)
        client = EngineClient(f"ipc://{tmp_path}/engine", os.getpid())
        await client.start()
        await engine.hear()
        await engine.say(Ready(EngineInfo(8, 8, 8, 8, 8, 8, 8, "", "", "", 0, {})))
        await client.settled()
        yield engine, client
        await client.close()


async def test_a_place_is_free_when_the_engine_has_finished(tmp_path: Path) -> None:
    """Not when the answer has been read: a client may take its time, and the engine has room."""
    async with connected(tmp_path) as (engine, client):
        with client.admission.places(["a", "b"], 2):
            outputs = client.generate(
                EngineRequest(request_id="a", prompt_token_ids=[1], params=SamplingParams())
            )
            first = asyncio.ensure_future(anext(outputs))
            reading = [EngineOutput(request_id="a", token_ids=[i]) for i in range(3)]
            last = EngineOutput(request_id="a", token_ids=[3], finish_reason=FinishReason.LENGTH)
            await engine.hear()
            await engine.say(StepOutputs([*reading, last], EngineStats()))
            assert (await first).token_ids == [0]
            assert client.admission.num_taken == 1
            rest = [output.token_ids async for output in outputs]
            assert rest == [[1], [2], [3]]

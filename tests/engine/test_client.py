"""The API worker's side of the connection to the engine, against a socket that plays the engine."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio
from msgspec.structs import replace

from minisrv import errors
from minisrv.engine import client as client_module
from minisrv.engine.client import EngineClient, EngineState
from minisrv.engine.messages import (
    AskStats,
    CommandDone,
    CompilationReport,
    CompilationState,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Failed,
    Hello,
    Ready,
    Sleep,
    SleepMode,
    SleepReport,
    SleepTag,
    StepOutputs,
    Submit,
    WakeUp,
    WorkerMessage,
    decode_worker_message,
    encode,
)
from minisrv.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    MinisrvError,
    QueueFullError,
    SleepError,
)
from minisrv.request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    RequestFailure,
    SamplingParams,
)
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """A simulated engine that sends the messages that the test gives it."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket

    async def hear(self) -> WorkerMessage:
        self.worker, message = await self.socket.recv_multipart()
        return decode_worker_message(message)

    async def say(self, message: EngineMessage) -> None:
        await self.socket.send_multipart([self.worker, encode(message)])


@asynccontextmanager
async def connected(tmp_path: Path) -> AsyncIterator[tuple[Engine, EngineClient]]:
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(f"ipc://{tmp_path}/engine")
        engine = Engine(socket)
        client = EngineClient(f"ipc://{tmp_path}/engine", os.getpid(), "api-0")
        await client.start()
        assert await engine.hear() == Hello()
        await engine.say(Ready(EngineInfo(8, 8, 8, 8, 8, 8, 8, "", "", "", {})))
        await client.settled()
        yield engine, client
        await client.close()


def request(name: str) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams())


def token(name: str, token_id: int, finish: FinishReason | None = None) -> EngineOutput:
    return EngineOutput(request_id=name, token_ids=[token_id], finish_reason=finish)


async def test_a_place_is_free_when_the_engine_has_finished(tmp_path: Path) -> None:
    """A request's place is free when the engine has finished it, and not only when its answer has
    been read: a client may read slowly while the engine has room."""
    async with connected(tmp_path) as (engine, client):
        with client.admission.places(["a", "b"], 2):
            outputs = client.generate([request("a")])
            first = asyncio.ensure_future(anext(outputs))
            await engine.hear()
            await engine.say(StepOutputs([token("a", 0)]))
            assert await first == [token("a", 0)]
            assert client.admission.num_taken == 2
            await engine.say(StepOutputs([token("a", 1), token("a", 2)]))
            await engine.say(StepOutputs([last := token("a", 3, FinishReason.LENGTH)]))
            await until(lambda: client.admission.num_taken == 1)
            rest = [batch async for batch in outputs]
            assert rest == [[token("a", 1), token("a", 2), last]]


async def test_the_requests_of_a_response_are_read_together_and_end_together(
    tmp_path: Path,
) -> None:
    async with connected(tmp_path) as (engine, client):
        outputs = client.generate([request("a"), request("b")])
        first = asyncio.ensure_future(anext(outputs))
        assert await engine.hear() == Submit([request("a"), request("b")])
        await engine.say(StepOutputs([token("a", 0, FinishReason.STOP), token("b", 1)]))
        assert await first == [token("a", 0, FinishReason.STOP), token("b", 1)]
        failure = RequestFailure.of(QueueFullError("full"))
        await engine.say(StepOutputs([EngineOutput(request_id="b", error=failure)]))
        with pytest.raises(QueueFullError, match="full") as raised:
            await anext(outputs)
        assert raised.value.retry_after == client.admission.retry_after


async def test_a_new_description_of_the_engine_takes_the_place_of_the_old(tmp_path: Path) -> None:
    """When another generation serves, the engine describes itself again; a worker that drains goes
    on draining."""
    async with connected(tmp_path) as (engine, client):
        client.drain()
        assert client.info is not None
        report = CompilationReport(CompilationState.COMPILED, generation=1, swaps=1)
        await engine.say(Ready(replace(client.info, compilation=report)))
        await until(lambda: client.info is not None and client.info.compilation == report)
        assert client.state is EngineState.DRAINING


def test_an_error_is_the_same_behind_the_socket() -> None:
    """An error arrives as the class that was sent and is not taken for another one with its status
    and code."""
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MinisrvError)
    }
    assert len(kinds) > 15
    for kind in kinds:
        error = kind("what was wrong")
        error.param = "prompt"
        sent = msgspec.msgpack.encode(RequestFailure.of(error))
        found = msgspec.msgpack.decode(sent, type=RequestFailure).as_exception()
        assert type(found) is kind
        assert (found.message, found.param) == (error.message, error.param)


async def test_an_iteration_that_ends_early_aborts_what_is_open(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        outputs = client.generate([request("a"), request("b")])
        first = asyncio.ensure_future(anext(outputs))
        await engine.hear()
        await engine.say(StepOutputs([token("a", 0, FinishReason.STOP), token("b", 1)]))
        await first
        await outputs.aclose()
        assert await engine.hear() == Submit([], ["b"])


async def test_counters_are_asked_for_and_answers_come_in_order(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        asked = [asyncio.ensure_future(client.stats()) for _ in range(2)]
        for running in (1, 2):
            assert await engine.hear() == AskStats()
            await engine.say(EngineStats(running=running))
            assert (await asked[running - 1]).running == running


async def test_counters_of_an_engine_that_does_not_answer_are_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the engine does not answer in time the last counters are returned, and a late answer is
    not taken for that to the next question."""
    async with connected(tmp_path) as (engine, client):
        told = asyncio.ensure_future(client.stats())
        await engine.hear()
        await engine.say(EngineStats(running=7))
        await told
        monkeypatch.setattr(client_module, "STATS_SECONDS", 0.01)
        assert (await client.stats()).running == 7
        await engine.hear()
        # This answer is late, and the next question must still get its own.
        await engine.say(EngineStats(running=8))
        monkeypatch.undo()
        told = asyncio.ensure_future(client.stats())
        await engine.hear()
        await engine.say(EngineStats(running=9))
        assert (await told).running == 9


async def test_counters_that_nobody_waits_for_are_no_error(tmp_path: Path) -> None:
    """An answer to a question that nobody waits for any more is ignored: the askers got an answer
    at the end of the drain, or belonged to a dead worker whose place this one has taken."""
    async with connected(tmp_path) as (engine, client):
        asked = asyncio.ensure_future(client.stats())
        assert await engine.hear() == AskStats()
        client.drain()
        client.end_open()
        await asked
        await engine.say(EngineStats(running=3))
        before = client.num_messages
        await until(lambda: client.num_messages > before)
        assert client.state is EngineState.DRAINING
        asked = asyncio.ensure_future(client.stats())
        assert await engine.hear() == AskStats()
        await engine.say(EngineStats(running=4))
        assert (await asked).running == 4


async def test_what_cannot_be_read_ends_every_request(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        first = asyncio.ensure_future(anext(client.generate([request("a")])))
        await engine.hear()
        await engine.socket.send_multipart([engine.worker, b"no message"])
        with pytest.raises(EngineDeadError, match="cannot be read"):
            await first
        assert client.state is EngineState.DEAD


async def test_the_engines_parent_says_how_it_has_ended(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        first = asyncio.ensure_future(anext(client.generate([request("a")])))
        await engine.hear()
        client.engine_ended("by SIGKILL")
        with pytest.raises(EngineDeadError, match="has ended unexpectedly, by SIGKILL; see its"):
            await first
        assert client.state is EngineState.DEAD


@pytest.mark.parametrize(
    "words",
    ["it was tired.", "the engine has ended unexpectedly; see its log, and restart the server."],
)
async def test_what_the_engine_said_of_its_end_stands(tmp_path: Path, words: str) -> None:
    """The message that the engine sent about its own end is kept, also where it equals the message
    that its parent would have given."""
    async with connected(tmp_path) as (engine, client):
        first = asyncio.ensure_future(anext(client.generate([request("a")])))
        await engine.hear()
        before = client.num_messages
        await engine.say(Failed(RequestFailure.of(EngineError(words))))
        await until(lambda: client.num_messages > before)
        client.engine_ended("with status 1")
        with pytest.raises(EngineDeadError) as raised:
            await first
        assert raised.value.message == words


async def test_nothing_is_kept_of_requests_that_a_dead_engine_refuses(tmp_path: Path) -> None:
    """Clients may ask for as long as the server is there, and each error names the same cause."""
    async with connected(tmp_path) as (engine, client):
        before = client.num_messages
        await engine.say(Failed(RequestFailure.of(EngineError("it was tired."))))
        await until(lambda: client.num_messages > before)
        client.engine_ended("with status 1")
        await until(lambda: client.state is EngineState.DEAD)
        frames = []
        for _ in range(3):
            with pytest.raises(EngineDeadError, match=r"it was tired\.") as raised:
                client.check_serving()
            frames.append(len(raised.traceback))
        assert frames[0] == frames[1] == frames[2]


@pytest.mark.parametrize("told", [False, True])
async def test_an_engine_that_had_ended_before_anybody_watched(tmp_path: Path, told: bool) -> None:
    """A client that connects to an engine that has already ended finds it dead, and says how it
    ended if its parent has told."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    client = EngineClient(f"ipc://{tmp_path}/engine", gone.pid, "api-0", 1e6 if told else 0.0)
    await client.start()
    if told:
        client.engine_ended("by SIGSEGV")
    await client.settled()
    assert client.state is EngineState.DEAD
    assert ("by SIGSEGV" in client.death.message) is told
    await client.close()


SLEEP, WAKE_UP = Sleep(1, SleepMode.ABORT), WakeUp([SleepTag.WEIGHTS])


async def test_commands_are_answered_in_their_order(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        first, second = (asyncio.ensure_future(client.command(c)) for c in (SLEEP, WAKE_UP))
        assert [await engine.hear(), await engine.hear()] == [SLEEP, WAKE_UP]
        await engine.say(CommandDone(RequestFailure.of(SleepError("no memory"))))
        with pytest.raises(SleepError, match="no memory"):
            await first
        assert not second.done()
        await engine.say(CommandDone())
        await second


async def test_each_command_is_answered_by_what_it_has_brought_about(tmp_path: Path) -> None:
    """However late the answer is read, and whatever the next command has changed."""
    async with connected(tmp_path) as (engine, client):
        assert client.info is not None
        asked = [asyncio.ensure_future(client.command(c)) for c in (SLEEP, WAKE_UP)]
        assert [await engine.hear(), await engine.hear()] == [SLEEP, WAKE_UP]
        reports = [SleepReport(level=1, released=tuple(SleepTag)), SleepReport()]
        messages: list[EngineMessage] = []
        for report in reports:
            messages += [Ready(replace(client.info, sleep=report)), CommandDone()]
        for message in messages:
            client._handle_message(message)
        assert await asyncio.gather(*asked) == reports


async def test_the_engine_decides_whether_it_is_awake(tmp_path: Path) -> None:
    """A client that has not heard yet that the engine is awake again refuses nothing."""
    async with connected(tmp_path) as (engine, client):
        assert client.info is not None
        asleep = SleepReport(level=1, released=tuple(SleepTag))
        await engine.say(Ready(replace(client.info, sleep=asleep)))
        await until(lambda: client.state is EngineState.ASLEEP)
        first = asyncio.ensure_future(anext(client.generate([request("a")])))
        assert await engine.hear() == Submit([request("a")])
        await engine.say(Ready(replace(client.info, sleep=SleepReport())))
        await engine.say(StepOutputs([token("a", 1)]))
        assert await first == [token("a", 1)]
        assert client.state is EngineState.READY


async def test_an_engine_that_is_about_to_sleep(tmp_path: Path) -> None:
    """It refuses requests, so that the client does not call it ready."""
    async with connected(tmp_path) as (engine, client):
        assert client.info is not None
        await engine.say(Ready(replace(client.info, sleep=SleepReport(is_due=True))))
        await until(lambda: client.state is EngineState.ASLEEP)


async def test_a_command_that_nobody_will_answer(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        waits = asyncio.ensure_future(client.command(SLEEP))
        assert await engine.hear() == SLEEP
        client.drain()
        with pytest.raises(EngineNotReadyError, match="draining"):
            await client.command(WAKE_UP)
        client.end_open()
        with pytest.raises(EngineNotReadyError, match="shutting down"):
            await waits
        before = client.num_messages
        await engine.say(CommandDone())  # too late, and no harm
        await until(lambda: client.num_messages > before)
        assert client.state is EngineState.DRAINING


async def test_an_answer_to_a_worker_that_has_died(tmp_path: Path) -> None:
    """The worker with the name of a dead one may be told that a command is done of which it knows
    nothing; it serves on."""
    async with connected(tmp_path) as (engine, client):
        before = client.num_messages
        await engine.say(CommandDone())
        await until(lambda: client.num_messages > before)
        first = asyncio.ensure_future(client.command(SLEEP))
        assert await engine.hear() == SLEEP
        assert not first.done()
        await engine.say(CommandDone())
        await first
        assert client.state is EngineState.READY


async def test_an_engine_that_dies_asleep(tmp_path: Path) -> None:
    async with connected(tmp_path) as (engine, client):
        assert client.info is not None
        asleep = SleepReport(level=2, released=tuple(SleepTag))
        await engine.say(Ready(replace(client.info, sleep=asleep)))
        await until(lambda: client.state is EngineState.ASLEEP)
        waits = asyncio.ensure_future(client.command(WAKE_UP))
        assert await engine.hear() == WAKE_UP
        client.engine_ended("by SIGKILL")
        for command in (waits, client.command(WAKE_UP)):
            with pytest.raises(EngineDeadError, match="by SIGKILL"):
                await command
        assert client.state is EngineState.DEAD

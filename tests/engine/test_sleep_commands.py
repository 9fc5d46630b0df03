"""Sleep that an engine's process is asked for while it has requests: what its workers are told."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq

from minisrv import SamplingParams
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import (
    CommandDone,
    EngineMessage,
    Ready,
    Sleep,
    SleepMode,
    StepOutputs,
    Submit,
    encode,
)
from minisrv.engine.process import _EngineServer
from minisrv.errors import EngineAsleepError
from minisrv.request import EngineRequest
from tests.checkpoints import make_checkpoint
from tests.engine.test_sleep import connected, hear, start
from tests.waiting import GUARD_SECONDS

Worker = zmq.Socket[bytes]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[_EngineServer, Worker]]:
    """An engine's side of a socket, and a worker whose request runs."""
    address = f"ipc://{tmp_path}/engine"
    server = _EngineServer(address, Heartbeat(tmp_path / "heartbeat"))
    checkpoint = make_checkpoint(tmp_path / "model")
    server.core = start(checkpoint, cudagraph_capture="whole").engine
    server.state = Ready(server.core.info)
    worker = connected(server, address)
    worker.send(encode(Submit([request("a")])))
    assert isinstance(hear(server, worker), StepOutputs)
    yield server, worker
    worker.close(linger=0)
    server.close()


def request(name: str) -> EngineRequest:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=[5, 6], params=params)


def until_done(server: _EngineServer, worker: Worker) -> list[EngineMessage]:
    """Return what the worker is told until its first command has been carried out."""
    told = [hear(server, worker)]
    while not isinstance(told[-1], CommandDone):
        told.append(hear(server, worker))
    return told


def test_a_sleep_that_waits_is_told_at_once(served: tuple[_EngineServer, Worker]) -> None:
    """Every worker knows that requests are refused before the engine sleeps, once, and then that it
    sleeps."""
    server, worker = served
    worker.send(encode(Sleep(1, SleepMode.WAIT)))
    assert server.socket.poll(1000 * GUARD_SECONDS), "it has arrived before the request ends"
    told = until_done(server, worker)
    reports = [message.info.sleep for message in told if isinstance(message, Ready)]
    assert [(report.is_due, report.is_asleep) for report in reports] == [
        (True, False),
        (False, True),
    ]
    assert all(report.refuses_requests for report in reports)
    first = next(number for number, message in enumerate(told) if isinstance(message, Ready))
    tokens = [each for each in told[first:] if isinstance(each, StepOutputs)]
    assert tokens[-1].outputs[-1].finish_reason is not None, "the request has gone on"


def test_a_sleep_that_aborts_does_not_wait_for_one_that_waits(
    served: tuple[_EngineServer, Worker],
) -> None:
    """It ends the request at once, and both are carried out in their order."""
    server, worker = served
    worker.send(encode(Sleep(1, SleepMode.WAIT)))
    assert server.socket.poll(1000 * GUARD_SECONDS), "it has arrived before the request ends"
    while not server.commands:
        server._turn()
    worker.send(encode(Sleep(2, SleepMode.ABORT)))
    assert server.socket.poll(10_000), "it has arrived"
    told = until_done(server, worker) + until_done(server, worker)
    outputs = [
        each for message in told if isinstance(message, StepOutputs) for each in message.outputs
    ]
    failure = outputs[-1].error
    assert failure is not None
    assert isinstance(failure.as_exception(), EngineAsleepError)
    levels = [
        before.info.sleep.level
        for before, message in pairwise(told)
        if isinstance(before, Ready) and message == CommandDone()
    ]
    assert levels == [1, 2]

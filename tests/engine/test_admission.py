"""Places for requests: each is counted once and freed on every path, and the engine's own rule
agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from minisrv.engine import admission
from minisrv.engine.admission import MAX_RETRY_AFTER, Admission
from minisrv.engine.heartbeat import Heartbeat
from minisrv.engine.messages import (
    AskStats,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Hello,
    Ready,
    StepOutputs,
    Submit,
    decode_engine_message,
    encode,
)
from minisrv.engine.process import _EngineServer
from minisrv.errors import QueueFullError, RequestError
from minisrv.request import EngineOutput, EngineRequest, FinishReason, SamplingParams


def test_all_or_none() -> None:
    """A request gets places for all its choices or for none of them."""
    places = Admission()
    with places.places(["a", "b"], 3):
        with pytest.raises(QueueFullError, match="2 requests are running or waiting, of at most 3"):
            places.places(["c", "d"], 3).__enter__()
        assert places.num_taken == 2
        with places.places(["c"], 3):
            assert places.num_taken == 3
    assert places.num_taken == 0


def test_what_can_never_be_admitted_is_not_told_to_come_again() -> None:
    """A request with more prompts than there are places gets a 400 and not a 429."""
    with pytest.raises(RequestError, match="at most 2") as raised:
        Admission().places(["a", "b", "c"], 2).__enter__()
    assert raised.value.http_status == 400
    assert raised.value.param == "prompt"


def test_a_place_goes_back_once() -> None:
    """A place is freed once: by the engine's last output for the request, and not again at the end
    of the response."""
    places = Admission()
    with places.places(["a", "b"], 2):
        places.leave("a")
        places.leave("a")
        with places.places(["c"], 2):
            assert places.num_taken == 2
    assert places.num_taken == 0
    with pytest.raises(ZeroDivisionError), places.places(["d"], 1):
        raise ZeroDivisionError
    assert places.num_taken == 0


def test_retry_after_is_how_long_places_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After follows the time for which requests hold their places, in whole seconds from 1 to
    MAX_RETRY_AFTER."""
    now = 0.0
    monkeypatch.setattr(admission.time, "monotonic", lambda: now)
    places = Admission()
    assert places.retry_after == 1
    for stay, expected in ((7.5, 8), (0.01, 1), (1000.0, MAX_RETRY_AFTER)):
        for _ in range(200):
            with places.places(["a"], 1):
                now += stay
        assert places.retry_after == expected
    with places.places(["a"], 1), pytest.raises(QueueFullError) as raised:
        places.places(["b"], 1).__enter__()
    assert raised.value.retry_after == MAX_RETRY_AFTER


class _CoreOfOne:
    """An engine core that admits one request at a time."""

    has_work = True

    def __init__(self) -> None:
        self.held: set[str] = set()

    def add(self, request: EngineRequest) -> None:
        if self.held:
            raise QueueFullError("full")
        self.held.add(request.request_id)

    def abort(self, request_id: str) -> EngineOutput | None:
        if request_id not in self.held:
            return None
        self.held.remove(request_id)
        return EngineOutput(request_id=request_id, finish_reason=FinishReason.ABORT)

    def stats(self) -> EngineStats:
        return EngineStats()


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=[1], params=SamplingParams())


@contextmanager
def engine_server(tmp_path: Path) -> Iterator[tuple[_EngineServer, Callable[[str], zmq.Socket]]]:
    """Yield a server around `_CoreOfOne`, and a function that connects a worker by name and returns
    its socket once its hello has been answered."""
    address = f"ipc://{tmp_path}/engine"
    server = _EngineServer(address, Heartbeat(tmp_path / "heartbeat"))
    server.core = _CoreOfOne()  # type: ignore[assignment]
    server.state = Ready(EngineInfo(8, 8, 8, 8, 8, 8, 8, "", "", "", {}))
    workers = []

    def connect(name: str) -> zmq.Socket:
        worker = server.context.socket(zmq.DEALER)
        workers.append(worker)
        worker.set(zmq.ROUTING_ID, name.encode())
        worker.connect(address)
        worker.send(encode(Hello()))
        # Messages before Ready were meant for the dead worker that had this name: it may have asked
        # before zmq knew of its death.
        while not isinstance(answer(server, worker), Ready):
            pass
        return worker

    try:
        yield server, connect
    finally:
        for worker in workers:
            worker.close(linger=0)
        server.close()


def answer(server: _EngineServer, worker: zmq.Socket) -> EngineMessage:
    """Return the next message to the worker, while the server reads what it is sent."""
    while not worker.poll(1):
        if server.socket.poll(1):
            server._receive()
    return decode_engine_message(worker.recv())


def turn(
    server: _EngineServer, worker: zmq.Socket, requests: str, aborts: str
) -> dict[str, EngineOutput]:
    """Submit requests and aborts as one message of a worker, and return the outputs that come
    before the answer to a question sent behind it."""
    worker.send(encode(Submit([request(name) for name in requests], list(aborts))))
    worker.send(encode(AskStats()))
    outputs: list[EngineOutput] = []
    while not isinstance(message := answer(server, worker), EngineStats):
        assert isinstance(message, StepOutputs)
        outputs += message.outputs
    return {output.request_id: output for output in outputs}


def test_an_abort_makes_room_for_the_request_beside_it(tmp_path: Path) -> None:
    """An abort frees its place before requests of the same message are admitted: a worker that has
    aborted counts the place as free, so the engine must too."""
    with engine_server(tmp_path) as (server, connect):
        worker = connect("api-0")
        assert turn(server, worker, "a", "") == {}
        both = turn(server, worker, "b", "a")
        assert both.keys() == {"a"}
        assert both["a"].finish_reason is FinishReason.ABORT
        at_once = turn(server, worker, "c", "bc")
        assert [at_once[name].finish_reason for name in "bc"] == [FinishReason.ABORT] * 2
        assert server.owners == {}


def test_a_worker_in_a_dead_ones_place_finds_room(tmp_path: Path) -> None:
    """When a worker connects under the name of a dead one, the dead one's open requests are
    dropped, and those of other workers are not."""
    with engine_server(tmp_path) as (server, connect):
        dead, other = connect("api-0"), connect("api-1")
        assert turn(server, dead, "a", "") == {}
        dead.close(linger=0)
        assert turn(server, other, "b", "")["b"].error is not None
        successor = connect("api-0")
        assert server.owners == {}
        assert turn(server, other, "c", "") == {}
        assert turn(server, successor, "d", "")["d"].error is not None
        assert server.owners.keys() == {"c"}


def test_what_a_dead_worker_has_sent_is_too_late_behind_the_next_ones_hello(tmp_path: Path) -> None:
    """What a dead worker had sent before its successor's hello is dropped, as when the engine was
    in a long step meanwhile: nobody could read the answers or abort the requests."""
    with engine_server(tmp_path) as (server, connect):
        for _ in range(5):
            dead = connect("api-0")
            dead.send(encode(Submit([request("a")], [])))
            dead.send(encode(AskStats()))
            dead.close(linger=-1)  # With this linger both messages arrive.
            successor = connect("api-0")
            assert server.owners == {}
            assert turn(server, successor, "b", "") == {}
            assert turn(server, successor, "", "b").keys() == {"b"}


def test_counters_are_told_when_asked(tmp_path: Path) -> None:
    with engine_server(tmp_path) as (server, connect):
        worker = connect("api-0")
        worker.send(encode(AskStats()))
        assert answer(server, worker) == EngineStats()

"""The access log has one line for each request: its path, its result, its sizes and times, but
never its text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from minisrv.config import ServerConfig
from minisrv.engine.client import EngineState
from minisrv.engine.messages import Loading
from minisrv.errors import EngineDeadError, GraphError, RequestError
from minisrv.request import EngineOutput, EngineRequest, FinishReason
from tests.server.conftest import HOUR
from tests.server.fake_engine import FakeEngine, outputs
from tests.waiting import until_still

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
SECRET = "my diary says"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, dict[str, Any]]]]:
    """A function that returns the messages of the access log so far, each with its fields."""
    caplog.set_level(logging.INFO, "minisrv.access")

    def read() -> list[tuple[str, dict[str, Any]]]:
        found = [record for record in caplog.records if record.name == "minisrv.access"]
        return [(record.getMessage(), record.__dict__["fields"]) for record in found]

    return read


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer(connect: Connect, lines: Any, caplog: Any, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}], "stream": stream}
    async with connect(FakeEngine(outputs([300, 301, 2], FinishReason.STOP))) as client:
        await client.post("/v1/chat/completions", json=body)
    [(message, fields)] = lines()
    assert message == "POST /v1/chat/completions"
    assert fields["status"] == 200
    assert 0 <= fields["first_ms"] <= fields["ms"] < 60_000
    assert fields["completion_tokens"] == 3
    assert fields["prompt_tokens"] > 3
    assert SECRET not in caplog.text


async def test_a_refusal_a_path_and_what_is_polled(connect: Connect, lines: Any) -> None:
    """Refused requests and unknown paths get a line, /health, /ready and /metrics get none, and no
    line has a key or a raw control character."""
    settings = ServerConfig(api_keys=("hidden",))
    async with connect(FakeEngine(outputs([2])), settings=settings) as client:
        headers = {"authorization": "Bearer hidden"}
        await client.post("/v1/completions", json={"prompt": 5}, headers=headers)
        await client.get("/nowhere%0A%00", headers={"authorization": "Bearer wrong"})
        for path in ("/health", "/ready", "/metrics"):
            await client.get(path, headers=headers)
    (first, told), (second, refused) = lines()
    assert (first, told["status"]) == ("POST /v1/completions", 400)
    assert (second, refused["status"]) == ("GET /nowhere\\n\\x00", 401)
    assert "hidden" not in str(lines())


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.DEAD])
async def test_what_is_polled_says_not_yet_without_a_line(
    connect: Connect, lines: Any, state: EngineState
) -> None:
    """The polled routes of health checks get no line even if they answer 503; another method on
    such a path gets one."""
    fake = FakeEngine(outputs([2]))
    fake.state, fake.loading = state, Loading("capturing graphs", 3, 9)
    async with connect(fake) as client:
        assert (await client.get("/ready")).status_code == 503
        await client.get("/health")
        await client.get("/metrics")
        assert lines() == []
        await client.post("/ready")
    [(message, fields)] = lines()
    assert (message, fields["status"]) == ("POST /ready", 405)


async def test_the_lines_of_requests_can_be_turned_off(connect: Connect, lines: Any) -> None:
    settings = ServerConfig(disable_uvicorn_access_log=True)
    async with connect(FakeEngine(outputs([2], FinishReason.STOP)), settings=settings) as client:
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        assert (await client.get("/nowhere")).status_code == 404
    assert lines() == []


async def test_an_error_in_a_stream(
    connect: Connect, end_time: Callable[[], None], lines: Any
) -> None:
    """A stream that ends with an error is logged with status 200 and the code of the error."""

    def script(request: EngineRequest) -> Iterator[EngineOutput | asyncio.Event]:
        yield EngineOutput(request_id=request.request_id, token_ids=[65])
        yield asyncio.Event()

    fake = FakeEngine(script)
    async with connect(fake, settings=ServerConfig(request_timeout=HOUR)) as client:
        body = {"prompt": "x", "stream": True}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        await until_still(lambda: len(fake.requests) + fake.num_messages)
        end_time()
        await asked
    [(_, fields)] = lines()
    assert (fields["status"], fields["error"]) == (200, "deadline_exceeded")


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (RequestError("it cannot be followed further"), "invalid_request_error"),
        (EngineDeadError("gone"), "engine_dead"),
        (GraphError("wrong"), "internal_error"),
        (ValueError("wrong"), "internal_error"),
    ],
)
async def test_whose_error_ends_a_stream(
    connect: Connect, lines: Any, error: Exception, logged: str
) -> None:
    """An error without a code is logged by its type, so that a client's error is not taken for one
    of the server."""

    def script(request: EngineRequest) -> list[EngineOutput | Exception]:
        return [EngineOutput(request_id=request.request_id, token_ids=[65]), error]

    async with connect(FakeEngine(script)) as client:
        await client.post("/v1/completions", json={"prompt": "x", "stream": True})
    [(_, fields)] = lines()
    assert (fields["status"], fields["error"]) == (200, logged)


async def test_a_client_that_went_away(connect: Connect, lines: Any) -> None:
    """A client that goes away is logged with status 499."""

    def script(request: EngineRequest) -> Iterator[asyncio.Event]:
        yield asyncio.Event()

    fake = FakeEngine(script)
    async with connect(fake) as client:
        task = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
        await fake.started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    [(_, fields)] = lines()
    assert fields["status"] == 499

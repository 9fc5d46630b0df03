"""Keys, what one key may have open, deadlines, and pages of other origins."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError, KeyLimitError
from minisrv.request import EngineOutput, EngineRequest, FinishReason
from minisrv.server.auth import OPEN_PATHS, KeyLimit
from tests.server.conftest import HOUR
from tests.server.fake_engine import FakeEngine, outputs
from tests.waiting import until, until_still

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
KEYS = ServerConfig(api_keys=("first key", "zweiter"))
COMPLETION = ("POST", "/v1/completions", {"prompt": "x"})


def engine() -> FakeEngine:
    return FakeEngine(outputs([65, 2], FinishReason.STOP))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


ROUTES = [
    COMPLETION,
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/tokenize", {"prompt": "x"}),
    ("POST", "/detokenize", {"tokens": [1]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/metrics", None),
    ("GET", "/version", None),
    ("GET", "/openapi.json", None),
    ("GET", "/docs", None),
    ("GET", "/docs/assets/swagger-ui.css", None),
    ("GET", "/", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_every_path_needs_a_key(
    connect: Connect, method: str, path: str, body: object
) -> None:
    fake = engine()
    async with connect(fake, settings=KEYS) as client:
        for headers in (
            {},
            bearer("third"),
            bearer(""),
            bearer("first key zweiter"),
            {"authorization": "first key"},
            {"authorization": "Basic Zmlyc3Qga2V5"},
            {"x-api-key": "first key"},
            {"authorization": "Bearer first key"[:-1], "host": "test/health"},
        ):
            refused = await client.request(method, path, json=body, headers=headers)
            assert refused.status_code == 401, headers
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["x-request-id"]
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert "zweiter" not in refused.text
        assert not fake.requests
        for headers in (bearer("first key"), {"authorization": "bearer  zweiter "}):
            assert (await client.request(method, path, json=body, headers=headers)).is_success


async def test_no_route_is_open_but_those_for_supervisors(connect: Connect) -> None:
    """A path that does not exist needs a key too: what exists is nobody's business."""
    async with connect(engine(), settings=KEYS) as client:
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200
        for path in ("/", "/nowhere", "/health/", "//health", "/HEALTH"):
            assert (await client.get(path)).status_code == 401, path


async def test_without_keys_everybody_is_let_in(connect: Connect) -> None:
    async with connect(engine()) as client:
        assert (await client.get("/v1/models", headers=bearer("any"))).status_code == 200


def forever(request: EngineRequest) -> Iterator[EngineOutput | asyncio.Event]:
    yield EngineOutput(request_id=request.request_id, token_ids=[65])
    yield asyncio.Event()


async def test_a_key_has_so_many_requests_open(connect: Connect, tmp_path: Path) -> None:
    fake = FakeEngine(forever)
    limit = KeyLimit(tmp_path / "open", keys=2, limit=2, worker=0, workers=1)
    options: dict[str, Any] = {"settings": KEYS, "key_limit": limit}
    async with connect(fake, **options) as client:

        async def ask(key: str) -> httpx.Response:
            return await client.post(COMPLETION[1], json=COMPLETION[2], headers=bearer(key))

        open_requests = [asyncio.create_task(ask("first key")) for _ in range(2)]
        await until(lambda: len(fake.requests) == 2)
        refused = await ask("first key")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "concurrency_limit"
        assert int(refused.headers["retry-after"]) >= 1
        assert "first key" not in refused.text
        other = asyncio.create_task(ask("zweiter"))
        await until(lambda: len(fake.requests) == 3)
        for task in (*open_requests, other):
            task.cancel()
        await asyncio.gather(*open_requests, other, return_exceptions=True)
        fake.script = outputs([65, 2], FinishReason.STOP)
        assert (await ask("first key")).status_code == 200


def test_all_workers_count_together(tmp_path: Path) -> None:
    def worker(index: int) -> KeyLimit:
        return KeyLimit(tmp_path / "open", keys=2, limit=2, worker=index, workers=3)

    workers = [worker(index) for index in range(3)]
    with workers[0].place(1), workers[2].place(1), pytest.raises(KeyLimitError):
        workers[1].place(1).__enter__()
    with workers[1].place(1), workers[1].place(0):
        pass
    place = workers[0].place(0)
    place.__enter__()  # and it dies
    worker(0)
    with workers[1].place(0), workers[2].place(0):
        pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("starts", [False, True])
async def test_a_deadline(
    connect: Connect, end_time: Callable[[], None], stream: bool, starts: bool
) -> None:
    def script(request: EngineRequest) -> Iterator[EngineOutput | asyncio.Event]:
        return forever(request) if starts else iter([asyncio.Event()])

    fake = FakeEngine(script)
    body = {"prompt": "x", "stream": stream}
    async with connect(fake, settings=ServerConfig(request_timeout=HOUR)) as client:
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        await until_still(lambda: len(fake.requests) + fake.num_messages)
        end_time()
        answer = await asked
    if stream and starts:
        assert answer.status_code == 200
        *_, last, done = answer.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert fake.aborted == [fake.requests[0].request_id]
    assert fake.admission.num_taken == 0


PREFLIGHT = {"access-control-request-method": "POST", "origin": "https://a.example"}


async def test_no_page_of_another_origin_may_ask(connect: Connect) -> None:
    async with connect(engine()) as client:
        asked = await client.options("/v1/completions", headers=PREFLIGHT)
        assert asked.status_code == 405
        answer = await client.get("/v1/models", headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers


async def test_origins_that_may(connect: Connect) -> None:
    settings = ServerConfig(api_keys=KEYS.api_keys, allowed_origins=("https://a.example",))
    async with connect(engine(), settings=settings) as client:
        asked = await client.options("/v1/completions", headers=PREFLIGHT)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options(
            "/v1/completions", headers=PREFLIGHT | {"origin": "https://b.example"}
        )
        assert other.status_code == 400
        origin = {"origin": "https://a.example"}
        answer = await client.get("/v1/models", headers=origin)
        assert answer.status_code == 401, "a page needs a key as well"
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize(
    "settings",
    [
        {"api_keys": ("",)},
        {"api_keys": ("a\nb",)},
        {"api_keys": ("ü",)},
        {"max_requests_per_key": 1},
        {"max_requests_per_key": -1, "api_keys": ("a",)},
        {"request_timeout": -1},
        {"engine_timeout": 0},
        {"host": ""},
        {"ssl_certfile": Path("a")},
        {"ssl_keyfile": Path("a")},
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**settings)


def test_no_key_is_shown() -> None:
    assert "zweiter" not in repr(KEYS)

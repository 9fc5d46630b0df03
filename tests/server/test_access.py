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
from minisrv.errors import ConfigError, KeyLimitError, RequestError
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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "n": 4}),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2}),
        ("/v1/completions", {"prompt": [[5], [6], [7], [8]]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 4}),
    ],
)
async def test_every_choice_counts(
    connect: Connect, tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    """Each takes a place in the engine, so a few requests of many choices would take all of it."""
    fake = FakeEngine(forever)
    limit = KeyLimit(tmp_path / "open", keys=2, limit=6, worker=0, workers=1)
    options: dict[str, Any] = {"settings": KEYS, "key_limit": limit}
    async with connect(fake, **options) as client:

        async def ask(path: str, body: dict[str, Any], key: str = "first key") -> httpx.Response:
            return await client.post(path, json=body, headers=bearer(key))

        held = [asyncio.create_task(ask(path, body))]
        await until(lambda: len(fake.requests) == 4)
        refused = await ask(path, body)
        assert refused.status_code == 429
        assert "4 choices open of 6" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
        never = await ask("/v1/completions", {"prompt": "x", "n": 7})
        assert never.status_code == 400, "it would be refused for ever"
        assert never.json()["error"]["param"] == "n"
        assert "7" in never.json()["error"]["message"]
        assert "6" in never.json()["error"]["message"]
        held.append(asyncio.create_task(ask("/v1/completions", {"prompt": "x", "n": 2})))
        await until(lambda: len(fake.requests) == 6)
        for route, more in (
            ("/v1/completions", {"prompt": "x"}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [5]}),
        ):
            assert (await ask(route, more)).status_code == 429, route
            assert route == "/v1/completions" or (await ask(route, more, "zweiter")).is_success
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        fake.script = outputs([65, 2], FinishReason.STOP)
        assert (await ask("/v1/completions", {"prompt": "x", "n": 6})).status_code == 200
        assert (await ask("/tokenize", {"prompt": "x"})).status_code == 200


def test_all_workers_count_together(tmp_path: Path) -> None:
    def worker(index: int) -> KeyLimit:
        return KeyLimit(tmp_path / "open", keys=2, limit=4, worker=index, workers=3)

    workers = [worker(index) for index in range(3)]
    with workers[0].places(1, 3), workers[2].places(1):
        with pytest.raises(KeyLimitError):
            workers[1].places(1).__enter__()
        with pytest.raises(RequestError, match="n asks for 5 choices"):
            workers[1].places(1, 5, param="n").__enter__()
    with workers[1].places(1, 4), workers[1].places(0):
        pass  # and what was refused is not counted
    place = workers[0].places(0, 3)
    place.__enter__()  # and it dies
    worker(0)
    with workers[1].places(0, 4):
        pass


async def test_each_key_has_a_prefix_cache_of_its_own(connect: Connect) -> None:
    """Whatever salt a client sends beside it."""

    async def salts(settings: ServerConfig, *asked: tuple[str, str | None]) -> list[Any]:
        fake = engine()
        async with connect(fake, settings=settings) as client:
            for key, salt in asked:
                body = {"prompt": "x", "cache_salt": salt}
                answer = await client.post("/v1/completions", json=body, headers=bearer(key))
                assert answer.status_code == 200
        return [(request.cache_key, request.cache_salt) for request in fake.requests]

    every = [(key, salt) for key in KEYS.api_keys for salt in (None, "x", "0", "1")]
    found = await salts(KEYS, *every)
    assert len(set(found)) == len(every)
    assert found == await salts(KEYS, *every), "in any worker, and in one that takes its place"
    assert not any(key in str(found) for key in KEYS.api_keys)
    shared = ServerConfig(api_keys=KEYS.api_keys, share_prefix_cache=True)
    assert await salts(shared, *every) == [(None, salt) for _, salt in every]
    assert await salts(ServerConfig(), ("any", None), ("any", "x")) == [(None, None), (None, "x")]


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

"""API keys, the limit of open requests for each key, deadlines, allowed hosts, and pages of other
origins."""

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
from minisrv.server.app import create_app
from minisrv.server.auth import OPEN_PATHS, KeyLimit
from minisrv.server.hosts import HostNames
from minisrv.text.tokenizer import Tokenizer
from tests.server.conftest import GENERATION, HOUR
from tests.server.fake_engine import FakeEngine, outputs
from tests.server.live_server import serve
from tests.waiting import GUARD_SECONDS, until, until_still

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
    ("POST", "/v1/responses", {"input": "x"}),
    ("POST", "/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/tokenize", {"prompt": "x"}),
    ("POST", "/detokenize", {"tokens": [1]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/metrics", None),
    ("GET", "/version", None),
    ("GET", "/debug/steps", None),
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
            {"x-api-key": "third"},
            {"x-api-key": ""},
            {"x-api-key": "Bearer first key"},
            bearer("third") | {"x-api-key": "first key"},
            {"authorization": "Bearer first key"[:-1], "host": "test/health"},
        ):
            refused = await client.request(method, path, json=body, headers=headers)
            assert refused.status_code == 401, headers
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["x-request-id"]
            error = refused.json()["error"]
            assert error["type"] == "authentication_error"
            if not path.startswith("/v1/messages"):
                assert error["code"] == "invalid_api_key"
            assert "zweiter" not in refused.text
        assert not fake.requests
        for headers in (
            bearer("first key"),
            {"authorization": "bearer  zweiter "},
            {"x-api-key": "zweiter"},
            {"x-api-key": "zweiter", "authorization": "Basic Zmlyc3Qga2V5"},
        ):
            assert (await client.request(method, path, json=body, headers=headers)).is_success


async def test_no_route_is_open_but_those_for_supervisors(connect: Connect) -> None:
    """A path that does not exist needs a key too: nobody without one learns which paths exist."""
    async with connect(engine(), settings=KEYS) as client:
        for path in OPEN_PATHS:
            assert (await client.get(path)).status_code == 200
        for path in (
            "/",
            "/docs",
            "/ui/",
            "/ui/nowhere.js",
            "/nowhere",
            "/health/",
            "//health",
            "/HEALTH",
        ):
            assert (await client.get(path)).status_code == 401, path


async def test_without_keys_everybody_is_let_in(connect: Connect) -> None:
    async with connect(engine()) as client:
        assert (await client.get("/v1/models", headers=bearer("any"))).status_code == 200


def forever(request: EngineRequest) -> Iterator[EngineOutput | asyncio.Event]:
    """A script that gives one token and then never goes on."""
    yield EngineOutput(request_id=request.request_id, token_ids=[65])
    yield asyncio.Event()


async def test_a_key_has_so_many_requests_open(connect: Connect, tmp_path: Path) -> None:
    """The third open request of a key gets 429, a request of another key is served, and a request
    that has ended makes room."""
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
    """Each choice takes a place in the engine; if only requests counted, a few with many choices
    would take all places."""
    fake = FakeEngine(forever)
    limit = KeyLimit(tmp_path / "open", keys=2, limit=6, worker=0, workers=1)
    options: dict[str, Any] = {"settings": KEYS, "key_limit": limit}
    async with connect(fake, **options) as client:

        async def ask(path: str, body: dict[str, Any], key: str = "first key") -> httpx.Response:
            return await client.post(path, json=body, headers=bearer(key))

        async def hold(path: str, body: dict[str, Any], requests: int) -> asyncio.Task[Any]:
            """Send a request that never ends; requests that are admitted after it are answered at
            once."""
            fake.script = forever
            task = asyncio.create_task(ask(path, body))
            await until(lambda: len(fake.requests) == requests)
            fake.script = outputs([65, 2], FinishReason.STOP)
            return task

        held = [await hold(path, body, 4)]
        refused = await ask(path, body)
        assert refused.status_code == 429
        assert "4 choices open of 6" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
        never = await ask("/v1/completions", {"prompt": "x", "n": 7})
        assert never.status_code == 400, "it would be refused for ever"
        assert never.json()["error"]["param"] == "n"
        assert "7" in never.json()["error"]["message"]
        assert "6" in never.json()["error"]["message"]
        held.append(await hold("/v1/completions", {"prompt": "x", "n": 2}, 6))
        for route, more in (
            ("/v1/completions", {"prompt": "x"}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [5]}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            assert (await ask(route, more)).status_code == 429, route
            assert route == "/v1/completions" or (await ask(route, more, "zweiter")).is_success
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert (await ask("/v1/completions", {"prompt": "x", "n": 6})).status_code == 200
        assert (await ask("/tokenize", {"prompt": "x"})).status_code == 200


def test_all_workers_count_together(tmp_path: Path) -> None:
    """Workers share the counts of a key, a refused request is not counted, and a worker that
    replaces a dead one starts from zero."""

    def worker(index: int) -> KeyLimit:
        return KeyLimit(tmp_path / "open", keys=2, limit=4, worker=index, workers=3)

    workers = [worker(index) for index in range(3)]
    with workers[0].places(1, 3), workers[2].places(1):
        with pytest.raises(KeyLimitError):
            workers[1].places(1).__enter__()
        with pytest.raises(RequestError, match="n asks for 5 choices"):
            workers[1].places(1, 5, param="n").__enter__()
    with workers[1].places(1, 4), workers[1].places(0):
        pass  # requests that were refused are not counted
    place = workers[0].places(0, 3)
    place.__enter__()  # its worker dies
    worker(0)
    with workers[1].places(0, 4):
        pass


async def test_each_key_has_a_prefix_cache_of_its_own(connect: Connect) -> None:
    """Requests of different keys never share cached blocks, whatever salt the clients send."""

    async def salts(settings: ServerConfig, *asked: tuple[str, str | None]) -> list[Any]:
        fake = engine()
        async with connect(fake, settings=settings) as client:
            for key, salt in asked:
                body = {"prompt": "x", "cache_salt": salt}
                answer = await client.post("/v1/completions", json=body, headers=bearer(key))
                assert answer.status_code == 200
        return [(request.api_key_index, request.cache_salt) for request in fake.requests]

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
    """At the deadline a request ends with 504, or with an error event if its stream has begun, and
    is aborted."""

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
    """By default there are no CORS headers, and a preflight request is refused."""
    async with connect(engine()) as client:
        asked = await client.options("/v1/completions", headers=PREFLIGHT)
        assert asked.status_code == 405
        answer = await client.get("/v1/models", headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers


async def test_origins_that_may(connect: Connect) -> None:
    """Pages of allowed origins pass the preflight request, and still need a key."""
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


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_no_page_may_ask_without_asking_before(connect: Connect, kind: str | None) -> None:
    """A POST of plain text, which a browser sends for any page without a preflight request, is
    refused; and a page of another origin cannot read the answers to its GET requests."""
    fake = engine()
    async with connect(fake) as client:
        headers = {"origin": "https://a.example"} | ({"content-type": kind} if kind else {})
        for method, path, body in ROUTES:
            content = None if body is None else json.dumps(body)
            answer = await client.request(method, path, content=content, headers=headers)
            assert answer.status_code == (415 if method == "POST" else 200), path
            assert not [name for name in answer.headers if name.startswith("access-control")]
    assert not fake.requests


LOOPBACK_NAMES = (
    "localhost",
    "LOCALHOST:8000",
    "localhost.:1",
    "models.localhost:80",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.8.9.1",
    "[::1]:8000",
    "[0:0::1]",
)
OTHER_NAMES = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "notlocalhost",
    "127.0.0.1.evil.example",
    "evil.example:127.0.0.1",
    "localhost@evil.example",
    "evil.example@localhost",
    "localhost evil.example",
    "localhost,evil.example",
    "203.0.113.5",
    "[2001:db8::1]:8000",
    "[localhost]",
    "::1",
    ":8000",
    "",
)


async def statuses(connect: Connect, settings: ServerConfig, address: str, *hosts: str) -> set[int]:
    """The statuses of one path with each of these Host headers, and of every path with the first of
    them."""
    names = HostNames.of(settings, address)
    key = {"authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else {}
    async with connect(engine(), settings=settings, hosts=names) as client:
        answers = [await client.get("/ready", headers={"host": host} | key) for host in hosts]
        answers += [
            await client.request(method, path, json=body, headers={"host": hosts[0]} | key)
            for method, path, body in (*ROUTES, ("GET", "/health", None))
        ]
        return {answer.status_code for answer in answers}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.4.5", "::1"])
async def test_a_page_that_lets_its_own_name_mean_this_machine_gets_nothing(
    connect: Connect, address: str
) -> None:
    """DNS rebinding: only the Host header tells a page under a foreign name from a page of this
    machine."""
    settings = ServerConfig()
    assert await statuses(connect, settings, address, *LOOPBACK_NAMES) == {200}
    assert await statuses(connect, settings, address, *OTHER_NAMES) == {421}


async def test_a_host_that_is_refused_is_told_what_to_do(connect: Connect) -> None:
    names = HostNames.of(ServerConfig(), "127.0.0.1")
    async with connect(engine(), hosts=names) as client:
        answer = await client.get("/v1/models", headers={"host": "models.example.org"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (421, "host_not_allowed")
        assert "'models.example.org'" in error["message"]
        assert "--allowed-hosts" in error["message"]
        assert answer.headers["x-request-id"]
        long = await client.get("/v1/models", headers={"host": "a" * 10_000})
        assert len(long.content) < 1000


async def test_other_servers_are_called_by_any_name(connect: Connect) -> None:
    """A server with keys, or one that other machines reach, answers to any host: it cannot know its
    names."""
    for settings, address in (
        (KEYS, "127.0.0.1"),
        (ServerConfig(), "0.0.0.0"),
        (ServerConfig(), "192.0.2.1"),
        (ServerConfig(), "::"),
        (ServerConfig(allowed_hosts=("*",)), "127.0.0.1"),
        (ServerConfig(allowed_hosts=("a.example", "*")), "0.0.0.0"),
    ):
        assert await statuses(connect, settings, address, *LOOPBACK_NAMES, *OTHER_NAMES) == {200}


@pytest.mark.parametrize("keys", [(), KEYS.api_keys])
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
async def test_allowed_hosts_are_answered_to_beside_those_of_the_machine(
    connect: Connect, address: str, keys: tuple[str, ...]
) -> None:
    allowed = ("Models.example.org", "model_server", "192.0.2.7", "2001:db8::2", "[2001:db8::3]")
    settings = ServerConfig(allowed_hosts=allowed, api_keys=keys)
    names = ("models.example.org:8000", "MODELS.example.org.", "model_server", "192.0.2.7:1")
    names += ("[2001:db8::2]:8000", "[2001:DB8::3]", *LOOPBACK_NAMES)
    assert await statuses(connect, settings, address, *names) == {200}
    others = (*OTHER_NAMES, "x.models.example.org", "models.example.org.evil.example")
    assert await statuses(connect, settings, address, *others) == {421}


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /ready HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"GET /ready HTTP/1.1\r\nHost: localhost \t\r\n", 200),
        (b"GET /ready HTTP/1.1\r\n", 400),
        (b"GET /ready HTTP/1.0\r\n", 200),
        (b"GET /ready HTTP/1.0\r\nHost: evil.example\r\n", 421),
        (b"GET /ready HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nHost: localhost\r\nhost: evil.example\r\n", 400),
        (b"GET /ready HTTP/1.0\r\nHost: localhost\r\nhost: evil.example\r\n", 400),
        (b"GET http://localhost:8000/ready HTTP/1.1\r\nHost: localhost:8000\r\n", 200),
        (b"GET http://evil.example/ready HTTP/1.1\r\nHost: localhost\r\n", 421),
        (b"GET HTTP://localhost@evil.example/ready HTTP/1.1\r\nHost: localhost\r\n", 421),
        (b"GET http://localhost/ready HTTP/1.1\r\nHost: evil.example\r\n", 200),
        (b"GET http://localhost/ready HTTP/1.1\r\n", 400),
        (b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"GET http://localhost?a HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"GET http://evil.example HTTP/1.1\r\nHost: localhost\r\n", 421),
    ],
)
async def test_hosts_as_they_are_sent(tokenizer: Tokenizer, head: bytes, status: int) -> None:
    """A host in the request line goes before the Host header, of which HTTP/1.1 has exactly one."""
    app = create_app(
        engine(),
        tokenizer,
        served_model_names=("x",),
        generation=GENERATION,
        hosts=HostNames.of(ServerConfig(), "127.0.0.1"),
    )
    async with serve(app) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head + b"Connection: close\r\n\r\n")
        async with asyncio.timeout(GUARD_SECONDS):
            answer = await reader.read()
        writer.close()
    assert int(answer.split()[1]) == status


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_hosts": ("",)},
        {"allowed_hosts": ("https://a.example",)},
        {"allowed_hosts": ("a.example:8000",)},
        {"allowed_hosts": ("cafe:8000",)},
        {"allowed_hosts": ("*.example",)},
        {"allowed_hosts": ("[::1",)},
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

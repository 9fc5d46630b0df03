"""The routes of sleep: what they ask the engine for, and who may use them."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from minisrv.config import ServerConfig
from minisrv.engine.messages import (
    Command,
    EngineStats,
    Sleep,
    SleepMode,
    SleepReport,
    SleepTag,
    WakeUp,
)
from minisrv.errors import SleepError, asleep_error
from tests.server.fake_engine import FakeEngine, outputs
from tests.server.test_access import bearer
from tests.server.test_operations import scrape

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
BOTH = [SleepTag.WEIGHTS, SleepTag.KV_CACHE]


class Sleeping(FakeEngine):
    """An engine that sleeps at level 2, whatever it has been asked for since, or cannot be woken
    up."""

    failure: SleepError | None = None

    async def command(self, command: Command) -> SleepReport:
        await super().command(command)
        if self.failure is not None:
            raise self.failure
        if isinstance(command, Sleep):
            return SleepReport(command.level, tuple(BOTH))
        left = tuple(tag for tag in BOTH if tag not in command.tags)
        return SleepReport(2 if left else 0, left)

    async def stats(self) -> EngineStats:
        return EngineStats(sleep=SleepReport(2, tuple(BOTH), 0.5, 0.25))


def engine() -> Sleeping:
    return Sleeping(outputs([300]))


async def test_what_the_engine_is_asked_for(connect: Connect) -> None:
    fake = engine()
    async with connect(fake, enable_sleep_mode=True) as client:
        both = ["weights", "kv_cache"]
        for path, level, released in (
            ("/sleep", 1, both),
            ("/sleep?level=2&mode=wait", 2, both),
            ("/wake_up", 0, []),
            ("/wake_up?tags=kv_cache", 2, ["weights"]),
            ("/wake_up?tags=kv_cache&tags=weights", 0, []),
        ):
            answer = await client.post(path)
            assert answer.status_code == 200, answer.text
            # What the command has brought about, not what another one has by now.
            report = {"is_sleeping": bool(released), "level": level, "released": released}
            assert answer.json() == report
        assert fake.commands == [
            Sleep(1, SleepMode.ABORT),
            Sleep(2, SleepMode.WAIT),
            WakeUp(BOTH),
            WakeUp([SleepTag.KV_CACHE]),
            WakeUp(BOTH[::-1]),
        ]
        report = {"is_sleeping": True, "level": 2, "released": both}
        assert (await client.get("/is_sleeping")).json() == report


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=3", "level"),
        ("/sleep?level=", "level"),
        ("/sleep?level=0", "level"),
        ("/sleep?mode=keep", "mode"),
        ("/sleep?levle=2", "levle"),
        ("/sleep?level=1&level=2", "level"),
        ("/sleep?mode=wait&level=1&mode=wait", "mode"),
        ("/wake_up?tags=weight", "tags"),
        ("/wake_up?tag=weights", "tag"),
    ],
)
async def test_what_cannot_be_asked_for(connect: Connect, path: str, param: str) -> None:
    fake = engine()
    async with connect(fake, enable_sleep_mode=True) as client:
        refused = await client.post(path)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert not fake.commands


async def test_what_keeps_the_engine_from_it_is_told(connect: Connect) -> None:
    fake = engine()
    fake.failure = SleepError("others have the memory")
    async with connect(fake, enable_sleep_mode=True) as client:
        answer = await client.post("/wake_up")
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert (error["code"], error["message"]) == ("sleep_failed", "others have the memory")


async def test_a_request_is_told_to_come_again(connect: Connect) -> None:
    async with connect(lambda request: [asleep_error()], enable_sleep_mode=True) as client:
        for stream in (False, True):
            body = {"prompt": "a", "stream": stream}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["code"] == "asleep"


async def test_the_routes_need_the_flag_and_a_key(connect: Connect) -> None:
    fake = engine()
    routes = [("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")]
    async with connect(fake) as client:
        for method, path in routes:
            assert (await client.request(method, path)).status_code == 404, path
    settings = ServerConfig(api_keys=("secret",))
    async with connect(fake, settings=settings, enable_sleep_mode=True) as client:
        for method, path in routes:
            assert (await client.request(method, path)).status_code == 401, path
            answer = await client.request(method, path, headers=bearer("secret"))
            assert answer.status_code == 200
    assert len(fake.commands) == 2


async def test_no_page_puts_a_server_to_sleep(connect: Connect) -> None:
    """A browser sends a POST without a body for any page, and names the page."""
    fake = engine()
    async with connect(fake, enable_sleep_mode=True) as client:
        for path in ("/sleep", "/wake_up"):
            refused = await client.post(path, headers={"origin": "https://a.example"})
            assert refused.status_code == 415
    assert not fake.commands


async def test_metrics_of_sleep(connect: Connect) -> None:
    async with connect(engine()) as client:
        found = await scrape(client)
    names = ("awake", "weights_offloaded", "discard_all")
    state = [found["minisrv:engine_sleep_state", name] for name in names]
    assert state == [0, 0, 1]
    assert found["minisrv:last_sleep_seconds",] == 0.5
    assert found["minisrv:last_wake_up_seconds",] == 0.25


async def test_the_document_has_the_routes_that_there_are(connect: Connect) -> None:
    for enabled in (False, True):
        async with connect(engine(), enable_sleep_mode=enabled) as client:
            paths = (await client.get("/openapi.json")).json()["paths"]
        assert {"/sleep", "/wake_up", "/is_sleeping"} <= paths.keys() or not enabled
        assert ("/sleep" in paths) is enabled

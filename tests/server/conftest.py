from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from minisrv.checkpoint import GenerationConfig
from minisrv.server import generation_response
from minisrv.server.app import create_app
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, Script
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of

HOUR = 3600
GENERATION = GenerationConfig(eos_token_ids=(2,), temperature=0.7, top_k=20)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("server"))
    return tokenizer_of(directory)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def end_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that ends the time of the request that is being answered; the request must have a
    time limit of an `HOUR`."""
    limits: list[asyncio.Timeout] = []

    def timeout(delay: float) -> asyncio.Timeout:
        assert 0 < delay <= HOUR
        limits.append(asyncio.timeout(delay))
        return limits[-1]

    patched = SimpleNamespace(**{**vars(asyncio), "timeout": timeout})
    monkeypatch.setattr(generation_response, "asyncio", patched)
    return lambda: limits[-1].reschedule(asyncio.get_running_loop().time())


@pytest.fixture
def connect(tokenizer: Tokenizer) -> Iterator[Callable[..., httpx.AsyncClient]]:
    """A function that makes a client of an application around a fake engine. What the application
    has started is closed after the test."""
    apps: list[FastAPI] = []

    def make(engine: FakeEngine | Script, **options: object) -> httpx.AsyncClient:
        fake = engine if isinstance(engine, FakeEngine) else FakeEngine(engine)
        arguments = {"served_model_names": ("tiny", "org/tiny"), "generation": GENERATION}
        app = create_app(fake, options.pop("tokenizer", tokenizer), **(arguments | options))
        apps.append(app)
        transport = httpx.ASGITransport(app)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    yield make
    for app in apps:
        app.state.close()

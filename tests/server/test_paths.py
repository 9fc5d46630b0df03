"""A server behind a proxy that serves it under a prefix, and strips that or not."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.server.paths import route_path
from tests.server.fake_engine import outputs

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
KEY = {"authorization": "Bearer secret"}


@pytest.fixture
def client(connect: Connect) -> httpx.AsyncClient:
    settings = ServerConfig(root_path="/models/a", api_keys=("secret",))
    return connect(outputs([300]), settings=settings)


@pytest.mark.parametrize("prefix", ["", "/models/a"])
async def test_what_is_checked_by_its_path(client: httpx.AsyncClient, prefix: str) -> None:
    """Keys, content types and the shape of errors are the same whether the prefix is there."""
    async with client:
        assert (await client.get(f"{prefix}/health")).status_code == 200
        assert (await client.get(f"{prefix}/v1/models")).status_code == 401
        assert (await client.get(f"{prefix}/v1/models", headers=KEY)).status_code == 200
        path, body = f"{prefix}/v1/completions", {"prompt": [5], "max_tokens": 1}
        assert (await client.post(path, headers=KEY, json=body)).status_code == 200
        text = await client.post(path, headers=KEY | {"content-type": "text/plain"}, content="{}")
        assert text.status_code == 415
        for headers in ({}, KEY):
            response = await client.post(f"{prefix}/v1/messages", headers=headers, json={})
            assert response.json()["type"] == "error"
            assert "request-id" in response.headers


async def test_only_the_whole_prefix_is_left_out(client: httpx.AsyncClient) -> None:
    async with client:
        for path in ("/models/av1/models", "/models/v1/models", "/models/a/models/a/v1/models"):
            assert (await client.get(path, headers=KEY)).status_code == 404
        assert (await client.get("/models/ahealth")).status_code == 401


async def test_links_have_the_prefix(client: httpx.AsyncClient) -> None:
    async with client:
        document = (await client.get("/openapi.json", headers=KEY)).json()
        assert document["servers"] == [{"url": "/models/a"}]
        assert "http://test/models/a/v1/" in (await client.get("/", headers=KEY)).text


@pytest.mark.parametrize("prefix", ["models", "/models/", "/", "//models", "/a b", "/?"])
def test_what_is_no_prefix(prefix: str) -> None:
    with pytest.raises(ConfigError, match="root_path"):
        ServerConfig(root_path=prefix)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/models", "/v1x", "/x/v1"])
def test_without_a_prefix_paths_are_as_they_are(path: str) -> None:
    assert route_path({"path": path}) == path
    assert route_path({"path": path, "root_path": "/other"}) == path

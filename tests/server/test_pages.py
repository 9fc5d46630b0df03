"""Pages for people: `/`, and `/docs`, which works without the internet."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from minisrv.checkpoint import GenerationConfig
from minisrv.config import ServerConfig
from minisrv.engine.client import EngineState
from minisrv.request import FinishReason
from minisrv.server.app import create_app
from minisrv.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, outputs
from tests.server.live_server import serve

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
CURL = {"accept": "*/*"}
KEYED = {"authorization": "Bearer key"}
WITHOUT_TEMPLATE = Tokenizer(Backend(WordLevel({"Once": 0, "upon": 1}, unk_token="Once")))


def engine() -> FakeEngine:
    return FakeEngine(outputs([65, 2], FinishReason.STOP))


class Page(HTMLParser):
    """The parts of a page that the tests look at: what a browser would load at once (`loaded`), its
    links and its commands."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.commands: list[str] = []
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attrs:
            assert not name.startswith("on"), "no scripts in attributes"
            if tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in ("src", "href"):
                self.loaded.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "pre":
            self.commands.append(data)


def commands_of(response: httpx.Response) -> list[str]:
    """The shell commands that a page shows, as HTML or as text."""
    if response.headers["content-type"].startswith("text/html"):
        return Page(response.text).commands
    return [part.strip() for part in response.text.split("\n\n") if part.startswith("    ")]


def arguments(command: str) -> list[str]:
    """The arguments that a shell would give to a command, which is not run."""
    name = command.split()[0]
    script = f"{name}() {{ printf '%s\\0' \"$@\"; }}\n{command}\n"
    env = {"MINISRV_API_KEY": "key"}
    ran = subprocess.run(["/bin/sh", "-c", script], env=env, capture_output=True, check=True)
    assert not ran.stderr
    return ran.stdout.decode().split("\0")[:-1]


async def test_the_documentation_needs_no_other_host(connect: Connect) -> None:
    """Every file of the page comes from this server, and its content security policy names no other
    host."""
    async with connect(engine()) as client:
        response = await client.get("/docs", headers=BROWSER)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert not re.search(r"\bhttps?:|[\"'(]//", response.text)
        loaded = [url for url in Page(response.text).loaded if not url.startswith("data:")]
        types = {}
        for url in [*loaded, *re.findall(r"url: '(.*)'", response.text)]:
            asset = await client.get(urljoin("/docs", url))
            assert asset.status_code == 200, url
            assert asset.content
            types[url.rpartition(".")[2]] = asset.headers["content-type"].partition(";")[0]
        assert types == {"css": "text/css", "js": "text/javascript", "json": "application/json"}
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert not re.search(r"[*]|:/|\.", policy), "it names no host"


async def test_a_head_is_answered_and_nothing_else_is(connect: Connect) -> None:
    """HEAD is answered like GET without a body, other methods get 405, and unknown files get
    404."""
    async with connect(engine()) as client:
        for path in ("/", "/docs", "/docs/assets/swagger-ui.css"):
            got, head = await client.get(path), await client.head(path)
            assert head.status_code == 200
            for header in ("content-type", "content-length"):
                assert head.headers[header] == got.headers[header]
            posted = await client.post(path, json={})
            assert posted.status_code == 405
            assert posted.json()["error"]["code"] == "method_not_allowed"
        for path in ("/docs/assets/no.js", "/docs/assets/", "/docs/assets/..%2f__init__.py"):
            missing = await client.get(path)
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "unknown_url"


async def test_who_reads_slowly_holds_no_file(tokenizer: Tokenizer) -> None:
    """An open file for each slow reader would be a descriptor that the limit of connections does
    not count."""
    app = create_app(engine(), tokenizer, served_model_names=("x",), generation=GenerationConfig())
    path = "/docs/assets/swagger-ui-bundle.js"
    async with serve(app) as address:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, address)
            await loop.sock_sendall(client, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert (await loop.sock_recv(client, 12)).endswith(b" 200")
            opened = [
                os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.exists()
            ]
    assert not any(file.endswith(".js") for file in opened)


async def test_a_file_comes_as_a_whole(connect: Connect) -> None:
    """Range requests get the whole file with status 200."""
    async with connect(engine()) as client:
        path = "/docs/assets/swagger-ui.css"
        whole = await client.get(path)
        for part in ("bytes=0-1", "bytes=5-1", "bytes=999999999-", "lines=1", "bytes=0-0,2-2", "x"):
            got = await client.get(path, headers={"range": part})
            assert (got.status_code, got.content) == (200, whole.content), part


@pytest.mark.parametrize("accept", [BROWSER, CURL, {}, {"accept": "application/json"}])
async def test_the_root_says_what_is_served(connect: Connect, accept: dict[str, str]) -> None:
    async with connect(engine()) as client:
        response = await client.get("/", headers=accept)
        assert response.status_code == 200
        kind = "text/html" if accept is BROWSER else "text/plain"
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        assert response.headers["vary"] == "accept"
        for text in ("tiny and org/tiny", "ready now", "200 tokens", "minisrv chat --url"):
            assert text in response.text
        for path in ("/docs", "/v1/models", "/health", "/ready", "/metrics"):
            assert path in response.text
            assert (await client.get(path)).status_code == 200


async def test_the_root_loads_nothing_and_runs_nothing(connect: Connect) -> None:
    """The page needs nothing but its own inline style, and all of its links work."""
    async with connect(engine()) as client:
        response = await client.get("/", headers=BROWSER)
        page = Page(response.text)
        assert page.loaded == ["data:,"]
        assert "<script" not in response.text
        for link in page.links:
            assert not urljoin("/", link).startswith("//")
            assert (await client.get(urljoin("/", link))).status_code == 200
        policy = response.headers["content-security-policy"]
        style = re.findall(r"<style>(.*?)</style>", response.text, re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
        assert "unsafe" not in policy


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("accept", [BROWSER, CURL])
async def test_its_command_works(
    connect: Connect, tokenizer: Tokenizer, accept: dict[str, str], chats: bool, keyed: bool
) -> None:
    """The curl command of the page is answered with 200 by the server."""
    options: dict[str, Any] = {"tokenizer": tokenizer if chats else WITHOUT_TEMPLATE}
    if keyed:
        options["settings"] = ServerConfig(api_keys=("key",))
    async with connect(engine(), **options) as client:
        response = await client.get("/", headers=accept | (KEYED if keyed else {}))
        commands = commands_of(response)
        assert ("minisrv chat --url http://test/v1" in commands) is chats
        assert ("export MINISRV_API_KEY=KEY" in commands) is keyed
        (command,) = (one for one in commands if one.startswith("curl "))
        url, *flags = arguments(command)
        given = list(zip(flags[::2], flags[1::2], strict=True))
        headers = dict(value.split(": ", 1) for flag, value in given if flag == "-H")
        (data,) = (value for flag, value in given if flag == "-d")
        answer = await client.post(url, headers=headers, content=data)
        assert answer.status_code == 200, answer.text
        assert "messages" in json.loads(data) if chats else "prompt" in json.loads(data)


@pytest.mark.parametrize("accept", [BROWSER, CURL])
async def test_names_and_hosts_are_text(connect: Connect, accept: dict[str, str]) -> None:
    """The host comes from the client and the model's name from the operator: neither becomes
    markup, and neither ends a command of the shell."""
    name = "<script>alert('é')</script>"
    async with connect(engine(), served_model_names=(name,)) as client:
        host = "a$(echo b)`echo c`;exit;'d.example"
        response = await client.get("/", headers=accept | {"host": host})
        assert response.status_code == 200
        if accept is BROWSER:
            assert "<script" not in response.text
        else:
            assert name in response.text
        ask, chat = commands_of(response)
        # Starlette may replace a host that is not valid by the server's own address.
        url, *_, data = arguments(ask)
        assert url.startswith("http://")
        assert url.endswith("/v1/chat/completions")
        assert json.loads(data)["messages"]
        assert arguments(chat) == ["chat", "--url", url.removesuffix("/chat/completions")]


@pytest.mark.parametrize("state", list(EngineState))
async def test_the_root_answers_in_every_state(connect: Connect, state: EngineState) -> None:
    fake = engine()
    fake.state = state
    if state is EngineState.LOADING:
        fake.info = None
    async with connect(fake) as client:
        response = await client.get("/")
        assert response.status_code == 200
        assert f"It is {state.value} now." in response.text
        assert ("200 tokens" in response.text) is (state is not EngineState.LOADING)
